"""Kinds and peers trained side by side: what a number rests on, which rate is chosen, what is kept; the peers themselves."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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


# -- peers -----------------------------------------------------------------------------------------------------------------------------

STANDARD = resolve(Config(model=ModelConfig(vocab_size=8192), data=DataConfig(seq_len=1024)))


def test_the_gpt_has_the_parameters_of_the_models_it_stands_beside():
    """6 layers of 512 with a tied head: embedding and positions, six blocks of 12 D^2 and two norms, one norm at the end."""
    s = gpt.shape(STANDARD)
    assert (s.width, s.layers, s.heads) == (512, 6, 8)
    assert s.parameters == 8192 * 512 + 1024 * 512 + 6 * (12 * 512 * 512 + 2 * 512) + 512 == 23_599_616
    small = replace(s, layers=2, vocabulary=100, length=16)
    assert small.parameters == sum(p.numel() for p in gpt.GPT(small, 0, CPU).parameters())


def sequences(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(320, shape, generator=torch.Generator().manual_seed(seed))


def test_the_gpt_reads_what_came_before_and_guesses_at_first(prose):
    config = tiny(prose)
    model = gpt.GPT(gpt.shape(config), 0, CPU)
    tokens, targets = sequences(4, 32, seed=1), sequences(4, 32, seed=2)
    nats = gpt.token_nats(model, tokens, targets)
    assert nats.mean() == pytest.approx(math.log(320), abs=0.05)
    changed = torch.cat([tokens[:, :20], tokens[:, 20:].flip(1)], 1)
    later = gpt.token_nats(model, changed, targets)
    assert torch.equal(nats[:, :20], later[:, :20]) and not torch.equal(nats[:, 20:], later[:, 20:])
    logits = (model(tokens) @ model.embedding.mT).double()
    assert torch.allclose(nats.double(), -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], atol=1e-5)
    ignored = targets.clone()
    ignored[:, 3] = training.IGNORE
    assert torch.equal(gpt.token_nats(model, tokens, ignored), torch.where(ignored == training.IGNORE, 0, nats))


@pytest.mark.parametrize("label", ["nanogpt", "nanogpt-muon"])
def test_peers_learn_by_the_schedule_of_all(label, prose):
    """Better than single tokens, of which the model knows nothing at first; the same every time; one micro-batch of eight learns what two of four do."""
    config = tiny(prose, steps=40)
    config = replace(config, optim=replace(config.optim, lr=4e-3))
    found = train(Job(label, config), CPU)
    assert found.parameters == gpt.shape(config).parameters and found.gib > 0
    assert found.curve[0].val_loss > found.curve[-1].val_loss + 0.3 and found.val["val_loss"] < math.log(320) - 1
    whole = train(Job(label, replace(config, train=replace(config.train, batch_size=8, grad_accum=1))), CPU)
    assert [p.train_loss for p in whole.curve] == pytest.approx([p.train_loss for p in found.curve], abs=2e-3)


def test_peers_are_validated_on_the_text_that_models_are(prose):
    """`validate` on a model's own nats is what `evals.evaluate` says."""
    training_ = hyperlm.prepare(tiny(prose))
    params = hyperlm.model_of(training_, training_.state).params

    def nats(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = hyperlm.api.decoder.apply(params, tokens, training_.config.model).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=training.IGNORE, reduction="none").view(targets.shape)

    found = training.validate(nats, training_.corpus, training_.config, CPU)
    assert found == pytest.approx(evals.evaluate(params, training_.corpus, training_.config, CPU), rel=1e-6)


@pytest.mark.parametrize("label", ["phase8", "nanogpt", "nanogpt-muon"])
def test_a_model_that_diverges_is_an_outcome_without_a_folder(label, prose, tmp_path):
    config = tiny(prose, steps=20)
    config = replace(config, optim=replace(config.optim, lr=1e20, clip=0.0))
    found = train(Job(label, config, tmp_path / "kept"), CPU)
    assert math.isnan(found.val["val_loss"]) and math.isnan(found.curve[-1].val_loss) and not (tmp_path / "kept").exists()
