"""chat.py and sampling: distributions by hand, decoding against whole forward passes, sessions as a person types them."""

import decimal
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALLEST, TINY, generator, normal

import chat
import train
from hyperlm import cli, model, sample
from hyperlm import tokenizer as tok
from hyperlm.config import Config, ModelConfig
from hyperlm.sample import Sampling

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.0, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 0, 0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 0, 0.3), [0, 1, 0, 0]),
        (Sampling(0.5, 0, 1.0), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(1e-40, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(5e-324, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(1e308, 0, 1.0), [0.25, 0.25, 0.25, 0.25]),
        (Sampling(1.0, 10**30, 5e-324), [0, 1, 0, 0]),
    ],
)
def test_the_next_token_is_drawn_from_the_right_distribution(how, expected):
    torch.testing.assert_close(sample.probabilities(LOGITS, how), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-3, 0.3, 1.0, 40.0, 1e30])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 3e38])
def test_every_temperature_gives_its_distribution(temperature, scale):
    """Against sums of 60 digits, of logits in fp32 of every size."""
    logits = (scale * normal(9, seed=1) / 4).float()
    with decimal.localcontext(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        weights = [((decimal.Decimal(x) - decimal.Decimal(max(logits.tolist()))) / decimal.Decimal(temperature)).exp() for x in logits.tolist()]
        expected = [float(weight / sum(weights)) for weight in weights]
    torch.testing.assert_close(sample.probabilities(logits, Sampling(temperature, 0, 1.0)), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(value, temperature):
    with pytest.raises(sample.NotFinite):
        sample.probabilities(torch.tensor([0.0, value, 1.0]), Sampling(temperature))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc é 漢 \U0001f468\u200d\U0001f469", "a\nb\tc é 漢 \U0001f468\u200d\U0001f469"),
        ("\x1b[31m\x07\r\x00", "\\x1b[31m\\x07\\r\\x00"),
        ("\x7f\x9b2J", "\\x7f\\x9b2J"),
        ("\u202eevil\u2069\u200f", "\\u202eevil\\u2069\\u200f"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert sample.printable(text) == shown


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
def run(request, made, monkeypatch) -> str:
    monkeypatch.chdir(made("--train.steps", "2", "--model.kind", request.param))
    return "runs/r"


@pytest.fixture
def plain_run(made, monkeypatch) -> str:
    monkeypatch.chdir(made("--train.steps", "2", "--model.kind", "phase8"))
    return "runs/r"


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


def scripted(ids: list[int], chat_data: bool = False) -> tuple[chat.Speaker, chat.Memory]:
    """A speaker that says `ids`, and its memory before."""
    tokenizer = tok.byte_tokenizer()
    cfg = ModelConfig(vocab_size=320)
    left = iter(ids)

    def logits() -> torch.Tensor:
        return 99.0 * torch.nn.functional.one_hot(torch.tensor(next(left)), cfg.vocab_size)

    def decode(token: torch.Tensor, cache: model.Cache) -> tuple[torch.Tensor, model.Cache]:
        return logits()[None], cache

    return chat.Speaker({}, decode, Config(model=cfg), tokenizer, chat_data, "runs/x, step 1"), chat.Memory(logits(), model.Cache(0, []))


@pytest.mark.parametrize("special", tok.SPECIALS)
def test_a_reply_stops_at_every_special_token(special):
    bytes_of_it = tok.byte_tokenizer()
    stop = bytes_of_it.token_to_id(special)
    speaker, memory = scripted([*bytes_of_it.encode("yes").ids, stop, *bytes_of_it.encode("and more").ids])
    said = [token for token, _ in chat.reply(speaker, memory, Sampling(0.0), generator(), 50)]
    assert speaker.tokenizer.decode(said) == "yes"


def test_what_a_model_says_cannot_command_a_terminal(capsys):
    speaker, memory = scripted([*tok.byte_tokenizer().encode("ok\n\x1b[2J\x9b\u202e").ids, tok.byte_tokenizer().token_to_id(tok.END_OF_TEXT)])
    chat.speak(speaker, memory, "", Sampling(0.0), generator(), 50)
    assert capsys.readouterr().out == "ok\n\\x1b[2J\\x9b\\u202e\n"


@pytest.mark.parametrize("text", ["\udcff", "caf\udce9 \ud83d", "a\x00b", "", "\u2028"])
def test_any_text_can_be_typed_and_given(text, plain_run, capsys, monkeypatch):
    """Bytes that are not UTF-8 reach a program as lone surrogates."""
    assert talk("--prompt", text, "--max-tokens", "2") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n/temp nan\n/temp inf\n/temp 1e-40\n{text}x\n"))
    assert talk("--max-tokens", "2") == 0
    seen = capsys.readouterr()
    assert seen.out.count("/temp needs a number") == 2 and seen.out.encode() and "error" not in seen.err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_of_another_encoding_ends_nothing(encoding, plain_run, capsys, monkeypatch):
    typed, screen = io.BytesIO(b"caf\xe9 \x81\xff\xe4\xbd\xa0\n/quit\n"), io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding, write_through=True))
    assert talk("--max-tokens", "200", "--temperature", "50", "--seed", "1") == 0
    assert screen.getvalue().decode(encoding) and "tokens/s" in capsys.readouterr().err


def test_a_closed_pipe_ends_it_quietly(plain_run, capsys, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.FileIO(write_end, "w"), write_through=True))  # with nothing left to flush at its end
    talk("--prompt", "def ", "--max-tokens", "20")
    assert len(capsys.readouterr().err.splitlines()) == 1  # what it loaded


@pytest.mark.parametrize(("flags", "remedy"), [((), "try --checkpoint best"), (("--checkpoint", "best"), "lower --optim.lr")])
def test_weights_that_diverged_are_one_line(plain_run, diverged, flags, remedy, capsys):
    assert talk("--prompt", "a", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the weights of {plain_run}, step 2, give logits that are not finite") and remedy in error


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def larger_vocabulary(run: Path) -> None:
    tok.train_bpe([(run.parent.parent / "prose.txt").read_text()], 900).save(str(run / "tokenizer.json"))


def meta_without_chat(run: Path) -> None:
    (path,) = (p for p in run.glob("checkpoints/*/meta/metadata"))
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "chat"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (larger_vocabulary, "tokenizer.json is not what runs/r was trained with: python train.py --resume runs/r puts it back"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (without("config.json"), "config.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (meta_without_chat, "step_00000002 is damaged"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint"),
    ],
)
def test_a_damaged_run_is_one_line_that_names_what_is_damaged(damage, message, made, tmp_path, capsys):
    shutil.copytree(made("--train.steps", "2", "--model.kind", "phase8"), tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "runs/r")
    assert talk("runs/r", "--prompt", "a") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no run with a checkpoint"),
        (["runs/nowhere"], "no such run"),
        (["--temperature", "-1"], "at least 0"),
        (["--temperature", "nan"], "at least 0"),
        (["--temperature", "inf"], "at least 0"),
        (["--top-p", "nan"], "above 0"),
        (["--seed", "99999999999999999999999"], "below 2^64"),
        (["--seed", "-1"], "at least 0"),
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
