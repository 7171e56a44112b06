"""chat.py and conversations: sessions as a person types them, and states that are always those of reading the text afresh."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import generator
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import chat
from hyperlm import cli, conversation, model, sample, session, terminal
from hyperlm import tokenizer as tok
from hyperlm.config import Config, ModelConfig
from hyperlm.conversation import ConversationError, Message, State
from hyperlm.data.rows import document_of
from hyperlm.sample import Decode, Sampling
from hyperlm.trained import Model, load_model

REPOSITORY = Path(chat.__file__).parent


@pytest.fixture(params=["phase8", "phase7", "softmax"])
def run(request, made, monkeypatch) -> str:
    monkeypatch.chdir(made("--train.steps", "2", "--model.kind", request.param))
    return "runs/r"


@pytest.fixture
def plain_run(made, monkeypatch) -> str:
    monkeypatch.chdir(made("--train.steps", "2", "--model.kind", "phase8"))
    return "runs/r"


@pytest.fixture(scope="session")
def talks(tmp_path_factory) -> Path:
    """Conversations as train.py reads them."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}]} for i in range(200)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def chat_run(talks, made, monkeypatch) -> str:
    monkeypatch.chdir(made("--train.steps", "2", "--model.kind", "phase8", "--data.sources", str(talks)))
    return "runs/r"


@pytest.fixture(params=["base", "chat"])
def any_run(request) -> str:
    """A run on text, and one on conversations."""
    return request.getfixturevalue({"base": "plain_run", "chat": "chat_run"}[request.param])


def talk(*argv: str) -> int:
    return cli.run(chat.main, list(argv))


@pytest.fixture
def typed(capsys, monkeypatch) -> Callable[..., tuple[str, str]]:
    """typed(script, *flags): what a session writes to stdout and stderr that reads these lines."""

    def run(script: str, *flags: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(script))
        capsys.readouterr()
        assert talk("--max-tokens", "6", *flags) == 0
        return capsys.readouterr()

    return run


def test_one_prompt_streams_one_text_that_the_seed_decides(run, capsys):
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert talk("--prompt", "def ", "--max-tokens", "12", "--seed", seed) == 0  # the newest run is found
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ") and texts[0] == texts[1] != texts[2]
    assert talk(run, "--prompt", "def ", "--checkpoint", "best", "--max-tokens", "3", "--temperature", "0") == 0


def test_a_session_obeys_its_commands(run, typed):
    out, err = typed("hello\n/temp x\n/temp 0\n/what\n\n/reset\nhello\n/quit\nnever read\n")
    assert "/temp needs a number" in err and "/what is no command" in err and "/reset" in err
    assert "commands" not in out and len(out.split("> ")) == 9


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/help", "/system TEXT"),
        ("/tmep 0.5", "/tmep is no command; did you mean /temp?\n/help /system"),
        ("/top_p 0.5", "did you mean /top-p?"),
        (f"/seed {1 << 64}", "/seed needs a whole number below 2^64"),
        (f"/seed {'9' * 5000}", "/seed needs a whole number below 2^64"),
        ("/xyzzy", "/xyzzy is no command:\n/help /system"),
        ("/temp", "[temperature 0.8]"),
        ("/temp 0.5", "[temperature 0.5]"),
        ("/top-k 3", "[top k 3]"),
        ("/top-k 3.5", "/top-k needs a number of at least 0"),
        ("/top-p 0", "/top-p needs a number above 0"),
        ("/min-p 2", "/min-p needs a number of at least 0 and at most 1"),
        ("/penalty 0.5", "/penalty needs a number of at least 1"),
        ("/seed x", "/seed needs a whole number"),
        ("/seed -1", "/seed needs a whole number"),
        ("/seed 99999999999999999999999", "below 2^64"),
        ("/regen", "no answer to draw again"),
        ("/undo", "nothing to take back"),
        ("/save", "/save needs a file"),
        ("/load", "/load needs a file"),
        ("/load nowhere.jsonl", "nowhere.jsonl cannot be read (No such file or directory)"),
        ("/save nowhere/x.jsonl", "nowhere/x.jsonl could not be written (No such file or directory)"),
        ("/system", "[no system turn; the conversation starts afresh]"),
        ("/system Be kind.", "[system turn set; the conversation starts afresh]"),
    ],
)
def test_every_command_answers_and_none_ends_the_session(line, answer, chat_run, typed):
    out, err = typed(f"{line}\n/temp\n")
    assert answer in err and err.splitlines()[-1].startswith("[temperature") and out == "> > > \n"


@pytest.mark.parametrize("line", ["/* a comment", "/usr/bin", "// x", " /temp 1", "/"])
def test_text_that_only_looks_like_a_command_is_text(line, plain_run, typed):
    assert "tokens/s" in typed(line + "\n")[1]


def test_a_model_of_text_says_what_it_does_and_goes_on_after_an_empty_line(plain_run, typed):
    out, err = typed("Once \n\n/quit\n", "--seed", "1", "--max-tokens", "20")
    assert "this model continues text" in err and out.count("text> ") == 3 and err.count("tokens/s") == 2
    assert "no system turn" in typed("/system be kind\n")[1]


def test_a_model_of_conversations_says_so_and_ignores_empty_lines(chat_run, typed):
    out, err = typed("\n  \nwhat is 7\n", "--seed", "1")
    assert "continues text" not in err and err.count("tokens/s") == 1 and out.startswith("> > > ")


def test_reset_forgets_what_was_said(run, typed):
    first, nothing, again, _ = typed("hello\n/reset\nhello\n/quit\n", "--temperature", "0")[0].split("text> ")[1:]
    assert first == again and nothing == ""


def replies(out: str) -> list[str]:
    return re.split(r"(?:text)?> ", out)[1:-1]


def test_an_answer_is_drawn_again_and_a_seed_decides_it(any_run, typed):
    out, _ = typed(
        "hello\n/regen\n/regen\n/seed 5\n/regen\n/regen\n/seed\n/regen\n/undo\n/seed 5\nhello\n", "--temperature", "3", "--top-p", "1"
    )
    first, second, third, _, seeded, same, _, other, _, _, from_seed = replies(out)
    assert len({first, second, third, seeded, other}) == 5 and seeded == same == from_seed


def test_settings_of_a_session_change_what_is_drawn(plain_run, typed):
    out, _ = typed("/seed 1\na\n/undo\n/temp 0\na\n/undo\n/temp 1e9\na\n/undo\n/top-k 1\na\n/undo\n/top-k 0\n/min-p 1\na\n", "--top-p", "1")
    _, greedy, hot, one, likely = (reply for reply in replies(out) if reply)
    assert greedy == one == likely != hot


@pytest.mark.parametrize("script", ["hello\n/save {0}\n", "/system Be kind.\nhello\nwhat\u202e is\x9b 7 \U0001f468\n/save {0}\n"])
def test_a_conversation_is_saved_as_text_to_train_on_and_read_again(script, chat_run, typed, tmp_path):
    path, copy = tmp_path / "talk.jsonl", tmp_path / "copy.jsonl"
    said, _ = typed(script.format(path) + "/seed 3\n/regen\n", "--temperature", "2")
    (line,) = path.read_text().splitlines()
    turns = document_of(json.loads(line)).messages
    assert [role for role, _ in turns][-2:] == ["user", "assistant"] and ("hello" in {content for _, content in turns})
    assert not sample.CONTROLS.search(line)
    again, _ = typed(f"/load {path}\n/save {copy}\n/seed 3\n/regen\n", "--temperature", "2")
    assert copy.read_text() == path.read_text() and replies(again)[-1] == replies(said)[-1]


def test_only_a_file_of_this_conversation_is_replaced(chat_run, typed, tmp_path):
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    other.write_text("precious")
    err = typed(f"hello\n/save {mine}\nwhat\n/save\n/save {other}\n/reset\nx\n/save\n/save {mine}\n")[1]
    assert err.count("messages saved to") == 2 and f"{other} exists, and is not from this conversation" in err
    assert f"{mine} exists" in err and "/save needs a file" in err
    assert len(conversation.load(mine)) == 4 and other.read_text() == "precious" and sorted(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"messages": []}',
        '{"messages": [{"role": "cat", "content": "x"}]}',
        '{"messages": [{"role": "user"}]}',
        "\0",
        "{" * 10000,
    ],
)
def test_a_file_that_is_no_conversation_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConversationError, match=r"x\.json is no conversation"):
        conversation.load(tmp_path / "x.json")


# -- the state is that of reading the text afresh --------------------------------------------------------------------------------------


def opened(run: str, **settings) -> session.Session:
    loaded = load_model(Path(run), "latest", "auto")
    decode, state = sample.decoder(loaded.params, loaded.config.model), conversation.nothing_read(loaded)
    return session.Session(loaded, decode, state, Sampling(2.0, 0, 1.0), 1, settings.pop("stops", ()), settings.pop("max_tokens", 40))


def require_fresh(now: session.Session) -> None:
    """What the model expects next is what it expects after reading the same messages from nothing."""
    ids = conversation.token_ids(now.model, now.messages)
    state = conversation.catch_up(now.model, now.state, ids)
    cfg = now.model.config.model
    assert state.cache.position == len(ids) == len(state.ids)
    torch.testing.assert_close(state.logits, model.apply(now.model.params, torch.tensor([ids]), cfg)[0, -1], rtol=1e-4, atol=1e-4)


def said(now: session.Session, *texts: str) -> session.Session:
    for text in texts:
        now = session.respond(now, (*now.messages, Message("user", text)))
    return now


def interrupting(monkeypatch, after: int) -> list[str]:
    """Ctrl-C comes when so many pieces of an answer have been shown; what is shown."""
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == after:
            signal.raise_signal(signal.SIGINT)

    for module in (chat, session):
        monkeypatch.setattr(module, "show", show)
    return shown


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(run, capsys, monkeypatch):
    now = said(opened(run), "hello")
    shown = interrupting(monkeypatch, 5)
    now = said(now, "and")
    assert 5 <= len(shown) <= 6 and "stopped by you" in capsys.readouterr().err
    assert now.messages[-2:] == (Message("user", "and"), Message("assistant", "".join(shown)))
    require_fresh(now)
    require_fresh(said(now, "then"))


def test_ctrl_c_before_the_first_word_leaves_the_conversation_as_it_was(any_run, capsys, monkeypatch):
    now = said(opened(any_run), "hello")
    monkeypatch.setattr(sample, "PREFILL", 4)
    prefill = sample.prefill

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return prefill(*args, **options)

    with monkeypatch.context() as during:
        during.setattr(sample, "prefill", interrupted)
        after = said(now, "a long question, in several pieces")
    assert after.messages == now.messages and "as it was" in capsys.readouterr().err
    require_fresh(after)
    require_fresh(said(after, "hello"))


def test_ctrl_c_between_answers_does_nothing_and_while_a_line_is_read_ends_a_session_without_terminal(
    plain_run, typed, monkeypatch, capsys
):
    note = session.note
    with monkeypatch.context() as during:
        during.setattr(session, "note", lambda text: (note(text), signal.raise_signal(signal.SIGINT)) if "token" in text else note(text))
        assert typed("a\nb\n")[1].count("tokens/s") == 2
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(signal.SIGINT))
    assert talk() == 128 + signal.SIGINT


def test_ctrl_c_ends_the_process_where_one_prompt_is_answered(plain_run, monkeypatch, capsys):
    interrupting(monkeypatch, 2)
    assert talk("--prompt", "a", "--max-tokens", "100", "--seed", "1") == 128 + signal.SIGINT
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["/undo", "/regen", "/reset", "/system Be kind.", "/load talk.jsonl"])
def test_whatever_changes_a_conversation_changes_the_state(line, chat_run, tmp_path, monkeypatch):
    now = said(opened(chat_run), "hello", "what is 7")
    monkeypatch.chdir(tmp_path)
    conversation.save(now.messages[:3], Path("talk.jsonl"))
    name, _, value = line[1:].partition(" ")
    require_fresh(session.obey(now, name, value))


@pytest.mark.parametrize(("stops", "max_tokens"), [(("a", "e"), 100), ((), 7), ((), 1)])
def test_a_text_that_was_cut_off_is_read_as_it_stands(any_run, stops, max_tokens, capsys):
    """A stop string ends within a token, and the longest reply within a character."""
    now = said(opened(any_run, stops=stops, max_tokens=max_tokens), "hello", "and")
    assert not any(stop in message.content for stop in stops for message in now.messages[1::2])
    require_fresh(now)


def test_a_conversation_is_remembered(run):
    now = opened(run)
    for _ in range(2):
        text = "".join(message.content for message in now.messages) + "hello"
        words = len(now.model.tokenizer.encode(text, add_special_tokens=False).ids)
        now = said(replace(now, sampling=Sampling(0.0), max_tokens=3), "hello")
        assert 1 + words <= now.state.cache.position <= 1 + words + 3
    assert [m.content for m in now.messages[::2]] == ["hello", "hello"]
    require_fresh(now)


def test_conversations_are_answered_in_turns(chat_run, capsys):
    capsys.readouterr()
    assert talk("--prompt", "what is 7", "--max-tokens", "5") == 0
    assert not capsys.readouterr().out.startswith("what is 7")  # a reply, not a continuation


# -- what a model says -----------------------------------------------------------------------------------------------------------------


def scripted(text: str, then: str = tok.END_OF_TEXT) -> tuple[Model, Decode, State]:
    """A model that says `text`, a token a byte, and the special token `then`; and its state before."""
    tokenizer = tok.byte_tokenizer()
    cfg = ModelConfig(vocab_size=320)
    left = iter([*tok.encode(tokenizer, [text])[0], tokenizer.token_to_id(then), *tok.encode(tokenizer, ["and more"])[0]])

    def logits() -> torch.Tensor:
        return 99.0 * torch.nn.functional.one_hot(torch.tensor(next(left)), cfg.vocab_size)

    def decode(token: torch.Tensor, cache: model.Cache) -> tuple[torch.Tensor, model.Cache]:
        return logits()[None], cache

    loaded = Model(Config(model=cfg), {}, tokenizer, torch.device("cpu"), step=1, chat=False)
    return loaded, decode, State(conversation.token_ids(loaded, ()), logits(), model.Cache(1, []))


def heard(text: str, *, then: str = tok.END_OF_TEXT, limit: int = 2000, stops: tuple[str, ...] = ()) -> tuple[str, str, int]:
    """What is shown of such a text, how it ended, and after how many tokens."""
    shown: list[str] = []
    loaded, decode, state = scripted(text, then)
    answer = conversation.answer(loaded, state, (), Sampling(0.0), generator(), decode=decode, limit=limit, stops=stops, show=shown.append)
    assert answer.text == "".join(shown) and len(answer.state.ids) == 1 + answer.tokens
    return answer.text, answer.ending, answer.tokens


@pytest.mark.parametrize("special", tok.SPECIALS)
def test_a_reply_stops_at_every_special_token(special):
    assert heard("yes", then=special) == ("yes", "end", 3)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("yes", {"limit": 3}, ("yes", "length", 3)),
        ("café", {"limit": 4}, ("caf", "length", 4)),  # half a character is none
        ("one\ntwo", {"stops": ("\n",)}, ("one", "stop", 4)),
        ("one STOP two", {"stops": ("STAR", "STOP")}, ("one ", "stop", 8)),
        ("one STO", {"stops": ("STOP",)}, ("one STO", "end", 7)),  # it was none
        ("one STO", {"stops": ("STOP",), "limit": 7}, ("one STO", "length", 7)),
        ("", {}, ("", "end", 0)),
        ("no " * 100, {}, ("no " * 53 + "n", "loop", 160)),
    ],
)
def test_an_answer_ends_for_a_reason(text, options, expected):
    assert heard(text, **options) == expected


@pytest.mark.parametrize(
    ("ending", "words"),
    [("end", ""), ("stop", ""), ("length", "\n[cut off at --max-tokens 9]"), ("loop", "repeats itself"), ("interrupt", "stopped by you]")],
)
def test_what_an_answer_took_is_one_line_and_why_it_ended_another(ending, words):
    state = State(list(range(12)), torch.empty(0), model.Cache(12, []))
    took, newline, why = session.described(conversation.Answer("", ending, state, 5, 0.25, 2.0), 9).partition("\n")
    assert took == "[0.25 s to the first token, 2 tokens/s, 5 tokens, context 12]"
    assert words in newline + why and bool(words) == bool(why)


def test_what_a_model_says_cannot_command_a_terminal(capsys):
    loaded, decode, state = scripted("ok\n\x1b[2J\x9b\u202e")
    session.respond(session.Session(loaded, decode, state, Sampling(0.0), 1, (), 50), ())
    assert capsys.readouterr().out == "ok\n\\x1b[2J\\x9b\\u202e\n"


def test_stop_strings_are_given_as_flags(plain_run, capsys):
    assert talk("--prompt", "a", "--max-tokens", "200", "--stop", "e", "--stop", "a", "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert out.startswith("a") and not set("ae") & set(out[1:]) and "cut off" not in err


def test_one_prompt_writes_the_text_alone_to_stdout(any_run, capsys):
    assert talk("--prompt", "what is 7", "--max-tokens", "3", "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert "[" not in out and len(out.splitlines()) <= 4 and [line.split()[0] for line in err.splitlines()][::2] == ["runs/r,", "[cut"]


# -- lines ------------------------------------------------------------------------------------------------------------------------------


ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"


class Drawn(DummyOutput):
    """A screen that calls `then` once, when something has been drawn on it."""

    then: Callable[[], None] | None = None

    def flush(self) -> None:
        then, self.then = self.then, None
        if then:
            then()


@pytest.fixture
def edited(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """edited(keys, ...): the lines that an editor reads of what is typed at each prompt, until that ends it; its history is in a folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*typed: str) -> list[str]:
        lines, screen = [], Drawn()
        with create_pipe_input() as keyboard:
            read = terminal.editor("> ", input=keyboard, output=screen)
            with pytest.raises(EOFError):
                for keys in typed:
                    screen.then = partial(keyboard.send_text, keys)
                    lines.append(read())
        return lines

    return run


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ([f"a b{ENTER}", CTRL_D], ["a b"]),
        ([f"abd\x1b[Dc{ENTER}", CTRL_D], ["abcd"]),  # the cursor moves
        ([f"a{ALT_ENTER}b{ENTER}", CTRL_D], ["a\nb"]),
        ([f"a\\{ENTER}b{ENTER}", CTRL_D], ["a\nb"]),
        ([f"a\x1b[200~def f():\r\n\treturn 1\n\x1b[201~{ENTER}", CTRL_D], ["adef f():\n\treturn 1\n"]),  # a paste keeps its lines
        ([f"one{ENTER}", f"two{ENTER}", f"{UP}{UP}!{ENTER}", CTRL_D], ["one", "two", "one!"]),
        ([f"wrong{CTRL_C}right{ENTER}", CTRL_D], ["right"]),
        ([f"wrong{CTRL_C}{CTRL_C}"], []),
        ([f"{CTRL_C}{CTRL_C}"], []),
        ([f"{CTRL_C}a{CTRL_C}b{ENTER}", f"{CTRL_C}c{ENTER}", CTRL_D], ["b", "c"]),  # two at one prompt, with nothing written
        ([f"é漢\U0001f468{ENTER}", ENTER, CTRL_D], ["é漢\U0001f468", ""]),
    ],
)
def test_a_line_is_edited_as_people_expect(typed, lines, edited):
    assert edited(*typed) == lines


def test_lines_are_remembered_for_the_next_session_and_for_nobody_else(edited, tmp_path):
    edited(f"one{ENTER}", f"two\\{ENTER}lines{ENTER}", CTRL_D)
    assert edited(f"{UP}{ENTER}", f"{UP}{UP}{UP}{UP}{UP}{ENTER}", CTRL_D) == ["two\nlines", "one"]
    path = tmp_path / "state/hyperlm/history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def block_with_a_file(folder: Path) -> None:
    folder.write_text("")


def block_with_a_folder(folder: Path) -> None:
    (folder / "hyperlm/history").mkdir(parents=True)


def block_with_a_pipe(folder: Path) -> None:
    (folder / "hyperlm").mkdir(parents=True)
    os.mkfifo(folder / "hyperlm/history")


@pytest.mark.parametrize("block", [block_with_a_file, block_with_a_folder, block_with_a_pipe])
def test_a_history_that_cannot_be_kept_is_said_once_and_does_no_harm(block, edited, tmp_path, capsys):
    block(tmp_path / "state")
    assert edited(f"one{ENTER}", f"two{ENTER}", f"{UP}{UP}{ENTER}", CTRL_D) == ["one", "two", "one"]
    assert capsys.readouterr().err.count("not remembered for the next session") == 1


def test_a_history_that_can_no_longer_be_written_is_said_once(edited, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prompt_toolkit.history.FileHistory.store_string", full)
    assert edited(f"one{ENTER}", f"two{ENTER}", CTRL_D) == ["one", "two"]
    assert capsys.readouterr().err.count("No space left on device") == 1


class Screen:
    """A process in a pseudo-terminal, and what it has written there."""

    def __init__(self, *argv: str) -> None:
        self.end, terminal_end = pty.openpty()
        self.modes, self.text = termios.tcgetattr(terminal_end), ""
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *argv], stdin=terminal_end, stdout=terminal_end, stderr=terminal_end, env=env, start_new_session=True
        )
        self.terminal_end = terminal_end

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Until these words come; what came before them is forgotten."""
        until = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < until and select.select([self.end], [], [], seconds)[0], f"no {words!r} in {self.text!r}"
            self.text += os.read(self.end, 4096).decode(errors="replace")
        self.text = self.text.partition(words)[2]

    def write(self, keys: str) -> None:
        os.write(self.end, keys.encode())


@pytest.fixture
def screen(plain_run, tmp_path, monkeypatch) -> Iterator[Screen]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found = Screen(str(REPOSITORY / "chat.py"), plain_run, "--max-tokens", "3")
    yield found
    found.process.kill()
    found.process.wait()
    os.close(found.end)
    os.close(found.terminal_end)


def test_a_session_on_a_terminal(screen):
    screen.wait_for("text>")
    screen.write("hello" + ENTER)
    screen.wait_for("tokens/s")
    screen.wait_for("text>")
    screen.write("wrong" + CTRL_C)
    screen.wait_for("Ctrl-C again")
    screen.process.send_signal(signal.SIGTERM)
    screen.wait_for("stopped by SIGTERM")
    assert screen.process.wait(30) == 128 + signal.SIGTERM
    assert termios.tcgetattr(screen.terminal_end) == screen.modes  # as it was


@pytest.mark.parametrize("text", ["\udcff", "caf\udce9 \ud83d", "a\x00b", "", "\u2028"])
def test_any_text_can_be_typed_and_given(text, plain_run, capsys, monkeypatch):
    """Bytes that are not UTF-8 reach a program as lone surrogates."""
    assert talk("--prompt", text, "--max-tokens", "2") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n/temp nan\n/temp inf\n/temp 1e-40\n{text}x\n"))
    assert talk("--max-tokens", "2") == 0
    seen = capsys.readouterr()
    assert seen.err.count("/temp needs a number") == 2 and seen.out.encode() and "error" not in seen.err


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
    monkeypatch.setattr(
        "sys.stdout", io.TextIOWrapper(io.FileIO(write_end, "w"), write_through=True)
    )  # with nothing left to flush at its end
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
        (["--min-p", "1.5"], "at most 1"),
        (["--repetition-penalty", "0.5"], "of at least 1"),
        (["--stop", ""], "must not be empty"),
        (["--promt", "x"], "did you mean --prompt"),
        (["--tmperature", "1"], "did you mean --temperature?"),
        (["--rum", "runs/x"], "--help lists all settings"),
    ],
)
def test_a_mistake_is_one_clear_line(argv, message, capsys):
    assert talk(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not Path("runs").exists()
