"""Passkey retrieval: what a trial is; always right for a reader that knows, chance for one that does not; the same within training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALLEST, TINY

import train
from hyperlm import cli, model, passkey
from hyperlm import tokenizer as tok
from hyperlm.config import Config

BYTES = tok.byte_tokenizer()
WORDS = passkey.words_of(BYTES)
HAY = np.array(tok.encode(BYTES, ["All the world's a stage, and all the men and women merely players. " * 30])[0])
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0] * 4


def key_in(text: list[int]) -> str:
    """The first number that a text calls the pass key."""
    return BYTES.decode(text).split("The pass key is ")[1][: passkey.DIGITS]


def knows(texts: torch.Tensor) -> torch.Tensor:
    """Logits of a reader that looks for the key, and expects it."""
    logits = torch.zeros(len(texts), passkey.DIGITS, 320)
    for own, text in zip(logits, texts.tolist(), strict=True):
        own[torch.arange(passkey.DIGITS), tok.encode(BYTES, [key_in(text)])[0]] = 9.0
    return logits


@pytest.mark.parametrize("n", [WORDS.size, 200, 3000])
def test_a_trial_is_a_text_with_the_key_in_it_at_its_depth_and_another_answer_each_time(n):
    texts = passkey.trials(WORDS, HAY, n, DEPTHS)
    assert texts.shape == (len(DEPTHS), passkey.CHOICES, n) and (texts[:, :, 0] == WORDS.end).all()
    room = n - WORDS.size
    for depth, trial in zip(DEPTHS, texts.tolist(), strict=True):
        prompts, answers = {BYTES.decode(t[: -passkey.DIGITS]) for t in trial}, [BYTES.decode(t[-passkey.DIGITS :]) for t in trial]
        (prompt,) = prompts
        assert (
            prompt.endswith("What is the pass key? The pass key is ") and prompt.count(answers[0]) == 2 and answers[0] == key_in(trial[0])
        )
        assert len(set(answers)) == passkey.CHOICES and all(a.isdecimal() and a not in prompt for a in answers[1:])
        assert prompt.index("\n\nThe pass key is") == round(depth * room)  # one token a character


def test_trials_are_the_same_each_time_and_others_with_another_seed():
    first, again, other = (passkey.trials(WORDS, HAY, 300, DEPTHS, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({key_in(trial[0]) for trial in first.tolist()}) == len(DEPTHS)


@pytest.mark.parametrize(
    ("read", "said", "chosen"),
    [
        (knows, 1.0, 1.0),
        (lambda texts: -knows(texts), 0.0, 0.0),
        (lambda texts: torch.zeros(len(texts), passkey.DIGITS, 320), 0.0, 1 / passkey.CHOICES),  # every answer is as good
    ],
    ids=["knows", "knows better", "has no idea"],
)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_grades(read, said, chosen, batch):
    found = passkey.graded(read, passkey.trials(WORDS, HAY, 150, DEPTHS), batch)
    assert found.said.tolist() == [said] * len(DEPTHS) and found.chosen.tolist() == pytest.approx([chosen] * len(DEPTHS))


def test_a_key_is_said_if_each_digit_is_the_most_probable_and_chosen_if_all_together_are():
    """A reader for whom the last digit is likely to be another, but the key less unlikely than other numbers."""
    texts = passkey.trials(WORDS, HAY, 150, DEPTHS)

    def nearly(texts: torch.Tensor) -> torch.Tensor:
        logits = knows(texts)
        logits[:, -1, ord("?")] = 20.0
        return logits

    found = passkey.graded(nearly, texts, 100)
    assert found.said.sum() == 0 and found.chosen.mean() == 1


def test_an_untrained_model_is_at_chance():
    cfg = Config(model=replace(TINY, vocab_size=320))
    texts = passkey.trials(WORDS, HAY, 110, [0.5] * 50)
    found = passkey.graded(passkey.reader(model.init(cfg.model, 0), cfg, torch.device("cpu")), texts, 200)
    assert found.said.sum() == 0 and 0.02 <= found.chosen.mean() <= 0.22  # of 50 trials


def test_a_reader_gives_the_logits_that_the_answer_is_found_from():
    cfg, texts = Config(model=replace(TINY, vocab_size=320)), passkey.trials(WORDS, HAY, 110, [0.5])[0]
    params = model.init(cfg.model, 0)
    found = passkey.reader(params, cfg, torch.device("cpu"))(texts)
    for place in range(-passkey.DIGITS, 0):
        torch.testing.assert_close(found[:, place], model.apply(params, texts[:, :place], cfg.model)[:, -1])


def test_a_tokenizer_without_digits_is_refused():
    lacking = tok.byte_level({"a": 0}, [])
    with pytest.raises(tok.TokenizerError, match="no token for each digit"):
        passkey.words_of(lacking)


# -- within training -------------------------------------------------------------------------------------------------------------------


def test_evaluations_ask_on_request(prose, capsys):
    flags = [*SMALLEST, "--data.sources", str(prose), "--name", "r", "--train.steps", "2", "--eval.every", "1", "--data.seq-len", "128"]
    assert cli.run(train.main, [*flags, "--eval.passkey", "4"]) == 0
    assert "passkey said in 0% of trials, chosen among 10 in" in capsys.readouterr().out
    records = [json.loads(line) for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    assert [r["val_passkey"] for r in records if "val_loss" in r] == [0.0, 0.0]
    assert all(r["val_passkey_choice"] in (0, 0.25, 0.5, 0.75, 1) for r in records if "val_loss" in r)
    assert cli.run(train.main, ["--resume", "runs/r", "--train.steps", "3", "--eval.passkey", "0"]) == 0
    assert "passkey" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval.passkey", "4"], "set it to 0, or train on longer sequences"),
        (["--eval.passkey", "-1"], "must be at least 0"),
        (["--eval.passkey", "9999999"], "must be at most"),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_is_trained(more, message, prose, capsys):
    assert cli.run(train.main, [*SMALLEST, "--data.sources", str(prose), "--name", "r", *more]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and not Path("runs").exists()
