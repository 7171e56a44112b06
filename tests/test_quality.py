"""Kinds and peers trained side by side: what a number rests on, which rate is chosen, what is kept; the peers themselves."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_prose

import hyperlm
from hyperlm import evals
from hyperlm.bench import training
from hyperlm.bench.arms import of_kind
from hyperlm.bench.peers import gpt
from hyperlm.bench.training import Job, train
from hyperlm.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig, resolve

CPU = torch.device("cpu")


def tiny(text: Path, **train: object) -> Config:
    return resolve(
        Config(
            model=ModelConfig(d_model=32, n_layers=2, head_dim=8, vocab_size=320),
            data=DataConfig(sources=(str(text),), seq_len=32),
            train=TrainConfig(**{"batch_size": 4, "grad_accum": 2, "steps": 12, "device": "cpu"} | train),
            eval=EvalConfig(max_tokens=2000),
        )
    )


@pytest.mark.parametrize("label", ["phase7", "hybrid"])
def test_a_model_is_what_the_same_configuration_gives_by_hand_and_its_folder_is_a_run(label, prose, tmp_path):
    config = of_kind(tiny(prose), label)
    found = train(Job(label, config, tmp_path / "kept"), CPU)

    training = hyperlm.prepare(config)
    state, losses = training.state, []
    for i in range(12):
        state, metrics = training.step(state, training.batch(i))
        losses.append(float(metrics["loss"]))
    assert found.val == evals.evaluate(hyperlm.model_of(training, state).params, training.corpus, config, CPU)
    assert [(p.step, p.tokens) for p in found.curve] == [(s, s * 256) for s in (2, 3, 4, 5, 6, 8, 9, 10, 11, 12)]
    assert found.curve[0].train_loss == pytest.approx(sum(losses[:2]) / 2) and found.curve[-1].val_loss == found.val["val_loss"]
    assert found.tokens_per_second == pytest.approx(11 * 256 / found.curve[-1].seconds) and found.gib > 0

    kept = hyperlm.load(tmp_path / "kept", device="cpu")
    assert kept.config.model == config.model and kept.step == 12
    assert evals.evaluate(kept.params, training.corpus, config, CPU) == found.val
