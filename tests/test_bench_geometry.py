"""Geometry of trained runs: statistics against hand computations, what is seen inside a model against it, ablations that cost nothing."""

import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, TINY, generator, normal

from hyperlm import data, geometry, model, runs, trained
from hyperlm import tokenizer as tok
from hyperlm.batch import next_tokens
from hyperlm.bench import geometry as suite
from hyperlm.bench import inside, radii, scoring, statistics, wording
from hyperlm.config import Config, ConfigError, DataConfig
from hyperlm.geometry import R_MAX, R_MIN
from hyperlm.loss import IGNORE

CPU = torch.device("cpu")

# -- statistics ------------------------------------------------------------------------------------------------------------------------


def naive_ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def naive_pearson(x: list[float], y: list[float]) -> float:
    a, b = (np.array(z) - np.mean(z) for z in (x, y))
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # 1 - 6 sum d^2 / n (n^2 - 1)
        ([1, 1, 2, 2], [1, 2, 3, 4], 2 / math.sqrt(5)),  # ranks 0.5 0.5 2.5 2.5 and 0 1 2 3
        ([7, 7, 7, 7], [1, 2, 3, 4], math.nan),
    ],
)
def test_spearman_by_hand(x, y, rho):
    (found,) = statistics.spearman(torch.tensor([x]), torch.tensor(y)).tolist()
    assert found == pytest.approx(rho, nan_ok=True)


@pytest.mark.parametrize("values", [3, 50, 10_000])
def test_spearman_and_partial_with_ties_and_without(values):
    """Against ranks by counting, the formula for one thing that is taken out, and regressions for two; with so many different values."""
    x, y, z, w = torch.randint(values, (4, 200), generator=generator()).double()
    y, x = y + z, x + 2 * y + z - w
    ranked = [naive_ranks(v.tolist()) for v in (x, y, z, w)]
    xy, xz, yz = naive_pearson(*ranked[:2]), naive_pearson(ranked[0], ranked[2]), naive_pearson(*ranked[1:3])
    assert float(statistics.spearman(x[None], y)) == pytest.approx(xy)
    assert float(statistics.partial(x[None], y, z[None])) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    design = np.stack([np.ones(200), *map(np.array, ranked[2:])], 1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in map(np.array, ranked[:2])]
    assert float(statistics.partial(x[None], y, torch.stack([z, w]))) == pytest.approx(naive_pearson(*left))
    try:
        from scipy.stats import spearmanr
    except ImportError:
        return
    assert xy == pytest.approx(spearmanr(x.tolist(), y.tolist()).statistic)


def test_what_is_explained_entirely_goes_with_nothing():
    x, y = normal(2, 50).unbind()
    assert math.isnan(float(statistics.partial(x[None], y, x[None].exp()))) and math.isnan(
        float(statistics.partial(x[None], y, torch.stack([y, y])))
    )


def test_intervals_are_those_of_whole_sequences_drawn_again():
    x, y = normal(3, 60), normal(60, seed=1)
    sequence = torch.arange(60) // 10
    low, high = statistics.interval(x, y, sequence, seed=3)
    drawn = torch.randint(6, (statistics.DRAWS, 6), generator=generator(3))
    naive = []
    for draw in drawn.tolist():
        tokens = [10 * s + i for s in draw for i in range(10)]
        naive.append(naive_pearson(x[0, tokens].tolist(), y[tokens].tolist()))
    assert [float(low[0]), float(high[0])] == pytest.approx(np.quantile(naive, [0.025, 0.975]).tolist())
    assert torch.isnan(torch.stack(statistics.interval(x, y, torch.zeros(60, dtype=torch.int64)))).all()


def test_the_error_of_a_mean_is_that_over_documents():
    """Each on its own, that of a mean; the same windows twice, as of before, where plain counting would say a root of two less."""
    sums, counts, own = normal(9), torch.full((9,), 4.0, dtype=torch.float64), torch.arange(9)
    once = statistics.mean_and_error(sums, counts, own)
    assert once == pytest.approx((float(sums.mean()) / 4, float(sums.std()) / 4 / 3))
    assert statistics.mean_and_error(sums.repeat(2), counts.repeat(2), own.repeat(2)) == pytest.approx(once)
    mean, error = statistics.mean_and_error(sums, counts, torch.zeros(9, dtype=torch.int64))
    assert mean == pytest.approx(once[0]) and math.isnan(error)


def test_sequences_are_of_one_group_where_they_begin_in_one_document(tmp_path):
    """Bytes: four documents and the ends of them, in sequences of 16; counted in the stream that the sequences make."""
    for name, size in {"a": 99, "b": 19, "c": 19, "d": 59}.items():
        (tmp_path / f"{name}.txt").write_text(name * size)
    data_config = DataConfig(sources=(), val_sources=(str(tmp_path),), tokenizer="bytes", seq_len=16)
    config = Config(replace(TINY, vocab_size=320), data_config)
    corpus = data.prepare(config, say=lambda line: None)
    (shard,), end = corpus.shards, tok.end_of_text(corpus.tokenizer)
    batch, begun = radii.validation(shard, config, 100, end)
    stream = batch.tokens.flatten().tolist()
    assert begun == [stream[: 16 * i + 1].count(end) for i in range(len(batch.tokens))] and len(set(begun)) == 4
    group = radii.read_text(corpus, config, 1600, CPU).group.tolist()
    assert [group.count(i) for i in range(4)] == [begun.count(i) for i in sorted(set(begun))]


def pairs(h: int = 2, q: int = 40, m: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines and radii of random queries and keys, and which keys a query looks at."""
    cosine = 2 * torch.rand(h, q, m, generator=generator(), dtype=torch.float64) - 1
    radius = torch.rand(h, 1, m, generator=generator(1), dtype=torch.float64).expand(h, q, m)
    return cosine, radius, torch.arange(m) <= torch.arange(m - q, m)[:, None]


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        (lambda cosine, radius: torch.exp(2 * cosine), 0.99, 1.0),
        (
            lambda cosine, radius: torch.exp(2 * cosine) + 100 * torch.arange(40.0)[:, None],
            0.99,
            1.0,
        ),  # what a query adds to all its scores is nothing
        (lambda cosine, radius: radius.clone(), -0.02, 0.02),
        (lambda cosine, radius: cosine + 2 * radius, 0.45, 0.55),  # variances 1/3 and 4/12
        (lambda cosine, radius: torch.ones_like(cosine), math.nan, math.nan),
    ],
)
def test_the_share_that_the_angle_explains(scores, low, high):
    cosine, radius, there = pairs()
    for share in statistics.share_explained(scores(cosine, radius), cosine, there).tolist():
        assert low <= share <= high or (math.isnan(low) and math.isnan(share))


def test_the_share_is_that_of_least_squares():
    """With a column for each query and each bin, written out."""
    cosine, _, there = pairs(1, 5, 24)
    scores = normal(1, 5, 24) + cosine
    cuts = np.sort(cosine[:, there].numpy()[0])[np.arange(1, 4) * int(there.sum()) // 4]
    columns, y = [], []
    for query, key in there.nonzero().tolist():
        columns.append(
            [float(query == i) for i in range(5)]
            + [float(np.searchsorted(cuts, float(cosine[0, query, key]), "right") == i) for i in range(4)]
        )
        y.append(float(scores[0, query, key]))
    columns, y = np.array(columns), np.array(y)
    whole, queries = (np.square(y - a @ np.linalg.lstsq(a, y, rcond=None)[0]).sum() for a in (columns, columns[:, :5]))
    adjusted = 1 - whole / (len(y) - 5 - 3) / (queries / (len(y) - 5))  # four bins, of which the constants of queries make one
    assert statistics.share_explained(scores, cosine, there, 4).tolist() == pytest.approx([adjusted])


def test_of_few_pairs_a_fit_explains_nothing_that_is_not_there():
    """64 steps fit a third of the variance of 200 independent numbers; the mean over heads is 0 all the same."""
    scores, cosine, there = normal(400, 5, 40), normal(400, 5, 40, seed=1), torch.ones(5, 40, dtype=torch.bool)
    shares = statistics.share_explained(scores, cosine, there)
    assert float(shares.mean()) == pytest.approx(0, abs=4 * float(shares.std()) / 20)
    assert statistics.share_explained(cosine.clamp(-1, 1), cosine, there).min() > 0.9
    assert torch.isnan(statistics.share_explained(scores[:, :1], cosine[:, :1], there[:1])).all()  # 40 pairs, 64 steps


# -- tokens as text --------------------------------------------------------------------------------------------------------------------


def test_bracket_depth_is_that_of_the_text_before():
    """Of random texts in pieces of one to three characters."""
    rng = random.Random(0)
    texts = ["<end>"] + ["".join(rng.choices("ab([{)]} ", k=rng.randint(1, 3))) for _ in range(60)]
    tokens = np.array([[rng.choice(range(61)) for _ in range(50)] for _ in range(4)])
    found = wording.bracket_depths(tokens, texts, end=0)
    for row, depths in zip(tokens.tolist(), found.tolist(), strict=True):
        for n, depth in enumerate(depths):
            document = row[:n][max((i + 1 for i, token in enumerate(row[:n]) if token == 0), default=0) :]
            level = 0
            for c in "".join(texts[token] for token in document):
                level = max(0, level + (c in "([{") - (c in ")]}"))
            assert depth == level
    assert found.max() > 3


def test_documents_are_told_apart():
    assert wording.documents(np.array([[0, 1, 2, 0, 3], [3, 3, 0, 1, 1]]), end=0).tolist() == [[0, 1, 1, 1, 2], [3, 3, 3, 4, 4]]


@pytest.mark.parametrize(
    ("pieces", "groups", "labels"),
    [
        ("def| get|_|it|(|self|):|\n", "keyword name name name bracket word bracket space", "def|get|_|it|(|self|):|"),
        ("the| cat| the| 12|,| sat", "word word word number punctuation word", "the|cat||12|,|sat"),
        ("x|.|join| Item|Getter|\ufffd", "word punctuation name name name punctuation", "x|.|join|Item|Getter|"),
        ("cl|ass| is| not", "keyword keyword keyword keyword", "cl|ass|is|not"),
    ],
)
def test_groups_and_labels_of_pieces(pieces, groups, labels):
    assert wording.groups(pieces.split("|")) == groups.split() and wording.labels(pieces.split("|")) == labels.split("|")


def test_texts_and_frequencies_are_those_of_the_tokenizer_and_the_training_text(monkeypatch):
    tokenizer = tok.byte_tokenizer()
    texts = wording.texts_of(tokenizer)
    (ids,) = tok.encode(tokenizer, ["f(x)"])
    assert "".join(texts[i] for i in ids) == "f(x)"
    monkeypatch.setattr(wording, "AT_ONCE", 7)
    train = np.random.default_rng(0).integers(0, 9, 100).astype(np.uint16)
    shard = type("Shard", (), {"train": train, "talks": None})
    counted = Counter(train.tolist() * 2)
    assert wording.frequencies(type("Corpus", (), {"shards": [shard, shard]}), 10).tolist() == [counted[i] for i in range(10)]


def test_the_passage_shown_is_code_where_there_is_some_and_of_one_document():
    texts = ["<end>", " the", " a", "def", " f", "(", "x", ")", ":", " return", " y", "_", "z", "\n"]
    code, prose = list(range(3, 13)) * 2, [1, 2] * 20
    tokens = np.array([prose[:24] + code[:16], [*prose[:10], 0, *prose[:29]]])
    assert wording.passage(tokens, texts, 0, 8) in [(0, 24), (0, 28), (0, 32)]


# -- inside a model --------------------------------------------------------------------------------------------------------------------


def trained_like(cfg, seed: int = 0) -> dict:
    """Initial weights, with radii that differ, and mixers that matter."""
    params = model.init(cfg, seed)
    for block in params["blocks"]:
        block["mixer.qkv"] *= 30
        block["mixer.out"] *= 30
    for layer in cfg.hyperbolic_layers:
        params["blocks"][layer]["mixer.radius.weight"] = normal(2 * cfg.n_heads, cfg.d_model, seed=layer, dtype=torch.float32) / 3
    return params


def windows(n: int = 24, w: int = 3, vocabulary: int = TINY.vocab_size):
    batch = next_tokens(torch.randint(vocabulary, (w, n + 1), generator=generator()))
    batch.targets[0, 3] = IGNORE
    return batch


def test_a_pass_tells_nats_entropies_and_radii(cfg, monkeypatch):
    monkeypatch.setattr(inside, "TOKENS", 48)  # two passes
    monkeypatch.setattr(inside, "LOGITS", 1000)
    params, batch = trained_like(cfg), windows()
    seen = inside.observe(params, batch, cfg)
    log_p = F.log_softmax(model.apply(params, batch.tokens, cfg), -1)
    nats = F.nll_loss(log_p.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none").view(3, 24)
    torch.testing.assert_close(seen.nats, nats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.entropies, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)
    for layer, own in zip(cfg.hyperbolic_layers, model.radii(params, batch.tokens, cfg), strict=True):
        torch.testing.assert_close(seen.lengths[layer].transpose(0, 1), torch.cat([own["q"], own["k"]], 1))
        assert (seen.rates[layer] is not None) == (cfg.layer_kind(layer) == "phase8")


def test_norms_of_the_twin_are_those_before_it_normalises():
    cfg = replace(CASES["softmax"], n_layers=1)
    params, batch = model.init(cfg, 0), windows()
    block, tail = params["blocks"][0], torch.zeros(3, 3, 3 * cfg.d_model)
    x = F.linear(F.embedding(batch.tokens, params["embed"]["low"]), params["embed"]["high"])
    qkv = F.linear(F.rms_norm(x, x.shape[-1:], block["mixer_norm.weight"], 1e-6), block["mixer.qkv"])
    padded = torch.cat([tail, qkv], 1)
    y = F.silu(sum(padded[:, i : i + 24] * block["mixer.conv"][i] for i in range(4)))
    keys = y[..., cfg.d_model : 2 * cfg.d_model].unflatten(-1, (cfg.n_heads, -1)).norm(dim=-1)
    torch.testing.assert_close(inside.observe(params, batch, cfg).lengths[0][cfg.n_heads :], keys.permute(2, 0, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["logcosh", "distance", "cosine", "bias", "gain", "first-order"])
def test_scores_are_those_of_phase7(score):
    """Attention by them, on the points of the model, is what the model's own gives; up to what a softmax ignores."""
    cfg = replace(CASES["phase7"], score=score)
    params, tokens, found, given = trained_like(cfg), windows().tokens, {}, {}
    inside.polar(params, tokens, cfg, "torch", lambda layer, at: found.setdefault(layer, at))

    def watch(layer, ops, _):
        def attention(*args):
            given[layer] = ops[name](*args)
            return given[layer]

        name = "hyperbolic_attention" if "hyperbolic_attention" in ops else "softmax_attention"

        def points(x, weight, *rest):
            values[layer] = ops["hyperbolic_points"](x, weight, *rest)[4]
            return ops["hyperbolic_points"](x, weight, *rest)

        return {name: attention, "hyperbolic_points": points}

    values = {}
    model.hidden(params, tokens, cfg, run=inside.changed(watch))
    for layer in range(cfg.n_layers):
        scores, cosine, past = inside.scores(found[layer], torch.arange(24), score)
        o = (scores.masked_fill(~past, -torch.inf).softmax(-1) @ values[layer].double()).float()
        torch.testing.assert_close(o, given[layer][..., : o.shape[-1]], rtol=1e-4, atol=1e-5)
        assert cosine.abs().max() < 1 + 1e-5


def test_scores_of_phase8_are_logarithms_of_its_kernel():
    cfg = CASES["phase8"]
    params, tokens, found, features = trained_like(cfg), windows().tokens, {}, {}
    inside.polar(params, tokens, cfg, "torch", lambda layer, at: found.setdefault(layer, at))

    def watch(layer, ops, _):
        return {"linear_attention": lambda q, k, *rest: (features.setdefault(layer, (q, k)), ops["linear_attention"](q, k, *rest))[1]}

    model.hidden(params, tokens, cfg, run=inside.changed(watch))
    for layer, (q, k) in features.items():
        scores, _, _ = inside.scores(found[layer], torch.arange(24), "tangent")
        torch.testing.assert_close(scores.float(), torch.log(q @ k.mT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["phase7", "phase8", "hybrid", "hybrid-ssm"])
def test_radii_that_replace_others_are_used(kind):
    """The mean for a head's keys is what a model gives whose radii do not depend on the token."""
    cfg, batch = CASES[kind], windows()
    params = trained_like(cfg)
    h = cfg.n_heads
    means = [0.5 + 0.1 * torch.arange(2 * h) for _ in range(cfg.n_layers)]
    constant = [mean[:, None, None].expand(2 * h, 3, 24) for mean in means]
    found = inside.with_radii(params, batch, cfg, "torch", constant, slice(h, 2 * h))
    for layer in range(cfg.n_layers):
        share = (means[layer][h:] - R_MIN) / (R_MAX - R_MIN)
        params["blocks"][layer]["mixer.radius.weight"][h:] = 0
        params["blocks"][layer]["mixer.radius.bias"][h:] = torch.log(share / (1 - share))
    torch.testing.assert_close(found, inside.observe(params, batch, cfg).nats, rtol=1e-4, atol=1e-5)


def text_of(batch) -> radii.Text:
    frequency = torch.arange(TINY.vocab_size)[batch.tokens] ** 2
    depth = batch.tokens % 3
    return radii.Text(
        batch, batch.targets != IGNORE, frequency, depth, depth >= 0, [f"w{i}" for i in range(TINY.vocab_size)], 0, torch.arange(len(depth))
    )


@pytest.mark.parametrize("kind", ["phase7", "phase8", "hybrid"])
def test_radii_that_are_all_equal_cost_nothing_whatever_replaces_them(kind):
    cfg, batch = CASES[kind], windows()
    params = model.init(cfg, 0)
    seen = inside.observe(params, batch, cfg)
    rows = radii.ablation_rows(params, seen, text_of(batch), Config(model=cfg))
    assert len(rows) == 7 and all(row["nats lost"] == 0 for row in rows)
    assert rows[0]["validation loss before"] == pytest.approx(float(seen.nats.sum()) / 71, rel=1e-5)


@pytest.mark.parametrize(("score", "least", "most"), [("cosine", 0, 1e-5), ("logcosh", 1e-4, 1)])
def test_radii_of_a_model_of_angles_alone_cost_nothing(score, least, most):
    cfg, batch = replace(CASES["phase7"], score=score), windows()
    params = trained_like(cfg)
    seen = inside.observe(params, batch, cfg)
    rows = radii.ablation_rows(params, seen, text_of(batch), Config(model=cfg))
    assert rows[0]["nats lost"] == 0
    assert least <= max(abs(row["nats lost"]) for row in rows) <= most


def test_radii_of_equal_frequency_change_places():
    lengths = normal(4, 3, 50, dtype=torch.float32)
    frequency = torch.randint(40, (3, 50), generator=generator())
    counted = torch.rand(3, 50, generator=generator(1)) < 0.9
    found = radii.of_equal_frequency(lengths, frequency, counted, 0)
    kind = torch.tensor([int(math.log2(1 + f)) for f in frequency.flatten().tolist()]).view(3, 50)
    kind[~counted] = -1
    for k in kind.unique():
        assert torch.equal(found[:, kind == k].sort(-1).values, lengths[:, kind == k].sort(-1).values)
    assert (found != lengths).float().mean() > 0.7 and not torch.equal(found[0].argsort(), found[1].argsort())


def test_points_of_the_disk_keep_their_distances_from_the_origin():
    u, r = geometry.direction(normal(40, 16)), 4 * torch.rand(40, generator=generator(), dtype=torch.float64)
    u[:, 2:] *= 0.1  # most of it in a plane
    at, kept = radii.projected(u, r)
    t, s = geometry.lift(F.normalize(at, dim=-1), r)
    torch.testing.assert_close(at, geometry.to_poincare(t, s))
    assert kept > 0.8


def test_radii_of_a_model_not_trained_are_drawn_where_they_would_be_equal(cfg):
    batch = windows()
    for drawn in (False, True):
        params = scoring.untrained(Config(cfg), CPU)
        seen = inside.observe(radii.with_drawn_radii(params, cfg) if drawn else params, batch, cfg)
        for layer in cfg.hyperbolic_layers:
            assert (float(seen.lengths[layer].flatten(1).std(-1).min()) > 0.1) == drawn


def test_planted_correlations_are_found_in_their_head_beside_their_nulls():
    """A key's radius that is the rank of frequency, and one that is depth with frequency mixed in."""
    cfg, batch = replace(CASES["phase7"], n_layers=1), windows(50, 8)
    h = cfg.n_heads
    text = text_of(batch)
    lengths = torch.rand(2 * h, 8, 50, generator=generator())
    lengths[h + 1] = 4 - text.frequency / text.frequency.max()
    lengths[1] = text.depth + 0.01 * text.frequency
    rows = radii.correlation_rows(
        lengths, torch.ones_like(lengths), radii.quantities(text, torch.rand(8, 50, generator=generator(1))), 0, cfg
    )
    rho = {(row["of"], row["head"], row["with"]): row for row in rows}
    planted = rho["key radius", 1, "log frequency"]
    assert planted["rho"] == pytest.approx(-1) and planted["high"] < -0.99 and planted["shifted"] < 0.3 and math.isnan(planted["untrained"])
    assert rho["query radius", 1, "depth, partial"]["rho"] > 0.5 > rho["query radius", 1, "bracket depth"]["rho"]
    summary, layers = radii.correlation_summary(rows)
    (best,) = [row for row in summary if (row["of"], row["with"]) == ("key radius", "log frequency")]
    assert (
        best["which head"] == "layer 0, head 1" and best["strongest head [95 %]"].startswith("-1.00 [") and len(layers) == len(summary) == 8
    )


def test_what_is_alike_over_long_stretches_is_in_the_null():
    """Radii and depth that differ from one half of the text to the other, and from token to token have nothing in common."""
    cfg, batch = replace(CASES["phase7"], n_layers=1), windows(50, 8)
    half = (torch.arange(8) < 4)[:, None]
    text = text_of(batch)._replace(depth=torch.where(half, 0, 9) + torch.randint(3, (8, 50), generator=generator(2)))
    lengths = torch.where(half, 1.0, 2.0) + torch.rand(2 * cfg.n_heads, 8, 50, generator=generator())
    rows = radii.correlation_rows(lengths, torch.ones_like(lengths), radii.quantities(text, torch.rand(8, 50)), 0, cfg)
    assert all(row["rho"] > 0.7 and row["shifted"] > 0.7 * row["rho"] for row in rows if row["with"] == "bracket depth")


def test_scores_and_the_disk_are_those_of_all_sources_and_not_of_the_first(monkeypatch):
    """A text of three sources with tokens of their own: below 20, below 40, above."""
    cfg, seen, polar = replace(CASES["phase7"], n_layers=1), [], inside.polar
    tokens = torch.randint(1, 20, (3, 40, 8), generator=generator()) + 20 * torch.arange(3)[:, None, None]
    text = text_of(next_tokens(tokens.flatten(0, 1)))
    monkeypatch.setattr(inside, "polar", lambda params, read, *rest, **named: (seen.append(read), polar(params, read, *rest, **named))[1])
    radii.share_rows(trained_like(cfg), model.init(cfg, 0), text, Config(cfg, DataConfig(seq_len=7)))
    assert [len(read) for read in seen] == [radii.SEQUENCES] * 2
    assert all(torch.bincount(read[:, 0] // 20).tolist() == [5, 6, 5] for read in seen)
    searched = []
    monkeypatch.setattr(wording, "passage", lambda ids, *rest: (searched.append(ids), (50, 0))[1])
    params = trained_like(cfg)
    radii.disk_rows(params, inside.observe(params, text.batch, cfg), text, Config(cfg))
    assert len(searched[0]) == radii.SEARCHED and searched[0][0, 0] < 20 and searched[0][-1, 0] > 40
    assert seen[-1].tolist() == searched[0][50:51].tolist()


# -- the suite -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(made, monkeypatch) -> dict[str, Path]:
    """Runs of two steps, with a text that is in the cache."""
    flags = {"hybrid": ("--model.kind", "phase8", "--model.exact-every", "2"), "softmax": ("--model.kind", "softmax")}
    folders = {label: made("--train.steps", "2", *own) for label, own in flags.items()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["hybrid"] / "cache"))
    return {label: folder / "runs/r" for label, folder in folders.items()}


def test_runs_of_any_kind_are_looked_into_and_one_that_fails_is_a_row(models, monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 20)
    suite.check(models, 300)
    load = trained.load_model

    def fails(path, *rest):
        if "broken" in str(path):
            raise RuntimeError("no such luck")
        return load(path, *rest)

    monkeypatch.setattr(trained, "load_model", fails)
    *_, found = suite.run({**models, "broken": Path("broken")}, [CPU], tokens=300)
    tables = {table.name: table for table in found.tables}
    assert {name for name, table in tables.items() if table.shown} == set(suite.CAPTIONS)
    for name in suite.CAPTIONS:
        rows = tables[name].rows
        assert rows[-1] == {"model": "broken", "failed": "RuntimeError: no such luck"}
    for name, column in {"radii": "mixer", "variance of scores": "mixer", "ablations": "radii of"}.items():
        assert [row[column] for row in tables[name].rows if row["model"] == "softmax"] == [radii.NO_RADII]
    assert [(row["mixer"], row["layer"]) for row in tables["radii"].rows if row["model"] == "hybrid"] == [("phase8", 0), ("phase7", 1)]
    assert {row["of"] for row in tables["correlations"].rows if row["model"] == "softmax"} == {"query norm", "key norm"}
    assert tables["ablations"].rows[0]["nats lost"] == 0 and len([row for row in tables["ablations"].rows if row["model"] == "hybrid"]) == 7
    assert all(math.hypot(row["x"], row["y"]) < 1 for row in tables["disk"].rows) and any(row["label"] for row in tables["disk"].rows)
    columns = {name: set().union(*table.rows) for name, table in tables.items()}
    for figure in found.figures:
        wanted = [getattr(figure, name, "") for name in ("x", "y", "value", "over", "group", "panels")]
        assert {*wanted, *getattr(figure, "series", ())} - {""} <= columns[figure.table]
    assert any("which should be 0" in note for note in found.notes) and not any("no softmax" in note for note in found.notes)


@pytest.mark.parametrize(
    ("lost", "error", "said"),
    [
        (0.05, 0.01, "by noise, +0.0500 ± 0.0100 nats"),
        (-0.01, 0.01, "by noise, -0.0100 ± 0.0100 nats (nothing, within two standard errors)"),
        (0.05, math.nan, "by noise, +0.0500 nats (of one document, without an error)"),
    ],
)
def test_a_loss_is_told_for_what_it_is_worth(lost, error, said):
    assert suite.verdict([{"radii of": "both", "replaced by": "noise", "nats lost": lost, "± standard error": error}]) == said


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda run: 0, ConfigError, "needs at least 1"),
        (lambda run: (run / "config.json").unlink(), runs.RunError, "config.json"),
        (lambda run: (run / "tokenizer.json").unlink(), runs.RunError, "tokenizer.json is missing"),
    ],
)
def test_what_cannot_be_read_is_found_before_anything_is_measured(spoil, error, message, models, tmp_path):
    shutil.copytree(models["softmax"], tmp_path / "runs/copy")
    tokens = 0 if spoil(tmp_path / "runs/copy") == 0 else 100
    with pytest.raises(error, match=message):
        suite.check({"copy": tmp_path / "runs/copy"}, tokens)
