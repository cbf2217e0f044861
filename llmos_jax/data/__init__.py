"""Text in, batches of tokens out.

Read in the order of the flow: `sources` (and `python_docs`) give documents, `tokenizer`
gives ids, `tokens.prepare` puts both on disk once, `batches` cuts rows from there.
"""

from llmos_jax.data.batches import (
    Batch,
    TrainBatches,
    evaluation_batches,
    num_evaluation_batches,
)
from llmos_jax.data.compressors import compare
from llmos_jax.data.document import Document, split
from llmos_jax.data.scored import prepare_scored
from llmos_jax.data.sources import PYTHON_DOCS, read_documents
from llmos_jax.data.token_file import TokenFile
from llmos_jax.data.tokenizer import (
    StreamDecoder,
    Tokenizer,
    bytes_tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_bpe,
)
from llmos_jax.data.tokens import PreparedText, prepare

__all__ = [
    "PYTHON_DOCS",
    "Batch",
    "Document",
    "PreparedText",
    "StreamDecoder",
    "TokenFile",
    "Tokenizer",
    "TrainBatches",
    "bytes_tokenizer",
    "check_vocabulary",
    "compare",
    "evaluation_batches",
    "load_tokenizer",
    "num_evaluation_batches",
    "prepare",
    "prepare_scored",
    "read_documents",
    "split",
    "train_bpe",
]
