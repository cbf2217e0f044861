"""Text in, batches of tokens out.

Read in the order of the flow: `sources` (and `python_docs`) give documents, `tokenizer`
gives ids, `tokens` puts both on disk once (or `corpora` opens what lies there),
`prepared` makes of these what a run reads, and `batches` cuts rows from that.
"""

from llmos_jax.data.batches import TrainBatches
from llmos_jax.data.chat import ChatTurns, chat_prompt_ids, encode_chat, render_chat
from llmos_jax.data.compressors import compare
from llmos_jax.data.document import Document, split
from llmos_jax.data.folder import load_tokenizer, tokenizer_of_folder
from llmos_jax.data.marks import Marks
from llmos_jax.data.packing import packing_stats, packing_text
from llmos_jax.data.prepared import prepare, prepare_scored
from llmos_jax.data.rows import Batch
from llmos_jax.data.sources import PYTHON_DOCS, read_documents
from llmos_jax.data.stream import TokenStream
from llmos_jax.data.template import render
from llmos_jax.data.token_file import TokenFile
from llmos_jax.data.tokenizer import (
    StreamDecoder,
    Tokenizer,
    check_vocabulary,
    prompt_ids,
)
from llmos_jax.data.tokens import PreparedText
from llmos_jax.data.trained import bytes_tokenizer, train_bpe
from llmos_jax.data.windows import evaluation_batches, num_evaluation_batches

__all__ = [
    "PYTHON_DOCS",
    "Batch",
    "ChatTurns",
    "Document",
    "Marks",
    "PreparedText",
    "StreamDecoder",
    "TokenFile",
    "TokenStream",
    "Tokenizer",
    "TrainBatches",
    "bytes_tokenizer",
    "chat_prompt_ids",
    "check_vocabulary",
    "compare",
    "encode_chat",
    "evaluation_batches",
    "load_tokenizer",
    "num_evaluation_batches",
    "packing_stats",
    "packing_text",
    "prepare",
    "prepare_scored",
    "prompt_ids",
    "read_documents",
    "render",
    "render_chat",
    "split",
    "tokenizer_of_folder",
    "train_bpe",
]
