"""Shared by all suites: small models of every kind, a small corpus, and a private cache and working folder."""

import gc
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and in processes that tests start: tests run side by side

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: Triton kernels then run on a CPU, slowly

from hyperlm.config import ModelConfig
from hyperlm.kernels import HAVE_TRITON, INTERPRETED

if HAVE_TRITON:
    import fast_triton

    (fast_triton.hasten_interpreter if INTERPRETED else fast_triton.compile_once)()

TINY = ModelConfig(d_model=32, n_layers=2, head_dim=8, vocab_size=64)
CASES = {
    "phase7": replace(TINY, kind="phase7"),
    "phase7-distance": replace(TINY, kind="phase7", score="distance"),
    "phase7-first-order": replace(TINY, kind="phase7", score="first-order"),
    "phase8": replace(TINY, kind="phase8"),
    "softmax": replace(TINY, kind="softmax"),
    "hybrid": replace(TINY, kind="phase8", n_layers=3, exact_every=2),
    "phase7-ssm": replace(TINY, kind="phase7", ssm=True),
    "phase8-ssm": replace(TINY, kind="phase8", ssm=True),
    "hybrid-ssm": replace(TINY, kind="phase8", n_layers=3, exact_every=2, ssm=True),
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Modules and tests are not looked through for garbage: runs look at each start, which takes a third of a second with all that is here."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def cfg(request) -> ModelConfig:
    """A model of each kind."""
    return request.param


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    """Runs and caches of a test stay in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_prose(path: Path, words: int = 12000, seed: int = 0) -> Path:
    """Text with some structure, the same every time: sentences over a small vocabulary, in paragraphs."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(300)]
    text, line = [], []
    for i in range(words):
        line.append(vocabulary[min(299, int(rng.expovariate(0.02)))])
        if rng.random() < 0.1:
            text.append(" ".join(line).capitalize() + ("." if i % 3 else ".\n\n"))
            line = []
    path.write_text(" ".join(text))
    return path


@pytest.fixture
def prose(tmp_path) -> Path:
    return write_prose(tmp_path / "prose.txt")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[..., Path]:
    """made(*flags): a folder where train.py has made runs/r of the prose with these flags. Made once, so only to be read, or copied."""
    found: dict[tuple[str, ...], Path] = {}

    def make(*flags: str) -> Path:
        if flags not in found:
            import train
            from hyperlm import cli

            folder = tmp_path_factory.mktemp("made")
            with pytest.MonkeyPatch.context() as within:
                within.chdir(folder)
                within.setenv("XDG_CACHE_HOME", str(folder / "cache"))
                assert (
                    cli.run(train.main, [*SMALLEST, "--data.sources", str(write_prose(folder / "prose.txt")), "--name", "r", *flags]) == 0
                )
            found[flags] = folder
        return found[flags]

    return make


@pytest.fixture
def diverged(monkeypatch) -> None:
    """Weights of every checkpoint that is read are not finite."""
    from hyperlm import checkpoint

    restore = checkpoint.restore

    def nan(*args, **options):
        state, meta = restore(*args, **options)
        state.params["head"]["norm.weight"].fill_(torch.nan)
        return state, meta

    monkeypatch.setattr(checkpoint, "restore", nan)


# A model of a moment, and a whole run of it in a second or two: flags for train.py, with a text of one's own.
SMALLEST_MODEL = "--model.d-model 32 --model.n-layers 2 --model.head-dim 8 --model.vocab-size 320".split()
SMALLEST = [
    *SMALLEST_MODEL,
    *"--data.seq-len 32 --train.batch-size 4 --train.grad-accum 2 --eval.max-tokens 2000 --eval.sample-tokens 8 --log.every 1".split(),
]
