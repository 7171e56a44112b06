"""Suite `quality`: validation loss, perplexity and bits per byte of trained runs, on their own validation text."""

from dataclasses import replace
from pathlib import Path

import torch

from hyperlm import checkpoint, data, env, evals, plan, runs, trained
from hyperlm.bench.report import Result


def run(folders: list[Path], device: torch.device, kernels: str) -> Result:
    """Evaluate the newest checkpoint of each run on all of its validation documents."""
    rows = []
    for folder in env.progress(folders, "quality"):
        config = runs.read_config(folder)
        config = replace(config, kernels=kernels, eval=replace(config.eval, max_tokens=0))
        found = trained.load(folder, checkpoint.latest(folder), config, device)
        corpus = data.prepare(config, say=lambda line: None)
        if found.meta["fingerprint"] != corpus.fingerprint:
            raise data.DataError(f"the text of {', '.join(config.data.sources)} changed since {folder} was trained: its validation text is gone")
        row = {"run": folder.name, "model": config.model.kind, "parameters": sum(plan.parameters(config).values()), "step": found.step, "tokens": found.tokens}
        rows.append(row | evals.evaluate(found.weights, corpus, config, device))
    return Result("quality", rows)
