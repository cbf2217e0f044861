"""Text becomes a corpus: cleaned, sifted, without duplicates, in shards of tokens.

Read in the order of the flow: `units` cuts sources into work, `sift` reads, cleans and
judges (`clean`, `filters`, `words`), `duplicates` finds what is there twice, `sides`
splits, `shards` encodes and writes, `report` says what became of every document.
"""

from llmos_jax.corpus.make import make_corpus
from llmos_jax.corpus.report import report_text
from llmos_jax.corpus.shards import encode_texts

__all__ = ["encode_texts", "make_corpus", "report_text"]
