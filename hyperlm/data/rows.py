"""Rows to documents: a row of a table or of JSON has a text, or a conversation in one of the forms that people keep them in.

    {"text": ...}                                          a text; the field's name is --data.text-field
    {"messages": [{"role": ..., "content": ...}, ...]}     content is text, a list of text parts, or null where a tool is called
    {"conversations": [{"from": ..., "value": ...}, ...]}  ShareGPT
    {"prompt": ..., "completion": ...}                     texts, or lists of messages
    {"question": ..., "answer": ...}
    {"instruction": ..., "input": ..., "output": ...}      Alpaca; the input may be absent

Of a row with several, the field that --data.text-field names comes first, then conversations in this order, and `text` last. Where the
assistant calls tools, each call is a line of its turn after what it says: {"name": "add", "arguments": {"a": 1}}.
"""

import json
from typing import Any

from hyperlm.data.documents import Document
from hyperlm.tokenizer import clean

ROLE_OF = {  # what roles are called, and what they are here
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
LISTS = "messages", "conversations"
NEEDS = "a row needs text, or messages with role and content"

Message = tuple[str, str]  # role and text


def document_of(row: Any, text_field: str = "text") -> Document:
    """The document of a row.

    Raises:
        ValueError: saying in one line why it cannot be used.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{kind(row)}, not an object with text or messages")
    if text_field != "text" and text_field in row:
        return Document(checked(row[text_field], text_field))
    if messages := conversation(row):
        if not any(role == "assistant" and text.strip() for role, text in messages):
            raise ValueError("the assistant says nothing in it")
        return Document("", tuple(messages))
    if text_field in row:
        return Document(checked(row[text_field], text_field))
    null = next((f"{name} is null, not a list" for name in LISTS if name in row), "")
    raise ValueError(null or f"no {text_field!r} field; {NEEDS}")


def conversation(row: dict[str, Any]) -> list[Message]:
    """Of a row, whatever its form; empty if it has none."""
    has = {name for name, value in row.items() if value is not None}  # a table has all columns in every row
    for name in LISTS:
        if name in has:
            return messages_of(row[name], name)
    if {"prompt", "completion"} <= has:
        return [*side(row, "prompt", "user"), *side(row, "completion", "assistant")]
    if {"question", "answer"} <= has:
        return [*side(row, "question", "user"), *side(row, "answer", "assistant")]
    if {"instruction", "output"} <= has:
        asked = [checked(row[name], name) for name in ("instruction", "input") if row.get(name)]
        return [("user", "\n\n".join(asked)), *side(row, "output", "assistant")]
    return []


def side(row: dict[str, Any], name: str, role: str) -> list[Message]:
    """One side of an exchange: a text, or messages."""
    return messages_of(row[name], name) if isinstance(row[name], list) else [(role, checked(row[name], name))]


def messages_of(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {kind(value)}, not a list")
    if not value:
        raise ValueError(f"{name} is empty")
    return [message_of(message, f"message {number}") for number, message in enumerate(value, 1)]


def message_of(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {kind(message)}, not an object with role and content")
    role, content = ("from", "value") if "from" in message else ("role", "content")
    if role not in message:
        raise ValueError(f"no {role!r} field in {where}; {NEEDS}")
    name = ROLE_OF.get(message[role].lower()) if isinstance(message[role], str) else None
    if name is None:
        raise ValueError(f"role {message[role]!r:.80} is none of system, developer, user, assistant, tool")
    called = message.get("tool_calls") or []
    if not isinstance(called, list):
        raise ValueError(f"tool_calls of {where} is {kind(called)}, not a list")
    calls = [call_of(call, where) for call in called]
    if content not in message and not calls:
        raise ValueError(f"no {content!r} field in {where}; {NEEDS}")
    said = message.get(content)
    text = "" if said is None and calls else text_of(said, f"{content} of {where}")
    return name, "\n".join([*([text] if text else []), *calls])


def text_of(content: Any, where: str) -> str:
    """Of a message: a text, or parts that are."""
    if not isinstance(content, list):
        return checked(content, where)
    for part in content:
        if not isinstance(part, dict) or (part.get("type") or "text") != "text":
            shown = f"of type {part['type']!r:.40}" if isinstance(part, dict) else kind(part)
            raise ValueError(f"{where} has a part {shown}: text alone can be read")
    return "".join(checked(part.get("text"), f"a part of {where}") for part in content)


def call_of(call: Any, where: str) -> str:
    """A tool's call in one line of JSON; `tokenizer.TEMPLATE` writes the same."""
    call = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"a tool call in {where} has no name")
    arguments = call.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False, default=str)
    return checked(f'{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": {written}}}', f"a tool call in {where}")


def checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string but {kind(value)}")
    if clean(value) != value:
        raise ValueError(f"{name} has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def kind(value: Any) -> str:
    """What JSON calls it."""
    return {type(None): "null", bool: "true or false", dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")
