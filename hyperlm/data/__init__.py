"""Text to batches: text.py (encodings, cuts), documents.py (texts and conversations), rows.py (of tables and JSON), formats.py and
hypertext.py (what is in a file), folders.py and hub.py (which files), sources.py (where text comes from), selection.py (which of it, on
which side), duplicates.py (near copies), tokenise.py and corpus.py (tokens on disk), cache.py (folders that are checked), packing.py
(conversations to sequences), order.py (what a step learns from).
"""

from hyperlm.data.cache import verify as verify_cache
from hyperlm.data.corpus import Corpus, NotTokenised, Shard, cache_folder, prepare
from hyperlm.data.documents import DataError
from hyperlm.data.order import Batches, batches, validation_documents, validation_sequences
from hyperlm.data.tokenise import with_vocabulary

__all__ = [
    "Batches",
    "Corpus",
    "DataError",
    "NotTokenised",
    "Shard",
    "batches",
    "cache_folder",
    "prepare",
    "validation_documents",
    "validation_sequences",
    "verify_cache",
    "with_vocabulary",
]
