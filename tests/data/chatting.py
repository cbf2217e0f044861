"""A small tokenizer that converses, for tests."""

from __future__ import annotations

from dataclasses import replace

import tokenizers

from llmos_jax.data import Tokenizer, bytes_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template):
    """Return bytes with ChatML's marks, and a template."""
    inner = tokenizers.Tokenizer.from_str(bytes_tokenizer()._inner.to_str())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = Tokenizer(inner)
    end_id = inner.token_to_id("<|im_end|>")
    marks = replace(
        made.marks,
        eos_id=end_id,
        stop_ids=frozenset({end_id}),
        bos_id=inner.token_to_id("<|endoftext|>"),
        chat_template=template,
    )
    return Tokenizer(inner, marks)
