"""What suites that evaluate models have in common: the text; and a model as a function from tokens to nats, checked to look back only."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperlm import checkpoint, data, evals, runs, trained
from hyperlm import model as decoder
from hyperlm.bench import checks
from hyperlm.config import Config, DataConfig
from hyperlm.data.sources import parse_sources
from hyperlm.env import compute_dtype
from hyperlm.trained import Model
from hyperlm.tree import Tree

Scorer = Callable[[Tensor, Tensor], Tensor]  # tokens and targets, (B, N) int64 -> nats of each target, (B, N); 0 where that is loss.IGNORE

AT_ONCE = {"cuda": 1 << 14, "cpu": 1 << 12}  # tokens that are read together, by device


@dataclass(frozen=True)
class Job:
    """A run to evaluate, and on what."""

    label: str
    run: Path
    text: DataConfig | None  # None for its own validation text
    kernels: str


def check(models: Mapping[str, Path], text: DataConfig | None) -> None:
    """Find out early what would be found out late, and tokenise `text` for each run here, not in several processes at once.

    Raises:
        RunError, CheckpointError, TokenizerError: where a run cannot be read.
        DataError: where `text` cannot be.
    """
    if text is not None:
        parse_sources(text.sources)  # a moment, for none at all as well
    for run in models.values():
        config = runs.read_config(run)
        trained.load_tokenizer(run, checkpoint.latest(run), config)
        if text is not None:
            given(config, run, text)


def tokens_at_once(device: torch.device) -> int:
    return AT_ONCE.get(device.type, AT_ONCE["cpu"])


def scorer(model: Model) -> Scorer:
    """A trained model as such a function.

    Raises:
        CheckFailed: if it sees ahead. One that diverged is let pass: its losses tell.
    """

    def score(tokens: Tensor, targets: Tensor) -> Tensor:
        return evals.token_nats(model.params, tokens.to(model.device), targets.to(model.device), model.config)

    some = torch.zeros(1, 2, dtype=torch.int64)
    if torch.isfinite(score(some, some)).all():
        checks.causal(score, model.config.model.vocab_size, model.device, min(checks.LENGTH, model.config.data.seq_len), checks.TRAINED)
    return score


def text_for(model: Model, run: Path, text: DataConfig | None) -> data.Corpus:
    """What a model is evaluated on: all of `text`, in tokens of its own; without that the validation text of its run.

    Raises:
        DataError: if that changed since, or has nothing to evaluate on.
    """
    config = model.config
    if text is not None:
        return given(config, run, text)
    return own_text(run, config, model.step)


def own_text(run: Path, config: Config, step: int) -> data.Corpus:
    """The text that a run was trained and validated on.

    Raises:
        DataError: if that changed since.
    """
    corpus = data.prepare(config, say=lambda line: None)
    if checkpoint.read_meta(run, step)["fingerprint"] != corpus.fingerprint:
        changed = f"the text of {', '.join(config.data.sources)} changed since {run} was trained: its validation text is gone"
        raise data.DataError(f"{changed}; restore it, or name another by --data.sources, which geometry cannot use")
    return corpus


def untrained(config: Config, device: torch.device) -> Tree:
    """The weights that a run had before training, as `Model.params` has them."""
    dtype = compute_dtype(device)
    return decoder.init(config.model, config.train.seed, device=device, keep=lambda p: p.to(dtype) if p.dim() > 1 else p)


def given(config: Config, run: Path, text: DataConfig) -> data.Corpus:
    """All of a text, to be evaluated on, in tokens of a run."""
    data_config = replace(text, sources=(), val_sources=text.sources, tokenizer=str(run / "tokenizer.json"))
    try:
        return data.prepare(replace(config, data=data_config), say=lambda line: None)
    except data.DataError as e:
        raise data.DataError(str(e).replace("--data.val-sources", "--data.sources")) from e  # as it was asked for


def fingerprints(corpus: data.Corpus) -> tuple[str, str]:
    """Of the text that is evaluated on, whatever the tokenizer, and of its tokens."""
    text, tokens = hashlib.blake2b(digest_size=4), hashlib.blake2b(digest_size=4)
    for shard in corpus.shards:
        ends = np.cumsum(shard.val_documents[:, 0])
        documents = [ids.tolist() for ids in np.split(np.asarray(shard.val), ends)]
        for document in corpus.tokenizer.decode_batch(documents, skip_special_tokens=True):
            text.update(document.encode() + b"\0")
        tokens.update(np.asarray(shard.val, np.int64).tobytes())
    return text.hexdigest(), tokens.hexdigest()


def comparable(texts: Iterable[tuple[str, str]]) -> list[str]:
    """What must be said of models that were evaluated on these, as `fingerprints` gives them."""
    texts = list(texts)
    if len({text for text, _ in texts}) > 1:
        return ["models were evaluated on different texts (column `text`): their losses cannot be compared"]
    if len({tokens for _, tokens in texts}) > 1:
        return ["models have different tokenizers: of their losses on this text, bits per byte alone can be compared"]
    return []
