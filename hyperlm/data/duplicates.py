"""Near copies: documents most of whose runs of five words are another one's.

MinHash (Broder 1997): a signature has SLOTS numbers, and the share of them that is the same in two signatures estimates the share of runs
of words that the documents have in common of all that they have (the Jaccard similarity), with a standard deviation of at most 0.06.
Candidates have the same BAND numbers in a row somewhere (locality-sensitive hashing): pairs of similarity 0.9 are found 99 times in 100, of
0.8 every second time, of 0.7 three times in 100. Of a band that many share, as texts from one template do, the RECENT last are compared,
and all whose whole signature is the same: time grows with the documents, not with their square. Signatures keep 16 bits of each number (Li
and König 2010): 128 bytes a document.
"""

import re
from itertools import accumulate
from zlib import crc32

import numpy as np

from hyperlm.data.documents import DataError
from hyperlm.env import progress

SLOTS = 64
BAND = 6  # numbers; ten bands
RECENT = 128  # documents
SIMILAR = 0.8
WORDS = 5
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")  # scripts without spaces
MIX = np.uint64(0x9E3779B97F4A7C15)


def signatures(texts: list[str]) -> np.ndarray:
    """MinHash of each text, (texts, SLOTS) uint16.

    Raises:
        DataError: if rensa is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError as e:
        raise DataError("--data.dedup needs rensa: pip install 'hyperlm-torch[dedup]'") from e
    sets = [runs_of_words(text) for text in texts]
    rows = [0, *accumulate(map(len, sets))]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), np.array(rows, np.uint64), SLOTS, 0)
    return np.array(matrix.to_rows(), np.uint32).astype(np.uint16)  # their lowest 16 bits


def runs_of_words(text: str) -> np.ndarray:
    """A hash of each WORDS words in a row, uint64; of all words where they are fewer. A character of a script without spaces is a word."""
    words = (text if text.isascii() else UNSPACED.sub(r" \g<0> ", text)).encode().split()
    hashes = np.fromiter(map(crc32, words), np.uint64, len(words))
    length = min(WORDS, len(words))
    run = np.zeros(len(words) - length + 1, np.uint64)
    for i in range(length):
        run = (run + hashes[i : len(hashes) - length + 1 + i]) * MIX
    return run


def originals(signatures: np.ndarray, given: int = 0) -> np.ndarray:
    """Of each document the number of an earlier one that it nearly copies, and that is no such copy itself; -1 where there is none.

    Args:
        signatures: (documents, SLOTS) uint16.
        given: as many documents at the beginning are kept whatever they are.
    """
    original_of = np.full(len(signatures), -1)
    bands = [signatures[:, at : at + BAND] for at in range(0, SLOTS - BAND + 1, BAND)]
    groups = np.array([equal_rows(numbers) for numbers in (*bands, signatures)])
    last = np.full((len(groups), groups.max(initial=0) + 1), -1, np.int32)  # the document that was kept last of each band and group,
    before = np.full_like(groups, -1)  # and the one before each: lists of Python would take ten times as much memory
    for i in progress(np.flatnonzero((groups >= 0).any(0)).tolist(), "near copies", unit=" docs"):
        places = [(band, group) for band, group in enumerate(groups[:, i].tolist()) if group >= 0]
        candidates = set[int]()
        for band, group in places:
            j = int(last[band, group])
            for _ in range(RECENT):
                if j < 0:
                    break
                candidates.add(j)
                j = int(before[band, j])
        if i >= given and candidates:
            earlier = np.array(sorted(candidates))
            similarity = (signatures[earlier] == signatures[i]).mean(1)
            if similarity.max() >= SIMILAR:
                original_of[i] = earlier[similarity.argmax()]
                continue
        for band, group in places:
            before[band, i], last[band, group] = last[band, group], i
    return original_of


def equal_rows(numbers: np.ndarray) -> np.ndarray:
    """A number for each group of equal rows, (rows,) int32; -1 for a row that no other equals."""
    key = np.zeros(len(numbers), np.uint64)
    for column in numbers.T:
        key = (key + column) * MIX  # rows that differ and meet here are only compared in vain
    order = np.argsort(key, kind="stable")
    new = np.diff(key[order], prepend=~key[order[:1]]) != 0
    alone = new & np.append(new[1:], True)
    groups = np.empty(len(key), np.int32)
    groups[order] = np.where(alone, -1, np.cumsum(new) - 1)
    return groups
