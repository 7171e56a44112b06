"""A document: a text, or a conversation."""

from itertools import accumulate
from typing import NamedTuple

from hyperlm.data.text import cut
from hyperlm.errors import HyperlmError


class DataError(HyperlmError, ValueError):
    """Text that cannot be used; the message says what, why and what to do."""


class Document(NamedTuple):
    """A text, or a conversation as (role, content) pairs."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> str:
        return self.text or "".join(content for _, content in self.messages)

    @property
    def said(self) -> str:
        """Of a conversation, what the assistant says; a text, whole."""
        return self.text or "".join(content for role, content in self.messages if role == "assistant")

    @property
    def compared_text(self) -> str:
        """What tells it from others: a text, whole; of a conversation all but its system prompt, which many may have in common."""
        return self.text or "\n".join(content for role, content in self.messages if role != "system")

    @property
    def raw(self) -> bytes:
        """The bytes that bits per byte are counted on: of the text as it is read, in UTF-8; outside rows, with newlines alone at line
        ends."""
        return self.content.encode()

    def head(self, limit: int) -> "Document":
        """At most `limit` bytes from the start, in whole characters."""
        if len(self.raw) <= limit:
            return self
        if not self.messages:
            return Document(self.text.encode()[:limit].decode("utf-8", "ignore"))
        shortened = []
        for role, content in self.messages:
            raw = content.encode()[:limit]
            shortened.append((role, raw.decode("utf-8", "ignore")))
            limit -= len(content.encode())
            if limit <= 0:
                break
        return Document("", tuple(shortened))

    def divide(self, share: float) -> "tuple[Document, Document] | None":
        """A beginning of about this share and the rest, cut where a text may be, or between messages; None if there is no such place, with
        something to learn on either side."""
        if self.messages:
            sizes = list(accumulate(len(content) for _, content in self.messages))[:-1]
            if not sizes:
                return None
            turns = [i for i in range(len(sizes)) if self.messages[i + 1][0] == "user"] or range(len(sizes))
            at = 1 + min(turns, key=lambda i: abs(sizes[i] - share * len(self.content)))
            parts = Document("", self.messages[:at]), Document("", self.messages[at:])
        else:
            low = int(share * len(self.text))
            at, _ = cut(self.text, low, (low + len(self.text)) // 2)
            parts = Document(self.text[:at]), Document(self.text[at:])
        return parts if all(part.said.strip() for part in parts) else None
