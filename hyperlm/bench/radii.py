"""What the radii of one run are, what they go with, how much of its scores they make, and what it costs to take them away: rows of tables.

Axes: W sequences, N tokens of each, T = W N, H heads, S sampled queries. Rows of 2 H are queries, then keys.
"""

import math
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperlm import data, evals, trained
from hyperlm import tokenizer as tok
from hyperlm.batch import Batch, joined
from hyperlm.bench import checks, inside, scoring, statistics, wording
from hyperlm.bench.result import Row
from hyperlm.config import Config, ModelConfig
from hyperlm.loss import IGNORE
from hyperlm.tree import Tree

SPARSE = 8  # of so many sequences, one is looked at
SHIFTS = 20  # of radii against the text, evenly over it
LARGEST = 1 << 28  # radii that are kept: fewer tokens of a model that has more of them
PAIRED, SEQUENCES = 1 << 14, 16  # tokens among which scores are looked at, in at most so many sequences
QUERIES = 64  # of each of these
SHOWN = 96  # tokens in the disk
SEARCHED = 64  # sequences, for these
SIDES = ("query", "key")
NO_RADII = "softmax: no radii"


@dataclass(frozen=True)
class Job:
    """A run to look into."""

    label: str
    path: Path
    tokens: int  # of its validation text, about
    kernels: Literal["auto", "torch", "triton"]


class Text(NamedTuple):
    """Validation text of a run, and what is known of its tokens."""

    batch: Batch  # (W, N), on the model's device
    counted: Tensor  # (W, N) bool: where something is predicted
    frequency: Tensor  # (W, N) int64, of each token in the training text
    depth: Tensor  # (W, N) int64, open brackets before each token
    bracketed: Tensor  # (W, N) bool, tokens of documents with brackets
    pieces: list[str]  # (V,), the text of each token
    end: int  # the id between documents
    group: Tensor  # (W,) int64, from 0: the document in which each sequence begins; those that begin in one are not independent


Tables = dict[str, list[Row]]  # rows of each table


# -- text ------------------------------------------------------------------------------------------------------------------------------


def read_text(corpus: data.Corpus, config: Config, tokens: int, device: torch.device) -> Text:
    """About so many validation tokens, as many of each source."""
    shards = [shard for shard in corpus.shards if len(shard.val)]
    each = max(1, tokens // len(shards) // config.data.seq_len)
    end = tok.end_of_text(corpus.tokenizer)
    batches, begun = zip(*(validation(shard, config, each, end) for shard in shards), strict=True)
    batch, begun = joined(batches), torch.tensor([(i, k) for i, ended in enumerate(begun) for k in ended])
    group = begun.unique(dim=0, return_inverse=True)[1]
    ids = batch.tokens.numpy()
    pieces = wording.texts_of(corpus.tokenizer)
    depth, document = wording.bracket_depths(ids, pieces, end), wording.documents(ids, end)
    deepest = np.zeros(document.max() + 1, np.int64)
    np.maximum.at(deepest, document.ravel(), depth.ravel())
    frequency = wording.frequencies(corpus, config.model.vocab_size)[ids]
    known = (torch.from_numpy(x).to(device) for x in (frequency, depth, deepest[document] > 0))
    batch = batch.to(device)
    return Text(batch, batch.targets != IGNORE, *known, pieces, end, group.to(device))


def validation(shard: data.Shard, config: Config, count: int, end: int) -> tuple[Batch, list[int]]:
    """`count` sequences of a source's validation text, or all there are, evenly over SPARSE times as many: one document may be long; and
    how many documents ended before each."""
    ends = np.cumsum(shard.val_documents[:, 0])
    enough = ends[min(np.searchsorted(ends, SPARSE * count * config.data.seq_len), len(ends) - 1)]
    sequences, _ = data.validation_sequences(shard, config.data, int(enough))
    those = evenly(len(sequences.tokens), count)
    # The first token of a text is the end of the one before.
    before = (sequences.tokens == end).sum(1).cumsum(0) - (sequences.tokens[:, 1:] == end).sum(1)
    return sequences.map(lambda x: x[those]), before[those].tolist()


def evenly(count: int, most: int) -> Tensor:
    """At most so many of the numbers 0 .. count - 1, from the first to the last: sources stand one after the other."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def with_drawn_radii(params: Tree, cfg: ModelConfig) -> Tree:
    """An untrained model whose radii, which are all equal at first, are random functions of the token instead."""
    blocks = [dict(block) for block in params["blocks"]]
    for layer in cfg.hyperbolic_layers:
        weight = blocks[layer]["mixer.radius.weight"]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)) / cfg.d_model**0.5
        blocks[layer]["mixer.radius.weight"] = noise.to(weight)
    return {**params, "blocks": blocks}


# -- measurements ----------------------------------------------------------------------------------------------------------------------


def side_of(row: int, heads: int) -> tuple[str, int]:
    """Of a row among 2 H: query or key, and its head."""
    return SIDES[row // heads], row % heads


def radius_rows(seen: inside.Seen, counted: Tensor, cfg: ModelConfig) -> tuple[list[Row], list[Row]]:
    """A row for each layer with radii, and one for each head of it and side."""
    layers, heads = [], []
    for layer in cfg.hyperbolic_layers:
        r = seen.lengths[layer][:, counted]
        low, high = r.sort(-1).values[:, [int(share * (r.shape[1] - 1)) for share in (0.05, 0.95)]].T.tolist()
        row: Row = {"mixer": cfg.layer_kind(layer), "layer": layer}
        for side, side_radii in zip(SIDES, r.chunk(2), strict=True):
            ordered = side_radii.flatten().sort().values
            row[f"{side}: mean"], row[f"{side}: std"] = float(side_radii.mean()), float(side_radii.std(-1).mean())
            row[f"{side}: 5 %"], row[f"{side}: 95 %"] = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.05, 0.95))
        half_lives = None if seen.rates[layer] is None else (math.log(2) / seen.rates[layer]).tolist()
        row["half-life of heads, tokens"] = "" if half_lives is None else f"{min(half_lives):.3g} to {max(half_lives):.3g}"
        layers.append(row)
        for i, (middle, std) in enumerate(zip(r.mean(-1).tolist(), r.std(-1).tolist(), strict=True)):
            side, head = side_of(i, cfg.n_heads)
            of_head: Row = {"layer": layer, "head": head, "of": side, "radius": middle, "std": std, "5 %": low[i], "95 %": high[i]}
            heads.append(of_head | ({} if half_lives is None else {"half-life": half_lives[head]}))
    return layers, heads


class Quantity(NamedTuple):
    """Something that radii may go with, of U of the T tokens."""

    name: str
    where: Tensor  # (T,) bool, these tokens
    ranks: Tensor  # (U,) fp64, of mean 0; without what the others explain
    others: Tensor | None  # (C, U), ranks of what is taken out
    group: Tensor  # (U,) int64, of each token, from 0: see `Text`
    shifted: Tensor  # (U, SHIFTS): `ranks` of other places, far off


def quantities(text: Text, entropies: Tensor) -> list[Quantity]:
    """Those that there are in this text."""
    w, n = text.counted.shape
    position = torch.arange(n, device=text.counted.device).expand(w, n)

    def quantity(name: str, values: Tensor, where: Tensor, *others: Tensor) -> Quantity:
        x = statistics.ranks(values[where])
        taken = statistics.ranks(torch.stack([other[where] for other in others])) if others else None
        x = x if taken is None else statistics.without(x, taken)
        shifts = len(x) * torch.arange(1, SHIFTS + 1, device=x.device) // (SHIFTS + 1)
        elsewhere = (torch.arange(len(x), device=x.device)[:, None] + shifts) % len(x)
        group = torch.unique(text.group[where.nonzero()[:, 0]], return_inverse=True)[1]
        return Quantity(name, where.flatten(), x, taken, group, x[elsewhere])

    present = [quantity("log frequency", text.frequency, text.counted), quantity("entropy", entropies, text.counted)]
    inner = text.counted & text.bracketed
    if inner.any():
        present.append(quantity("bracket depth", text.depth, inner))
        present.append(quantity("depth, partial", text.depth, inner, text.frequency, position))
    return present


def correlation_rows(lengths: Tensor, null: Tensor, those: list[Quantity], layer: int, cfg: ModelConfig) -> list[Row]:
    """A row for each head, side and quantity, from radii (or norms) of a layer (2 H, W, N), and those of a model that was not trained."""
    rows = []
    for known in those:

        def ranks(x: Tensor, known: Quantity = known) -> Tensor:
            ranked = statistics.ranks(x.flatten(1)[:, known.where])
            return ranked if known.others is None else statistics.without(ranked, known.others)

        x, y = ranks(lengths), known.ranks
        size = (x.square().sum(-1, keepdim=True) * y.square().sum()).sqrt()
        columns = {
            "rho": statistics.correlation(x, y),
            **dict(zip(("low", "high"), statistics.interval(x, y, known.group), strict=True)),
            "shifted": ((x @ known.shifted) / size).abs().amax(-1),
            "untrained": statistics.correlation(ranks(null), y),
        }
        of = "radius" if layer in cfg.hyperbolic_layers else "norm"
        for i, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
            side, head = side_of(i, cfg.n_heads)
            rows.append({"layer": layer, "head": head, "of": f"{side} {of}", "with": known.name, **dict(zip(columns, values, strict=True))})
    return rows


def mean(values: list[float]) -> float:
    """Of those that are numbers; nan if none is."""
    finite = [x for x in values if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan


def correlation_summary(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Of the rows of heads: one for each side and quantity, and one for each of these and layer."""
    summary, layers = [], []
    for of, what in dict.fromkeys((row["of"], row["with"]) for row in rows):
        matching = [row for row in rows if (row["of"], row["with"]) == (of, what)]
        finite = [row for row in matching if math.isfinite(row["rho"])]
        best = max(finite, key=lambda row: abs(row["rho"]), default=None)
        strongest = "all equal" if best is None else f"{best['rho']:+.2f}"
        if best and math.isfinite(best["low"]):  # there are several documents
            strongest += f" [{best['low']:+.2f}, {best['high']:+.2f}]"
        summary.append(
            {
                "of": of,
                "with": what,
                "mean rho": mean([row["rho"] for row in matching]),
                "mean |rho|": mean([abs(row["rho"]) for row in matching]),
                "untrained |rho|": mean([abs(row["untrained"]) for row in matching]),
                "untrained, largest": max((abs(row["untrained"]) for row in matching if math.isfinite(row["untrained"])), default=math.nan),
                "shifted, largest": max((row["shifted"] for row in finite), default=math.nan),
                "strongest head [95 %]": strongest,
                "which head": "" if best is None else f"layer {best['layer']}, head {best['head']}",
            }
        )
        for layer in dict.fromkeys(row["layer"] for row in matching):
            rho = [row["rho"] for row in matching if row["layer"] == layer]
            strong = max((x for x in rho if math.isfinite(x)), key=abs, default=math.nan)
            layers.append({"layer": layer, "of": of, "with": what, "mean |rho|": mean(list(map(abs, rho))), "strongest head": strong})
    return summary, layers


def share_rows(params: Tree, null: Tree, text: Text, config: Config) -> list[Row]:
    """A row for each head: how much of the variance of its scores the angle alone explains, and the key's radius alone."""
    cfg, n = config.model, config.data.seq_len
    tokens = text.batch.tokens[text.counted.all(1)]
    tokens = tokens if len(tokens) else text.batch.tokens
    tokens = tokens[evenly(len(tokens), max(1, min(SEQUENCES, PAIRED // n)))]
    queries = torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[:QUERIES].sort().values.to(tokens.device) + 1
    shares: dict[str, dict[int, Tensor]] = {name: {} for name in ("angle alone", "key's radius alone", "untrained, angle alone")}

    def look(trained: bool, layer: int, at: inside.Polar) -> None:
        score = "tangent" if cfg.layer_kind(layer) == "phase8" else cfg.score
        values, cosine, past = inside.scores(at, queries, score)
        radius = at.r_k[:, :, None, :].expand_as(values)
        values, cosine, radius = (x.transpose(0, 1).flatten(1, 2) for x in (values, cosine, radius))
        past = past.repeat(len(tokens), 1)
        name = "angle alone" if trained else "untrained, angle alone"
        shares[name][layer] = statistics.share_explained(values, cosine, past)
        if trained:
            shares["key's radius alone"][layer] = statistics.share_explained(values, radius, past)

    for weights, is_trained in ((params, True), (null, False)):
        inside.polar(weights, tokens, cfg, config.kernels, bound(look, is_trained))
    rows = []
    for layer in cfg.hyperbolic_layers:
        for head, values in enumerate(zip(*(by_layer[layer].tolist() for by_layer in shares.values()), strict=True)):
            rows.append({"layer": layer, "mixer": cfg.layer_kind(layer), "head": head, **dict(zip(shares, values, strict=True))})
    return rows


def share_summary(rows: list[Row]) -> list[Row]:
    """Of the rows of heads, one for each mixer."""
    summary = []
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        heads = [row for row in rows if row["mixer"] == mixer]
        angle = [row["angle alone"] for row in heads if math.isfinite(row["angle alone"])]
        least_most = f"{min(angle):.2f} to {max(angle):.2f}" if angle else ""
        row: Row = {"mixer": mixer, "heads": len(heads), "angle alone": mean(angle), "of heads": least_most}
        summary.append(row | {name: mean([row[name] for row in heads]) for name in ("key's radius alone", "untrained, angle alone")})
    return summary


def of_equal_frequency(lengths: Tensor, frequency: Tensor, counted: Tensor, seed: int) -> Tensor:
    """Radii (2 H, W, N), each row in a random order of its own, in which every token has the radius of one that is as frequent: the whole
    part of log2(1 + frequency) is the same. What is not counted keeps to itself."""
    kind = torch.where(counted, torch.log2(1 + frequency.double()).long(), -1).flatten()
    drawn = torch.rand(len(lengths), len(kind), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(kind.device)
    into, source = kind.argsort(stable=True).expand(len(lengths), -1), (kind + drawn).argsort(-1)
    flat = lengths.flatten(1)
    return torch.empty_like(flat).scatter_(1, into, flat.gather(1, source)).view_as(lengths)


def ablation_rows(params: Tree, seen: inside.Seen, text: Text, config: Config) -> list[Row]:
    """Validation loss, less that of the model as it is, where radii are replaced."""
    cfg, h = config.model, config.model.n_heads
    hyperbolic = set(cfg.hyperbolic_layers)
    sides = {"queries": slice(0, h), "keys": slice(h, 2 * h), "both": slice(0, 2 * h)}

    def averaged(layer: int, r: Tensor) -> Tensor:
        return r[:, text.counted].double().mean(-1).float()[:, None, None].expand_as(r)

    def shuffled(layer: int, r: Tensor) -> Tensor:
        return of_equal_frequency(r, text.frequency, text.counted, layer)

    ways = {
        "themselves (null)": (lambda layer, r: r, ["both"]),
        "the head's mean": (averaged, sides),
        "those of tokens as frequent": (shuffled, sides),
    }
    counts, rows = text.counted.sum(1).double(), []
    before = float(seen.nats.double().sum() / counts.sum())
    for way, (replaced, which) in ways.items():
        radii = [replaced(layer, r) if layer in hyperbolic else r for layer, r in enumerate(seen.lengths)]
        for side in which:
            after = inside.with_radii(params, text.batch, cfg, config.kernels, radii, sides[side])
            lost, error = statistics.mean_and_error((after - seen.nats).double().sum(1), counts, text.group)
            rows.append(
                {"radii of": side, "replaced by": way, "nats lost": lost, "± standard error": error, "validation loss before": before}
            )
    return rows


def disk_rows(params: Tree, seen: inside.Seen, text: Text, config: Config) -> tuple[list[Row], str]:
    """Keys of one passage in the head whose keys' radii differ most, and in words what is shown."""
    cfg = config.model
    spread = torch.stack([seen.lengths[layer][cfg.n_heads :, text.counted].std(-1) for layer in cfg.hyperbolic_layers])
    best, head = divmod(int(spread.argmax()), cfg.n_heads)
    layer = cfg.hyperbolic_layers[best]
    searched = text.batch.tokens[evenly(len(text.batch.tokens), SEARCHED)]
    ids = searched.cpu().numpy()
    w, start = wording.passage(ids, text.pieces, text.end, SHOWN)
    those = slice(start, start + SHOWN)
    keys: dict[int, tuple[Tensor, Tensor]] = {}

    def look(number: int, at: inside.Polar) -> None:
        if number == layer:
            keys[0] = at.k[0, head, those], at.r_k[0, head, those]

    inside.polar(params, searched[w : w + 1], cfg, config.kernels, look, rotated=False)
    at, share = projected(*keys[0])
    pieces = [text.pieces[i] for i in ids[w, those]]
    columns = zip(at.tolist(), wording.labels(pieces), wording.groups(pieces), strict=True)
    rows = [{"x": x, "y": y, "label": label, "group": group} for (x, y), label, group in columns]
    shown = f"std of its keys' radii {float(spread.max()):.2f}; two directions hold {share:.0%} of the variance of their directions"
    return rows, f"layer {layer}, head {head} ({shown})"


def projected(u: Tensor, r: Tensor) -> tuple[Tensor, float]:
    """Points of the Poincaré disk at their true distances from the origin: unit directions u (P, K), radii r (P,) -> (P, 2). Angles alone
    are projected, to the first two principal directions of u; and the share of the variance of u that these hold."""
    u = u - u.mean(0)
    _, s, v = torch.linalg.svd(u.double(), full_matrices=False)
    plane = u.double() @ v[:2].mT
    plane = plane / plane.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return plane * torch.tanh(r.double() / 2)[:, None], float(s[:2].square().sum() / s.square().sum().clamp(min=1e-300))


def look_into(job: Job, device: torch.device) -> Tables:
    """All that is measured of a run."""
    loaded = trained.load_model(job.path, "latest", str(device), job.kernels)
    config, cfg = loaded.config, loaded.config.model
    corpus = scoring.own_text(job.path, config, loaded.step)
    text = read_text(corpus, config, min(job.tokens, LARGEST // (2 * cfg.n_heads * cfg.n_layers)), device)
    checks.model(config, device)
    nats = bound(evals.token_nats, loaded.params, config=config)
    checks.causal(nats, cfg.vocab_size, device, min(checks.LENGTH, config.data.seq_len), checks.TRAINED)
    seen, null = inside.observe(loaded.params, text.batch, cfg, config.kernels), scoring.untrained(config, device)
    drawn = inside.observe(with_drawn_radii(null, cfg), text.batch, cfg, config.kernels).lengths
    those = quantities(text, seen.entropies)
    tables: Tables = {}
    rows = [row for layer, lengths in enumerate(seen.lengths) for row in correlation_rows(lengths, drawn[layer], those, layer, cfg)]
    tables["correlations by head"] = rows
    tables["correlations"], tables["correlations by layer"] = correlation_summary(rows)
    size: Row = {
        "tokens": int(text.counted.sum()),
        "sequences": len(text.counted),
        "documents": int(text.group.max()) + 1,
        "in documents with brackets": int((text.counted & text.bracketed).sum()),
    }
    tables["text"] = [size]
    if not cfg.hyperbolic_layers:
        none: Row = {"mixer": NO_RADII}
        return tables | {
            "radii": [none],
            "variance of scores": [none | {"heads": cfg.n_layers * cfg.n_heads}],
            "ablations": [{"radii of": NO_RADII}],
        }
    tables["radii"], tables["radii by head"] = radius_rows(seen, text.counted, cfg)
    tables["variance by head"] = share_rows(loaded.params, null, text, config)
    tables["variance of scores"] = share_summary(tables["variance by head"])
    tables["ablations"] = ablation_rows(loaded.params, seen, text, config)
    tables["disk"], shown = disk_rows(loaded.params, seen, text, config)
    tables["text"] = [size | {"in the disk": shown}]
    return tables
