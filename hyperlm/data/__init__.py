"""Text to batches: sources.py (where text comes from) and text.py (encodings, cuts), selection.py (which of it, on which side),
corpus.py (tokens on disk) and cache.py (folders that are checked), order.py (what a step reads).
"""

from hyperlm.data.cache import verify as verify_cache
from hyperlm.data.corpus import Corpus, Shard, cache_folder, prepare, with_vocabulary
from hyperlm.data.order import Batches, batches, validation_documents, validation_windows
from hyperlm.data.sources import DataError

__all__ = [
    "Batches",
    "Corpus",
    "DataError",
    "Shard",
    "batches",
    "cache_folder",
    "prepare",
    "validation_documents",
    "validation_windows",
    "verify_cache",
    "with_vocabulary",
]
