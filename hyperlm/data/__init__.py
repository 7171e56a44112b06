"""Text to batches, in three files: sources.py (where text comes from), corpus.py (tokens on disk), order.py (what a step reads)."""

from hyperlm.data.corpus import Corpus, Shard, prepare, with_vocabulary
from hyperlm.data.order import Batches, batches, validation_windows
from hyperlm.data.sources import DataError

__all__ = ["Batches", "Corpus", "DataError", "Shard", "batches", "prepare", "validation_windows", "with_vocabulary"]
