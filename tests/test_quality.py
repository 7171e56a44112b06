"""Kinds and peers trained side by side: what a number rests on, which rate is chosen, what is kept; the peers themselves."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_prose

import hyperlm
from hyperlm import evals, kernels
from hyperlm.bench import checks, grid, quality, training
from hyperlm.bench.arms import of_kind
from hyperlm.bench.checks import CheckFailed
from hyperlm.bench.peers import gpt
from hyperlm.bench.pool import Failure
from hyperlm.bench.training import Job, Outcome, Point, train
from hyperlm.config import Config, ConfigError, DataConfig, EvalConfig, ModelConfig, TrainConfig, resolve
from hyperlm.kernels import OPS
from hyperlm.optim import new_schedule

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


@pytest.mark.parametrize(("label", "every"), [("phase7", 0), ("hybrid", 2)])
def test_a_model_is_what_the_same_configuration_gives_by_hand_and_its_folder_is_a_run(label, every, prose, tmp_path):
    config = tiny(prose)
    config = of_kind(replace(config, model=replace(config.model, exact_every=every)), label)
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


def test_the_gpt_takes_the_steps_that_a_plain_loop_of_adamw_does(prose):
    """Two micro-batches as one, norm clipped to 1, decay of matrices alone, warm-up of six of twelve steps."""
    config = tiny(prose)
    batch = hyperlm.prepare(config).batch
    model, twin = (gpt.GPT(gpt.shape(config), 0, CPU) for _ in range(2))
    step = gpt.make_step(model, config, new_schedule(config.optim, 12), CPU, muon=False)
    groups = [{"params": [p for p in twin.parameters() if (p.dim() > 1) == wide], "weight_decay": 0.1 * wide} for wide in (True, False)]
    rule = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    for i in range(3):
        step(batch(i))
        logits = F.linear(twin(batch(i).tokens.flatten(0, 1)), twin.embedding)
        F.cross_entropy(logits.flatten(0, 1), batch(i).targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in rule.param_groups:
            group["lr"] = config.optim.lr * (i + 1) / 6
        rule.step()
        rule.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest(prose):
    config = tiny(prose)
    model = gpt.GPT(gpt.shape(config), 0, CPU)
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = gpt.optimizers(model, config, muon=True)
    by_muon = {names[p].split(".", 2)[2] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {"q", "k", "v", "out", "up", "down"}
    matrices, vectors = ({names[p] for p in group["params"]} for group in adamw.param_groups)
    assert matrices == {"embedding", "positions"} and all("norm" in name for name in vectors)
    assert [group["weight_decay"] for group in (*muon.param_groups, *adamw.param_groups)] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize("label", ["nanogpt", "nanogpt-muon"])
def test_peers_learn_by_the_schedule_of_all(label, prose):
    """By far more than a nat below guessing; and one micro-batch of eight learns what two of four do."""
    config = tiny(prose, steps=40)
    config = replace(config, optim=replace(config.optim, lr=4e-3))
    found = train(Job(label, config), CPU)
    assert found.parameters == gpt.shape(config).parameters and found.gib > 0
    assert found.curve[0].val_loss > found.curve[-1].val_loss + 0.3 and found.val["val_loss"] < math.log(320) - 1
    whole = train(Job(label, replace(config, train=replace(config.train, batch_size=8, grad_accum=1))), CPU)
    assert [p.train_loss for p in whole.curve] == pytest.approx([p.train_loss for p in found.curve], abs=2e-3)


def test_peers_are_validated_on_the_text_that_models_are(prose):
    """What knows nothing says log V a token of it; of a text of two sources it says so for each."""
    other = write_prose(prose.with_name("other.txt"), seed=1)
    config = tiny(prose)
    config = replace(config, data=replace(config.data, sources=(str(prose), str(other))))
    corpus = hyperlm.data.prepare(config, say=lambda line: None)

    def guess(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.where(targets == training.IGNORE, 0.0, math.log(320))

    found = evals.validate(guess, corpus, config, CPU, 4)
    outcome = train(Job("nanogpt", config), CPU)
    assert found["val_loss"] == pytest.approx(math.log(320)) and {"val_bpb/prose.txt", "val_bpb/other.txt"} < set(found)
    assert set(outcome.val) == set(found) and outcome.val["val_documents"] == found["val_documents"]


@pytest.mark.parametrize("label", ["phase8", "nanogpt", "nanogpt-muon"])
def test_a_model_that_diverges_is_an_outcome_without_a_folder(label, prose, tmp_path):
    config = tiny(prose, steps=20)
    config = replace(config, optim=replace(config.optim, lr=1e20, clip=0.0))
    found = train(Job(label, config, tmp_path / "kept"), CPU)
    assert math.isnan(found.val["val_loss"]) and math.isnan(found.curve[-1].val_loss) and not (tmp_path / "kept").exists()


# -- the suite -------------------------------------------------------------------------------------------------------------------------


def outcome(loss: float, seconds: float = 10.0, tokens: int = 100) -> Outcome:
    """Of a curve that is a straight line from 6 nats at half of the time."""
    points = [Point(1, tokens // 2, seconds / 2, 6.0, 6.0), Point(2, tokens, seconds, loss, loss)]
    return Outcome(7, {"val_loss": loss, "val_bpb": loss / 2}, points, tokens / seconds, 1.0)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, [0.5, 1, 2]),  # inside
        (4.0, [0.5, 1, 2, 4, 8]),  # one beyond the best
        (0.25, [0.5, 1, 2, 0.25, 0.125]),
        (1e9, [0.5, 1, 2, 4, 8, 16]),  # three times, and no further
        (None, [0.5, 1, 2]),  # nothing works anywhere
    ],
)
def test_the_grid_goes_on_where_the_best_rate_is_at_its_edge(best, tried):
    """Then come the other seeds, at the best two."""
    trials: list[grid.Trial] = []
    while asked := grid.wanted(trials, [0.5, 1, 2], [0, 1, 2]):
        for rate, seed in asked:
            found = Failure("no") if best is None else outcome(math.nan if rate > 2 * best else 3 + abs(math.log2(rate / best)))
            trials.append(grid.Trial(rate, seed, found))
    assert [trial.rate for trial in trials if trial.seed == 0] == tried
    best_two = sorted(tried, key=lambda rate: (rate > 2 * best, abs(math.log2(rate / best))))[:2] if best else []
    others = [(trial.rate, trial.seed) for trial in trials if trial.seed != 0]
    assert others == [(rate, seed) for rate in best_two for seed in (1, 2)]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({1: [3.0], 2: [3.1]}, 1),
        ({1: [3.0, 3.3, 3.3], 2: [3.1, 3.1, 3.1]}, 2),  # lucky with one seed
        ({1: [3.0, 3.0, math.nan], 2: [3.1, 3.1, 3.1]}, 2),  # diverges with one
        ({1: [3.0, 3.2], 2: [3.1]}, 1),  # on the way
        ({1: [math.nan]}, None),
    ],
)
def test_the_mean_of_all_seeds_decides_among_rates(losses, best):
    trials = [grid.Trial(rate, seed, outcome(loss)) for rate, own in losses.items() for seed, loss in enumerate(own)]
    assert grid.best_rate(trials) == best
    assert grid.at_best(trials) == {seed: outcome(loss) for seed, loss in enumerate(losses.get(best, []))}


@pytest.mark.parametrize(("seconds", "loss"), [(4.9, None), (5.0, 6.0), (7.5, 4.5), (10.0, 3.0), (11.0, 3.0)])
def test_the_loss_at_a_time_lies_between_two_evaluations(seconds, loss):
    assert quality.loss_at(outcome(3.0).curve, seconds) == loss


def fake(job: Job, device: torch.device) -> Outcome:
    """Best at the rule's rate; softmax is the quickest, phase7 better by 0.1 and a tenth of that a seed, phase8 fails."""
    if job.label == "phase8":
        raise CheckFailed("it is not causal")
    if job.keep:
        job.keep.mkdir(parents=True)
        (job.keep / "rate").write_text(f"{job.config.optim.lr:g}")
    off = abs(math.log2(job.config.optim.lr * 128))
    seed = job.config.train.seed
    return outcome(3 + off + 0.1 * seed, 8.0) if job.label == "softmax" else outcome(2.9 + off + 0.11 * seed, 10.0)


def test_tables_say_what_was_measured_as_it_grows(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "measure", fake)
    results = list(quality.run(["softmax", "phase7", "phase8"], tiny(prose), [CPU], seeds=[0, 1], folder=tmp_path / "models"))
    assert len(results) == 3 * 3 + 2 * 2 and len(results[0].tables) == 5  # rates of three arms, a seed of two at two; no pairs at first
    tables = {table.name: table.rows for table in results[-1].tables}
    softmax, phase7, phase8 = tables["quality"]
    assert softmax["best rate"] == phase7["best rate"] == 1 / 128
    assert (softmax["loss"], softmax["spread"], softmax["seeds"]) == (pytest.approx(3.05), pytest.approx(0.1), 2)
    assert softmax["loss at equal seconds"] == softmax["loss"]
    assert phase7["loss at equal seconds"] == pytest.approx(6 - (6 - 2.955) * 3 / 5)  # after 8 of 10 seconds
    assert phase8 == {"model": "phase8", "failed": "CheckFailed: it is not causal"}
    (pairs,) = tables["paired differences"]
    assert pairs.pop("model") == "phase7" and pairs == pytest.approx(
        {"mean": -0.095, "standard error": 0.005, "95 % ±": 0.06353, "seed 0": -0.1, "seed 1": -0.09}, rel=1e-4
    )  # of two pairs 0.01 apart: half of that, and 12.706 times it
    assert results[-1].notes[0].startswith("learning rates: all were tried with seed 0, the best 2 with all seeds; ")
    tried = [(r["rate"], r["seed"]) for r in tables["rates"] if r["model"] == "softmax"]
    assert tried == [(0.00391, 0), (0.00391, 1), (0.00781, 0), (0.00781, 1), (0.0156, 0)]
    assert len(tables["curves"]) == 2 * 5 * 2 and {r["rate"] for r in tables["best curves"]} == {1 / 128}
    kept = {path.name: (path / "rate").read_text() for path in (tmp_path / "models").iterdir()}
    assert kept == {"softmax": f"{1 / 128:g}", "phase7": f"{1 / 128:g}"}
    columns = {table.name: {name for row in table.rows for name in row} for table in results[-1].tables}
    for figure in results[-1].figures:
        assert {figure.x, figure.y, *figure.series, *filter(None, [figure.over])} <= columns[figure.table]


def test_the_model_that_is_left_is_that_of_the_best_rate(prose, tmp_path, monkeypatch):
    """At the second of four rates seed 0 is lucky; the third is better. What one stops amid is there as well, and nothing beside it."""
    losses = {1e-3: [3.5], 2e-3: [3.0, 3.4, 3.4], 4e-3: [3.1, 3.1, 3.1], 8e-3: [3.5]}

    def measure(job: Job, device: torch.device) -> Outcome:
        if job.keep:
            job.keep.mkdir(parents=True)
            (job.keep / "rate").write_text(f"{job.config.optim.lr:g}")
        return outcome(losses[job.config.optim.lr][job.config.train.seed])

    monkeypatch.setattr(grid, "measure", measure)
    for stop, rate in ((100, "0.004"), (5, "0.002")):
        folder = tmp_path / str(stop)
        search = grid.search({"phase7": tiny(prose)}, [CPU], rates=list(losses), seeds=[0, 1, 2], folder=folder)
        for _ in zip(range(stop), search, strict=False):
            pass
        search.close()
        assert {path.name: (path / "rate").read_text() for path in folder.iterdir()} == {"phase7": rate}


def test_what_another_job_is_writing_is_let_be(tmp_path):
    kept = grid.Kept(tmp_path, "phase7")
    for rate in (1, 2, 3, 4, 5):
        kept.at(rate).mkdir()
    kept.choose([grid.Trial(rate, 0, outcome(3 + rate)) for rate in (4, 3, 2, 1)], 0)  # the last has not ended
    assert {path.name for path in tmp_path.iterdir()} == {"phase7", ".phase7 at 2", ".phase7 at 5"}


def test_kinds_and_peers_are_trained_and_what_they_leave_can_be_loaded(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "EXTENSIONS", 0)
    config = of_kind(tiny(prose, steps=4), "phase7")
    quality.check(["phase7", "nanogpt"], config, [CPU])
    *_, last = quality.run(["phase7", "nanogpt"], config, [CPU], rates=[1e-4, 4e-3], folder=tmp_path / "models")
    phase7, nanogpt = last.tables[0].rows
    assert "is at the edge of those tried" in " ".join(last.notes)
    assert phase7["best rate"] == 4e-3 and nanogpt["loss"] > 0 and phase7["tokens"] == nanogpt["tokens"] == 4 * 256
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["phase7"]
    kept = hyperlm.load(tmp_path / "models" / "phase7", device="cpu")
    corpus = hyperlm.data.prepare(config, say=lambda line: None)
    assert evals.evaluate(kept.params, corpus, config, CPU)["val_loss"] == phase7["loss"] and kept.config.optim.lr == phase7["best rate"]


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        (["phase9"], {}, "choose from phase7, phase8, softmax, hybrid, nanogpt, nanogpt-muon"),
        (["hybrid"], {}, "--model.n-layers 2: a hybrid has a layer of phase7 in every 4"),
        (["phase8"], {"d_model": 1 << 16, "head_dim": 128}, "training phase8 needs"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(labels, change, message, prose):
    config = tiny(prose)
    with pytest.raises(ConfigError, match=re.escape(message)):
        quality.check(labels, replace(config, model=replace(config.model, **change)), [CPU])


# -- checks before numbers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_table():
    """The dispatch table is asked anew, before a test and after it."""
    cached = kernels.table, kernels.select
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def next_value(attention):
    """Attention to the value of the token after each."""
    return lambda q, k, v: attention(q, k, v.roll(-1, -2))


def test_a_model_that_sees_the_next_token_fails(monkeypatch, fresh_table):
    config = Config(model=ModelConfig(kind="softmax", d_model=32, n_layers=2, head_dim=8, vocab_size=320))
    checks.model(config, CPU)
    kernels.table.cache_clear()
    kernels.select.cache_clear()
    op = OPS["softmax_attention"]
    monkeypatch.setitem(OPS, "softmax_attention", replace(op, reference=next_value(op.reference)))
    with pytest.raises(CheckFailed, match="it is not causal: tokens from position 1 on change nats before it"):
        checks.model(config, CPU)


def test_models_of_every_kind_look_back_only(cfg):
    checks.model(Config(model=cfg), CPU)


def test_nats_that_are_not_finite_are_no_pass():
    with pytest.raises(CheckFailed, match="not finite"):
        checks.causal(lambda tokens, targets: torch.full(tokens.shape, math.nan), 320, CPU)


def test_kernels_with_a_wrong_gradient_fail(monkeypatch, fresh_table):
    """One that scales by 1.3 in the backward pass alone, in the place of a kernel of Triton."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            return 1.3 * d

    config, select = Config(model=ModelConfig(kind="softmax", d_model=32, n_layers=1, head_dim=8, vocab_size=320)), kernels.select

    def chosen(op, device, asked, *rest):
        return kernels.Choice(op, "triton", "") if (op, asked) == ("readout", "auto") else select(op, device, asked, *rest)

    monkeypatch.setattr(kernels, "select", chosen)
    op = OPS["readout"]
    monkeypatch.setitem(OPS, "readout", replace(op, triton=op.reference))
    checks.model(config, CPU)
    kernels.table.cache_clear()
    monkeypatch.setitem(OPS, "readout", replace(op, triton=lambda *arguments: Wrong.apply(op.reference(*arguments))))
    with pytest.raises(CheckFailed, match="its kernels' gradient of blocks/0/mixer.* is off by"):
        checks.model(config, CPU)
