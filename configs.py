"""Presets: functions that return a whole `Config`, the settings that the command line starts from. Add your own, and name it in PRESETS.

What each setting means is in hyperlm/config.py.
"""

from collections.abc import Callable
from dataclasses import replace

from hyperlm.config import CkptConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def small() -> Config:
    """A first look: 2.9 M parameters, one epoch of 1.5 MiB of the standard library.

    `python train.py --preset small`: 193 steps, 0.40 M tokens of Python 3.11's, in 1:46 minutes and 1.3 GiB on two cores of an AMD EPYC
    server; validation loss 4.735, 2.038 bits per byte.
    """
    return Config(
        model=ModelConfig(d_model=256, n_layers=4, vocab_size=4096),
        data=DataConfig(max_mib=1.5, seq_len=256),
        train=TrainConfig(batch_size=8, grad_accum=1, epochs=1.0),
        ckpt=CkptConfig(every=100),
        eval=EvalConfig(every=100, max_tokens=32768),
    )


def standard() -> Config:
    """A real first model: d 512, 12 layers, 50.6 M parameters, 8 x 4 x 512 tokens a step.

    `python train.py`: 342 steps, four epochs (5.6 M tokens) of Python 3.12's standard library, in 55 s and 2.1 GiB on an H200;
    370,000 tokens/s; validation loss 4.256, 1.506 bits per byte.
    """
    return Config()


def max_3b() -> Config:
    """The model for an 8 GB card: 3.1 billion parameters, d 4096, 32 layers, 16 x 512 tokens a step.

    `python train.py --preset max` trains it from 45 GiB of host memory, or with 8-bit state from 18. With `--optim.state int8
    --train.device-memory 5.81 --train.steps 200` and 23.6 MB of prose it makes 13,800 tokens/s on an H200, and ends at 4.725 nats a token
    of validation; AdamW in fp32, on the device, at 4.734.
    """
    return replace(
        standard(),
        model=ModelConfig(d_model=4096, n_layers=32),
        train=TrainConfig(batch_size=1, grad_accum=16),
    )


def max_ssm() -> Config:
    """`max` with the tangent-space recurrence as an extra branch (experimental)."""
    config = max_3b()
    return replace(config, model=replace(config.model, ssm=True))


def study() -> Config:
    """The size at which kinds are compared: d 512, 8 layers, a vocabulary of 8,192, 17.5 M parameters; 32 x 1,024 tokens a step, 700 steps.

    `python bench.py phase7 phase8 softmax hybrid nanogpt nanogpt-muon --suite quality --data.sources peps.txt rfcs.txt stdlib
    --train.batch-size 32 --train.grad-accum 1`: 43 trainings of 11 to 37 s, in 6:20 minutes on four H100s; validation losses phase7 3.111,
    softmax 3.105, hybrid 3.139, phase8 3.168, nanogpt 3.190 with Muon and 3.770 with AdamW (means of three seeds).
    """
    return Config(
        model=ModelConfig(n_layers=8, vocab_size=8192),
        data=DataConfig(seq_len=1024),
        train=TrainConfig(batch_size=16, grad_accum=2, steps=700),
        optim=OptimConfig(lr=4e-3),  # the best of 0.002, 0.004 and 0.008 for every kind, and every null of Phase 7
        eval=EvalConfig(every=100, max_tokens=500_000),
    )


def glance() -> Config:
    """What suites of bench.py that train do on a CPU: a look at whether all works, at a size at which nothing is learnt
    that matters. 0.7 M parameters."""
    return Config(
        model=ModelConfig(d_model=128, n_layers=4, vocab_size=2048),
        data=DataConfig(max_mib=0.5, seq_len=128),
        train=TrainConfig(batch_size=8, grad_accum=1, steps=60),
        eval=EvalConfig(every=60, max_tokens=4096),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "small": small,
    "standard": standard,
    "max": max_3b,
    "max-ssm": max_ssm,
    "study": study,
    "glance": glance,
}
