"""The losses of each preset's first steps, written down: what changes them changes every result that was measured before."""

from dataclasses import replace

import pytest
import torch

from configs import PRESETS
from hyperlm import residence
from hyperlm.batch import next_tokens
from hyperlm.config import Config, resolve
from hyperlm.optim import new_schedule
from hyperlm.step import init_state, make_step

CPU = torch.device("cpu")
GOLDEN = {
    "small": (8.39122, 8.31071),
    "small, as a toy": (6.39738, 6.22760, 6.24415, 6.24606, 6.38968, 6.19221),
    "standard, as a toy": (6.39738, 6.22760, 6.24415, 6.24606, 6.38968, 6.19221),
    "max, as a toy": (6.39738, 6.22760, 6.24415, 6.24606, 6.38968, 6.19221),
    "max-ssm, as a toy": (6.39896, 6.22655, 6.24818, 6.26617, 6.38726, 6.19572),
    "study, as a toy": (6.39738, 6.22768, 6.24703, 6.23756, 6.42917, 6.17362),
    "glance, as a toy": (6.39738, 6.22760, 6.24415, 6.24606, 6.38968, 6.19221),
    "phase7, as a toy": (6.39739, 6.22783, 6.24379, 6.24518, 6.38845, 6.18809),
    "softmax, as a toy": (6.39741, 6.22791, 6.24342, 6.25971, 6.38728, 6.18840),
    "hybrid, as a toy": (6.39725, 6.22772, 6.24384, 6.24592, 6.39062, 6.18983),
}


def toy(config: Config) -> Config:
    """The same in all but size: d 64, three layers, 2 x 2 x 48 tokens a step."""
    return replace(
        config,
        model=replace(config.model, d_model=64, n_layers=3, head_dim=32, vocab_size=512),
        data=replace(config.data, seq_len=48),
        train=replace(config.train, batch_size=2, grad_accum=2),
    )


CONFIGS = {"small": PRESETS["small"]()} | {f"{name}, as a toy": toy(preset()) for name, preset in PRESETS.items()}
for kind in ("phase7", "softmax"):
    CONFIGS[f"{kind}, as a toy"] = toy(replace(Config(), model=replace(Config().model, kind=kind)))
CONFIGS["hybrid, as a toy"] = toy(replace(Config(), model=replace(Config().model, exact_every=2)))


def first_losses(config: Config, steps: int) -> list[float]:
    """On text that repeats itself, in fp32, after a warm-up of four steps."""
    config = resolve(replace(config, optim=replace(config.optim, state="fp32"), train=replace(config.train, residence="device")))
    at = residence.make(config, CPU)
    state, step = init_state(at), make_step(at, new_schedule(config.optim, 8))
    shape, losses = (config.train.grad_accum, config.train.batch_size, config.data.seq_len + 1), []
    for seed in range(steps):
        words = torch.randint(config.model.vocab_size, (17,), generator=torch.Generator().manual_seed(seed))
        start = torch.randint(17, shape[:2], generator=torch.Generator().manual_seed(seed))
        state, metrics = step(state, next_tokens(words[(start[..., None] + torch.arange(shape[2])) % 17]))
        losses.append(metrics["loss"].item())
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_first_losses(name):
    assert first_losses(CONFIGS[name], len(GOLDEN[name])) == pytest.approx(GOLDEN[name], rel=1e-4)
