"""Suite `quality`: validation loss, perplexity and bits per byte of trained runs, on their own validation text."""

from dataclasses import replace
from pathlib import Path

import torch

from hyperlm import checkpoint, data, env, evals, runs, tree
from hyperlm.bench.report import Result
from hyperlm.precision import compute_copy
from hyperlm.step import place


def run(folders: list[Path], device: torch.device, kernels: str) -> Result:
    """Evaluate the newest checkpoint of each run on all of its validation documents."""
    rows = []
    for folder in env.progress(folders, "quality"):
        config = runs.read_config(folder)
        config = replace(config, kernels=kernels, eval=replace(config.eval, max_tokens=0))
        state, meta = checkpoint.restore(folder, checkpoint.latest(folder), config, place(config, device), with_opt=False)
        corpus = data.prepare(config, say=lambda line: None)
        if meta["fingerprint"] != corpus.fingerprint:
            raise data.DataError(f"the text of {', '.join(config.data.sources)} changed since {folder} was trained: its validation text is gone")
        row = {"run": folder.name, "model": config.model.kind, "parameters": tree.count(state.params), "step": state.step, "tokens": state.tokens}
        rows.append(row | evals.evaluate(compute_copy(state.params, env.compute_dtype(device)), corpus, config, device))
    return Result("quality", rows)
