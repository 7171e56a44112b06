"""chat.py and sampling: distributions by hand, decoding against whole forward passes, sessions as a person types them."""

import io
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALLEST, TINY, generator

import chat
import train
from configs import ModelConfig
from hyperlm import cli, model, sample
from hyperlm.sample import Sampling

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.0, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 0, 0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 0, 0.3), [0, 1, 0, 0]),
        (Sampling(0.5, 0, 1.0), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ],
)
def test_the_next_token_is_drawn_from_the_right_distribution(how, expected):
    torch.testing.assert_close(sample.probabilities(LOGITS, how), torch.tensor(expected, dtype=torch.float32))


def test_greedy_text_is_what_whole_forward_passes_would_choose(cfg):
    params = model.init(cfg, 5)
    ids = [3, 1, 4, 1, 5]
    logits, cache = sample.read(params, ids, sample.empty_cache(params, cfg), cfg)
    tokens = sample.generate(logits, cache, Sampling(0.0), generator(), stop=set(), usable=cfg.vocab_size, decode=sample.decoder(params, cfg))
    drawn = [token for (token, _, _), _ in zip(tokens, range(30), strict=False)]
    for token in drawn:
        assert token == model.apply(params, torch.tensor([ids]), cfg)[0, -1].argmax()
        ids.append(token)


@pytest.mark.gpu
@torch.no_grad()
def test_a_recorded_decoder_goes_on_from_any_cache():
    cfg, device = ModelConfig(kind="phase8", d_model=64, n_layers=2, head_dim=32, vocab_size=64), torch.device("cuda", 0)
    params = model.init(cfg, 5, device=device)
    decode = sample.decoder(params, cfg)
    for prompt in ([3, 1, 4], [2, 7]):
        logits, cache = sample.read(params, prompt, sample.empty_cache(params, cfg), cfg)
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(logits.argmax()))
            logits, cache = decode(torch.tensor(ids[-1:], device=device), cache)
            logits = logits[0]
            torch.testing.assert_close(logits, model.apply(params, torch.tensor([ids], device=device), cfg)[0, -1], rtol=1e-3, atol=1e-3)


def test_tokens_that_the_tokenizer_lacks_are_never_drawn():
    params = model.init(TINY, 0)
    logits, cache = sample.read(params, [1], sample.empty_cache(params, TINY), TINY)
    tokens = sample.generate(logits, cache, Sampling(5.0, 0, 1.0), generator(), stop=set(), usable=7, decode=sample.decoder(params, TINY))
    assert all(token < 7 for (token, _, _), _ in zip(tokens, range(50), strict=False))


@pytest.fixture(params=["phase8", "phase7", "softmax"])
def run(request, prose) -> str:
    assert cli.run(train.main, [*SMALLEST, "--data.sources", str(prose), "--name", "talker", "--train.steps", "2", "--model.kind", request.param]) == 0
    return "runs/talker"


def talk(*argv: str) -> int:
    return cli.run(chat.main, list(argv))


def test_one_prompt_streams_one_text_that_the_seed_decides(run, capsys):
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert talk("--prompt", "def ", "--max-tokens", "12", "--seed", seed) == 0  # the newest run is found
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ") and texts[0] == texts[1] != texts[2]
    assert talk(run, "--prompt", "def ", "--checkpoint", "best", "--max-tokens", "3", "--temperature", "0") == 0


def test_a_session_obeys_its_commands(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/temp x\n/temp 0\n/what\n\n/reset\nhello\n/quit\nnever read\n"))
    assert talk("--max-tokens", "4") == 0
    out = capsys.readouterr().out
    assert "/temp needs a number" in out and "commands: /reset" in out


def test_reset_forgets_what_was_said(run, capsys, monkeypatch):
    def replies(script: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(script))
        capsys.readouterr()
        assert talk("--max-tokens", "6", "--temperature", "0") == 0
        return capsys.readouterr().out.split("> ")[1:]

    first, nothing, again, _ = replies("hello\n/reset\nhello\n/quit\n")
    assert first == again and nothing == ""


def test_a_conversation_is_remembered(run):
    speaker = chat.load(chat.Command(run))
    memory = chat.begin(speaker)
    assert memory.cache.position == 1  # the end of the text before
    for _ in range(2):
        before, words = memory.cache.position, len(speaker.tokenizer.encode("hello", add_special_tokens=False).ids)
        memory = chat.speak(speaker, memory, "hello", Sampling(0.0), generator(), 3)
        assert before + words <= memory.cache.position <= before + words + 3


def test_conversations_are_answered_in_turns(tmp_path, capsys):
    records = [{"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}]} for i in range(200)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert cli.run(train.main, [*SMALLEST, "--data.sources", "talk.jsonl", "--name", "c", "--train.steps", "2"]) == 0
    capsys.readouterr()
    assert talk("--prompt", "what is 7", "--max-tokens", "5") == 0
    assert not capsys.readouterr().out.startswith("what is 7")  # a reply, not a continuation


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no run with a checkpoint"),
        (["runs/nowhere"], "no such run"),
        (["--temperature", "-1"], "at least 0"),
        (["--top-p", "0"], "above 0"),
        (["--max-tokens", "0"], "at least 1"),
        (["--promt", "x"], "did you mean --prompt"),
    ],
)
def test_a_mistake_is_one_clear_line(argv, message, capsys):
    assert talk(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not Path("runs").exists()
