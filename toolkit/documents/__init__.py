"""Documents and tasks, from a file to padded batches of tokens.

A document is a text, or a prompt with its response; whether it is held out depends on its content
alone. `documents` reads and splits, `tokens` tokenises, `batches` pads, `corpus` does all of it
once for a run, and `tasks` has questions with answers that can be scored. No model is seen here.
"""

from toolkit.documents.batches import Batch, make_batches
from toolkit.documents.corpus import Corpus, DataFile, pad_token
from toolkit.documents.documents import Document, read_documents
from toolkit.documents.tokens import Encoded, Positions, encode, encode_all

__all__ = [
    "Batch",
    "Corpus",
    "DataFile",
    "Document",
    "Encoded",
    "Positions",
    "encode",
    "encode_all",
    "make_batches",
    "pad_token",
    "read_documents",
]
