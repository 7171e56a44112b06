"""What tokens are as text: how frequent, how deep in brackets, of which group, and how they are written in a figure.

Nothing here depends on a tokenizer but the text of each token. Axes: W sequences, N tokens of each, V vocabulary.
"""

import keyword
import re

import numpy as np
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.data import Corpus

STEPS = {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}
AT_ONCE = 1 << 24  # tokens that are counted at a time
MOST = 1 << 28  # of a source: more say the same


def texts_of(tokenizer: Tokenizer) -> list[str]:
    """The text of each id alone, (V,). Bytes that are no whole character are U+FFFD."""
    return tokenizer.decode_batch([[i] for i in range(tok.vocabulary_size(tokenizer))], skip_special_tokens=False)


def frequencies(corpus: Corpus, vocabulary: int) -> np.ndarray:
    """How often each token is in the training text, (V,) int64, or in its first MOST tokens of each source."""
    counts = np.zeros(vocabulary, np.int64)
    for shard in corpus.shards:
        for tokens in (shard.train, *([shard.talks.tokens] if shard.talks else [])):
            for start in range(0, min(len(tokens), MOST), AT_ONCE):
                counts += np.bincount(tokens[start : start + AT_ONCE].astype(np.int64), minlength=vocabulary)
    return counts


def bracket_depths(tokens: np.ndarray, texts: list[str], end: int) -> np.ndarray:
    """How many brackets are open before each token, (W, N) ids -> (W, N): of those that opened in the sequence, after the last id `end`,
    which separates documents. A bracket closes one of any kind; one that closes nothing does not count."""
    steps = {i: moves for i, text in enumerate(texts) if (moves := [STEPS[c] for c in text if c in STEPS])}
    depths = np.zeros(tokens.shape, np.int64)
    for row, depth in zip(tokens.tolist(), depths, strict=True):
        level = 0
        for n, token in enumerate(row):
            depth[n] = level
            for step in steps.get(token, ()):
                level = max(0, level + step)
            if token == end:
                level = 0
    return depths


def documents(tokens: np.ndarray, end: int) -> np.ndarray:
    """A number for each document of each sequence, (W, N) -> (W, N) int64, all different; `end` belongs to the document that it ends."""
    ends = (tokens == end).ravel()
    first = np.concatenate([[False], ends[:-1]])
    first[:: tokens.shape[1]] = True
    return (np.cumsum(first) - 1).reshape(tokens.shape)


def groups(pieces: list[str]) -> list[str]:
    """Of each piece of a text: keyword (of Python), name, word, number, bracket, punctuation or space.

    A name is a word that no prose has: with an underscore, a digit, capitals after small letters, after a dot, or before an opening
    bracket; all pieces of it are.
    """
    text = "".join(pieces)
    by_piece: list[str] = []
    words = list(re.finditer(r"\w+", text))
    kinds = {}
    for word in words:
        inside, before, after = word.group(), text[: word.start()][-1:], text[word.end() :][:1]
        if inside.isdecimal():
            kind = "number"
        elif keyword.iskeyword(inside):
            kind = "keyword"
        elif re.search(r"[_\d]|[a-z][A-Z]", inside) or after == "(" or before == ".":
            kind = "name"
        else:
            kind = "word"
        kinds |= dict.fromkeys(range(*word.span()), kind)
    start = 0
    for piece in pieces:
        inside = [kinds[i] for i in range(start, start + len(piece)) if i in kinds]
        if not piece.strip():
            by_piece.append("space")
        elif inside:
            by_piece.append(inside[0])
        else:
            by_piece.append("bracket" if set(piece) & set(STEPS) else "punctuation")
        start += len(piece)
    return by_piece


def labels(pieces: list[str]) -> list[str]:
    """How the pieces of a text are written beside points: each once, where it comes first; nothing for spaces and parts of characters."""
    seen: set[str] = set()
    written = []
    for piece in pieces:
        bare = piece.strip()
        written.append(bare if bare not in seen and bare.isprintable() and "\ufffd" not in bare else "")
        seen.add(bare)
    return written


def passage(tokens: np.ndarray, texts: list[str], end: int, length: int) -> tuple[int, int]:
    """Where (sequence, position) so many tokens of one document begin that show much: many different words, names and brackets."""
    best, place = -1, (0, 0)
    span = min(length, tokens.shape[1])
    inside = documents(tokens, end)
    for w, row in enumerate(tokens):
        for start in range(0, len(row) - span + 1, max(1, span // 2)):
            window = row[start : start + span]
            if inside[w, start] != inside[w, start + span - 1]:
                continue
            pieces = [texts[i] for i in window]
            those = {(group, piece.strip()) for group, piece in zip(groups(pieces), pieces, strict=True)}
            brackets = sum(any(c in STEPS for c in piece) for piece in pieces)
            score = len(those) + min(brackets, span // 5)
            if score > best:
                best, place = score, (w, start)
    return place
