"""Rows to documents: a row has a text, or a conversation."""

from typing import Any

from hyperlm.data.documents import Document
from hyperlm.tokenizer import ROLES, clean


def document_of(record: Any, text_field: str = "text") -> Document:
    """The document of a row; `text_field` is where its text is.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{kind(record)}, not an object with text or messages")
    if "messages" not in record:
        if text_field not in record:
            raise ValueError(f"no {text_field!r} field; a line needs text, or messages with role and content")
        return Document(checked(record[text_field], text_field))
    if not isinstance(record["messages"], list):
        raise ValueError(f"messages is {kind(record['messages'])}, not a list")
    messages = []
    for number, message in enumerate(record["messages"], 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {kind(message)}, not an object with role and content")
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"no {field!r} field in message {number}; a line needs text, or messages with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"role {message['role']!r:.80} is none of {', '.join(ROLES)}")
        messages.append((message["role"], checked(message["content"], f"content of message {number}")))
    return Document("", tuple(messages))


def checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string but {kind(value)}")
    if clean(value) != value:
        raise ValueError(f"{name} has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def kind(value: Any) -> str:
    """What JSON calls it."""
    return {type(None): "null", bool: "true or false", dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")
