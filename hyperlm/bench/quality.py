"""Suite `quality`: validation loss, perplexity and bits per byte of trained runs, on their own validation text."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hyperlm import checkpoint, data, env, evals, plan, runs, trained
from hyperlm.bench.report import Result, Row
from hyperlm.config import Config


def check(folders: list[Path]) -> None:
    """Raises RunError, CheckpointError or TokenizerError where a run cannot be read, as far as a moment tells."""
    for folder in folders:
        config = runs.read_config(folder)
        trained.load_tokenizer(folder, checkpoint.latest(folder), config)


def text_of(corpus: data.Corpus) -> tuple[str, str]:
    """Fingerprints of the validation text, whatever the tokenizer, and of its tokens."""
    text, tokens = hashlib.blake2b(digest_size=4), hashlib.blake2b(digest_size=4)
    for shard in corpus.shards:
        ends = np.cumsum(shard.val_documents[:, 0])
        documents = [ids.tolist() for ids in np.split(np.asarray(shard.val), ends)]
        for document in corpus.tokenizer.decode_batch(documents, skip_special_tokens=True):
            text.update(document.encode() + b"\0")
        tokens.update(np.asarray(shard.val, np.int64).tobytes())
    return text.hexdigest(), tokens.hexdigest()


def measure(folder: Path, config: Config, device: torch.device) -> tuple[Row, str]:
    """The row of a run, and the fingerprint of its tokens."""
    found = trained.load(folder, checkpoint.latest(folder), config, device)
    corpus = data.prepare(config, say=lambda line: None)
    if found.fingerprint != corpus.fingerprint:
        changed = f"the text of {', '.join(config.data.sources)} changed since {folder} was trained"
        raise data.DataError(f"{changed}: its validation text is gone")
    text, tokens = text_of(corpus)
    row: Row = {"run": str(folder), "model": config.model.kind, "parameters": sum(plan.parameters(config).values())}
    row |= {"step": found.step, "tokens": found.tokens, "validation text": text}
    return row | evals.evaluate(found.weights, corpus, config, device), tokens


def run(folders: list[Path], device: torch.device, kernels: str) -> Iterator[Result]:
    """Evaluate the newest checkpoint of each run on all of its validation documents. Yields what is measured so far."""
    rows: list[Row] = []
    tokenisations: set[str] = set()
    for folder in env.progress(folders, "quality"):
        config = runs.read_config(folder)
        row, tokens = measure(folder, replace(config, kernels=kernels, eval=replace(config.eval, max_tokens=0)), device)
        rows.append(row)
        tokenisations.add(tokens)
        notes = [f"{row['run']}: its loss is not finite: the run diverged" for row in rows if not math.isfinite(row["val_loss"])]
        if len({row["validation text"] for row in rows}) > 1:
            notes.append("runs on different texts: their losses cannot be compared")
        elif len(tokenisations) > 1:
            notes.append("runs on the same text with different tokenizers: of their losses, bits per byte alone can be compared")
        yield Result("quality", list(rows), notes)
