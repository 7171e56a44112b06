"""Rows of tables and JSON as documents: every form of a conversation, what cannot be used, and the turns that become of it."""

import json
import re

import pytest
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.data import tokenise
from hyperlm.data.documents import Document
from hyperlm.data.rows import document_of
from hyperlm.encoder import Encoder, encode

TALK = (("user", "2 + 2?"), ("assistant", "4"))
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "zwei, ü"}}}
CALLED = '{"name": "add", "arguments": {"a": 2, "b": "zwei, ü"}}'


def messages(*turns: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("row", "expected"),
    {
        "messages": ({"messages": messages(*TALK)}, TALK),
        "content in parts": ({"messages": messages(("user", [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]), TALK[1])}, TALK),
        "developer": ({"messages": messages(("developer", "be brief"), *TALK)}, (("system", "be brief"), *TALK)),
        "a tool's answer": ({"messages": messages(*TALK, ("tool", "4"))}, (*TALK, ("tool", "4"))),
        "a call without content": ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, (("assistant", CALLED),)),
        "a call and no content": ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, (("assistant", CALLED),)),
        "content and calls": (
            {"messages": [{"role": "assistant", "content": "I add.", "tool_calls": [CALL, {"function": {"name": "end", "arguments": "{}"}}]}]},
            (("assistant", f'I add.\n{CALLED}\n{{"name": "end", "arguments": {{}}}}'),),
        ),
        "columns of other rows": ({"text": None, "messages": [{"role": "user", "content": "2 + 2?", "tool_calls": None}, *messages(TALK[1])]}, TALK),
        "sharegpt": ({"id": "x", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, TALK),
        "sharegpt with tools": (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "o"}]},
            (("system", "s"), ("assistant", "{}"), ("tool", "o")),
        ),
        "sharegpt with role and content": ({"conversations": messages(*TALK)}, TALK),
        "alpaca": ({"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "Below is..."}, (("user", "Add.\n\n2 and 2"), TALK[1])),
        "alpaca without input": ({"instruction": "2 + 2?", "input": "", "output": "4"}, TALK),
        "alpaca of two fields": ({"instruction": "2 + 2?", "output": "4"}, TALK),
        "prompt and completion": ({"prompt": "2 + 2?", "completion": "4"}, TALK),
        "prompt and completion of messages": ({"prompt": messages(TALK[0]), "completion": messages(TALK[1])}, TALK),
        "question and answer": ({"question": "2 + 2?", "answer": "4"}, TALK),
    }.values(),
)  # fmt: skip
def test_conversations_are_read_in_every_form(row, expected):
    assert document_of(row) == Document("", expected)
    assert document_of(json.loads(json.dumps(row))) == Document("", expected)


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"text": "a text"}, "text", "a text"),
        ({"body": "a text", "text": "another"}, "body", "a text"),
        ({"body": "a text", "messages": messages(*TALK)}, "body", "a text"),
        ({"text": "a text", "messages": None, "question": "what?"}, "text", "a text"),
    ],
)
def test_texts_are_read_from_their_field(row, field, expected):
    assert document_of(row, field) == Document(expected)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no 'text' field; a row needs text, or messages"),
        ({"content": "x"}, "no 'text' field"),
        ({"question": "x"}, "no 'text' field"),
        ({"prompt": "x", "completion": None}, "no 'text' field"),
        ({"prompt": "x", "completion": 3}, "completion is not a string but a number"),
        ({"prompt": messages(TALK[0]), "completion": []}, "completion is empty"),
        ({"messages": []}, "messages is empty"),
        ({"messages": {}}, "messages is an object, not a list"),
        ({"messages": None}, "messages is null, not a list"),
        ({"conversations": "x"}, "conversations is a string, not a list"),
        ({"messages": messages(TALK[0])}, "the assistant says nothing in it"),
        ({"messages": messages(TALK[0], ("assistant", " \n"))}, "the assistant says nothing in it"),
        ({"question": "x", "answer": ""}, "the assistant says nothing in it"),
        ({"messages": messages(("Robot", "x"))}, "role 'Robot' is none of system, developer, user, assistant, tool"),
        ({"conversations": [{"from": None, "value": "x"}]}, "role None is none of"),
        ({"conversations": [{"from": "human", "content": "x"}]}, "no 'value' field in message 1"),
        ({"messages": [{"role": "user"}]}, "no 'content' field in message 1"),
        ({"messages": messages(TALK[0], ("assistant", None))}, "content of message 2 is not a string but null"),
        ({"messages": messages(("user", ["x"]))}, "content of message 1 has a part a string: text alone"),
        (
            {"messages": messages(("user", [{"type": "image_url", "image_url": "x"}]))},
            "content of message 1 has a part of type 'image_url': text alone",
        ),
        ({"messages": messages(("user", [{"type": "text"}]))}, "a part of content of message 1 is not a string but null"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls of message 1 is a number, not a list"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a tool call in message 1 has no name"),
        ({"messages": [{"role": "assistant", "tool_calls": ["add"]}]}, "a tool call in message 1 has no name"),
        ({"messages": messages(("user", "\ud800"), TALK[1])}, "content of message 1 has half of a surrogate pair"),
        ("text", "a string, not an object"),
    ],
)
def test_what_cannot_be_used_says_why(row, reason):
    with pytest.raises(ValueError) as e:
        document_of(row)
    assert str(e.value).startswith(reason) and "\n" not in str(e.value) and len(str(e.value)) < 200


def test_roles_count_in_any_case():
    assert document_of({"messages": messages(("User", "a"), ("ASSISTANT", "b"))}) == Document("", (("user", "a"), ("assistant", "b")))


# -- turns ---------------------------------------------------------------------------------------------------------------------------------

CONVERSATION = [
    *messages(("developer", " be brief\n"), ("user", [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2, é漢?"}])),
    {"role": "assistant", "content": None, "tool_calls": [CALL, {"function": {"name": "end", "arguments": '{"now": true}'}}]},
    *messages(("tool", "4"), ("assistant", "\n 4 <b>& ok\n\n"), ("user", "")),
    {"role": "assistant", "content": "Bye.", "tool_calls": [{"name": "end"}]},
]


def encoded(tokenizer, documents: list[Document]) -> list[tuple[list[int], bytes]]:
    """Ids of each document, and of conversations what of it is said, as they are written."""
    ids = iter(encode(Encoder(tokenizer), tokenise.contents([(i, document, False) for i, document in enumerate(documents)])))
    found = [tokenise.document_ids(tokenizer, document, ids) for document in documents]
    return [(of.tolist(), said) for of, said in found]


@pytest.mark.parametrize(
    "make", [tok.byte_tokenizer, lambda: tok.train_bpe(["be brief, 2 + 2 is 4, ok? " * 20], 320)], ids=["bytes", "bpe"]
)
def test_turns_are_what_transformers_makes_of_the_exported_tokenizer(make, tmp_path):
    """Ids, and which of them the assistant says; and a prompt ends as chat.py ends it."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers' chat templates")
    tokenizer = make()
    tok.save(tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tok.settings(tokenizer, chat=True)))
    (tmp_path / "config.json").write_text("{}")  # a run's own is there as well
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)

    ((ids, said),) = encoded(tokenizer, [document_of({"messages": CONVERSATION})])
    assert found["input_ids"] == [tok.end_of_text(tokenizer), *ids]
    assert found["assistant_masks"] == [0, *said] and 0 < sum(said) < len(said)

    prompt = theirs.apply_chat_template(messages(("user", "2 + 2?")), tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert prompt == [tok.end_of_text(tokenizer), *tok.turn(tokenizer, "user", "2 + 2?"), *tok.opening(tokenizer, "assistant")]


def test_the_assistants_words_and_ends_of_turns_are_said():
    tokenizer = tok.byte_tokenizer()
    documents = [Document("", (("user", "ab"), ("assistant", "c"), ("tool", "d"), ("assistant", ""))), Document("text")]
    (ids, said), (plain, nothing) = encoded(tokenizer, documents)
    shown = [tokenizer.id_to_token(i) for i in ids]
    assert [name for name, is_said in zip(shown, said, strict=True) if is_said] == ["c", "<|end|>", "<|end|>"]
    assert shown == [
        "<|user|>",
        "a",
        "b",
        "<|end|>",
        "<|assistant|>",
        "c",
        "<|end|>",
        "<|tool|>",
        "d",
        "<|end|>",
        "<|assistant|>",
        "<|end|>",
    ]
    assert (plain, nothing) == (tok.encode(tokenizer, ["text"])[0], b"")


def test_a_tokenizer_of_an_earlier_run_keeps_its_ids_and_gets_no_more():
    """Its model may have no row for another: the token of tools is not added to one that has all the others."""
    new = tok.byte_tokenizer()
    layout = json.loads(new.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] != tok.TOOL]
    old = tok.ready(Tokenizer.from_str(json.dumps(layout)))
    assert tok.vocabulary_size(old) == 261 and tok.vocabulary_size(new) == 262
    assert {name: i for name, i in new.get_vocab().items() if name != tok.TOOL} == old.get_vocab()
    assert tok.turn(old, "user", "ü") == tok.turn(new, "user", "ü")
    with pytest.raises(
        tok.TokenizerError, match=re.escape("the tokenizer has no <|tool|>, being of an earlier version: leave out such messages")
    ):
        tok.turn(old, "tool", "4")
