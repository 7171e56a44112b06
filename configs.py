"""Presets: functions that return a whole `Config`, the settings that the command line starts from. Add your own, and name it in PRESETS.

What each setting means is in hyperlm/config.py.
"""

from collections.abc import Callable
from dataclasses import replace

from hyperlm.config import CkptConfig, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig


def small() -> Config:
    """A whole run in about a minute and a half on two CPU cores: 1.5 MiB of the standard library, one epoch, 2.9 M parameters."""
    return Config(
        model=ModelConfig(d_model=256, n_layers=4, vocab_size=4096),
        data=DataConfig(max_mib=1.5, seq_len=256),
        train=TrainConfig(batch_size=8, grad_accum=1, epochs=1.0),
        ckpt=CkptConfig(every=100),
        eval=EvalConfig(every=100, max_tokens=32768),
    )


def standard() -> Config:
    """A real first model: d 512, 12 layers."""
    return Config()


def max() -> Config:
    """The model for an 8 GB card: 3.1 billion parameters, d 4096, 32 layers.

    `python train.py --preset max` trains it from 45 GiB of host memory, or with 8-bit state from 18. With `--optim.state int8` and
    `--train.device-memory 5.81`, 200 steps (1.6 M tokens, 16 x 512 a step, a rate of 2e-4 after 20 steps of warm-up) took 3:01 minutes on an H100,
    compiling kernels included, and ended at 4.51 nats a token of validation; fp32 on the device at 4.52.
    """
    return replace(
        standard(),
        model=ModelConfig(d_model=4096, n_layers=32),
        train=TrainConfig(batch_size=1, grad_accum=16),
    )


def max_ssm() -> Config:
    """`max` with the tangent-space recurrence as an extra branch (experimental)."""
    config = max()
    return replace(config, model=replace(config.model, ssm=True))


PRESETS: dict[str, Callable[[], Config]] = {"small": small, "standard": standard, "max": max, "max-ssm": max_ssm}
