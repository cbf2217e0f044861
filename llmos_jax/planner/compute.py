"""Turn a layout into the seconds one device works on a pass over its tokens.

A product of m tokens with k x n weights takes 2 m k n FLOPs at the chip's share of
peak, plus `operands` of the time its 2 (m k + k n + m n) bytes take from memory: that
is what makes thin products slow, whichever side is thin. Attention (a flash kernel)
runs at a share of that, and over heads narrower than the matrix unit leaves a part of
it idle; its backward pass makes the scores again, 2.5 forwards in all
(FlashAttention-2, arXiv 2307.08691). What lies between (norms, rotation, SwiGLU,
residuals, routing) costs its memory traffic.

A pipeline makes the layers in turns, some of them idle, and each of its stages makes
the logits of its part of the tokens: layers and head are counted apart.

Known lies:
- Experts are evenly loaded; there is no tail of small kernels.
- Where no rule splits the tokens between blocks over `tensor`, what lies between is
  taken to be split all the same: XLA keeps sums scattered until the next product.
- With the plain attention, which writes all scores, long sequences are slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.fitted import Fitted
from llmos_jax.planner.layout import Layout
from llmos_jax.planner.sizes import FFN_IN, Product, Sizes
from llmos_jax.planner.stored import dtype_bytes

ATTENTION_BACKWARD = 2.5

BLOCK = 1024
"""Keys of one block of attention: half of those on the diagonal are computed for
nothing. MaxText's `sa_block_kv` is 512 to 2048."""

LOGIT_TRAFFIC = 6 * 4
"""Bytes per logit: float32 written, read for the maximum and the sum, read and written
for the gradient, read by two products."""

MADE_ONCE = frozenset({"head", "ffn_out"})
"""Never made again: the loss needs the first once, the next layer saves the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Seconds of one device over one microbatch, all its layers together; the head's
    are those of its part of the tokens, where stages share them."""

    forward: dict[str, float]
    """What a tensor of ir.TENSORS takes to make; `head` and `other` beside them."""
    between: float
    """Traffic between the products of one forward pass."""
    loss: float
    """Traffic of the logits, there and back."""
    saved: dict[str, float]
    """Traffic of keeping a tensor of ir.TENSORS and of fetching it again."""
    gradients: int = 2
    """Products that a product's backward pass has: by its input and by its weight, or
    by the first alone where weights are frozen."""

    def layers_s(
        self, saved: frozenset[str], is_train: bool, is_stage_twice: bool = False
    ) -> float:
        """Seconds of products and attention in the layers.

        Args:
            saved: what is made once; all else is made again for the backward pass.
            is_train: whether there is a backward pass.
            is_stage_twice: whether all of the forward pass runs twice (1f1b).
        """
        layers = {name: s for name, s in self.forward.items() if name != "head"}
        once = sum(layers.values())
        if not is_train:
            return once
        context = layers["context"]
        backward = self.gradients * (once - context) + ATTENTION_BACKWARD * context
        again = sum(
            seconds
            for name, seconds in layers.items()
            if name not in saved and name not in MADE_ONCE
        )
        return once * (1 + is_stage_twice) + backward + again

    def head_s(self, is_train: bool, is_head_twice: bool = False) -> float:
        """Seconds of the product that makes logits, and of its gradients."""
        passes = 1 + self.gradients + is_head_twice if is_train else 1
        return self.forward["head"] * passes

    def between_s(
        self,
        saved: frozenset[str],
        is_all: bool,
        is_train: bool,
        is_stage_twice: bool = False,
    ) -> float:
        """Seconds of memory traffic between products of the layers; `is_all`: nothing
        is remade."""
        if not is_train:
            return self.between
        passes = (3 if is_all else 4) + is_stage_twice
        kept = sum(seconds for name, seconds in self.saved.items() if name in saved)
        return passes * self.between + kept


def work_of(
    layout: Layout,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    parts: int,
    fitted: Fitted,
) -> Work:
    """Return the seconds over one of `parts` microbatches."""
    tokens = workload.tokens / layout.token_ways / parts
    share = 1 / layout.mesh.stage
    rate = _flops_per_s(topology, workload.compute_dtype, fitted)
    forward = dict.fromkeys(("context", "head", "other"), 0.0)
    for product in sizes.products:
        # Stages share the layers, or for the head the tokens.
        is_head = product.tensor == "head"
        rows, held = (share * tokens, 1.0) if is_head else (tokens, share)
        seconds = _product_s(product, rows, layout, topology, workload, fitted)
        forward[product.tensor] = forward.get(product.tensor, 0.0) + held * seconds
    rest = sizes.matmul_params - sum(product.active for product in sizes.products)
    forward["other"] += share * 2 * rest * tokens / rate
    attention = _attention_s(layout, sizes, topology, workload, fitted)
    forward["context"] += share * tokens * attention
    byte_s = compute_bytes(workload) / hbm_rate(topology)
    logits = share * tokens * sizes.logits / layout.width_ways["vocab"]
    widths = tensor_widths(layout, sizes)
    return Work(
        forward=forward,
        between=share
        * fitted.elementwise
        * tokens
        * _between_width(layout, sizes)
        * byte_s,
        loss=fitted.elementwise * logits * LOGIT_TRAFFIC / hbm_rate(topology),
        saved={
            name: share * fitted.kept * tokens * sizes.layers * width * byte_s
            for name, width in widths.items()
        },
        gradients=1 if sizes.is_frozen else 2,
    )


def tensor_widths(layout: Layout, sizes: Sizes) -> dict[str, float]:
    """Elements per token of one layer's tensors on one device, by name: of the token's
    share, where tokens are split once more between blocks."""
    ways = layout.width_ways
    D = sizes.embed / ways["embed"] / layout.residual_ways
    NH = sizes.query_width / ways["heads"]
    KH = sizes.kv_width / ways["kv_heads"]
    F = max(1, sizes.experts_per_token) * sizes.ffn / ways["ffn"]
    return {
        "layer_input": D,
        "query": NH,
        "key": KH,
        "value": KH,
        "context": NH,
        "out": D,
        "ffn_gate": F,
        "ffn_up": F,
        "ffn_out": D,
    }


def compute_bytes(workload: Workload) -> int:
    """Bytes of an activation: 8-bit compute casts around its products only."""
    return max(2, dtype_bytes(workload.compute_dtype))


def hbm_rate(topology: Topology) -> float:
    """Bytes/s that one device moves to and from its memory."""
    chip = topology.chip
    return chip.hbm_bytes_per_s * chip.hbm_efficiency / chip.devices_per_chip


def _product_s(
    product: Product,
    tokens: float,
    layout: Layout,
    topology: Topology,
    workload: Workload,
    fitted: Fitted,
) -> float:
    """Seconds to multiply `tokens` of one device with one weight, in all its layers."""
    m = tokens
    k = product.summed / layout.width_ways.get(product.summed_axis or "", 1)
    n = product.made / layout.width_ways.get(product.made_axis or "", 1)
    flops = 2 * tokens * k * n * product.chosen
    rate = _flops_per_s(topology, multiplied_in(product, workload), fitted)
    if product.experts > 1:
        rate *= fitted.grouped
        m = tokens * product.chosen * layout.mesh.expert / product.experts
    per_flop = (1 / max(1.0, m) + 1 / k + 1 / n) * dtype_bytes(workload.compute_dtype)
    unhidden = fitted.operands * per_flop / 2 / hbm_rate(topology)
    return product.layers * flops * (1 / rate + unhidden)


def multiplied_in(product: Product, workload: Workload) -> str:
    """The dtype whose peak a product runs at."""
    few_bits = product.few_bits
    if few_bits is None or few_bits.activations == "none":
        return workload.compute_dtype
    return few_bits.activations


def _flops_per_s(topology: Topology, dtype: str, fitted: Fitted) -> float:
    """What large products of a dtype reach on one device."""
    rate = topology.peak_flops_per_s(dtype) * topology.chip.matmul_efficiency
    is_narrow = dtype_bytes(dtype) == 1 and dtype in topology.chip.peak_flops_per_s
    return rate * fitted.quantized if is_narrow else rate


def _attention_s(
    layout: Layout,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    fitted: Fitted,
) -> float:
    """Seconds per token of causal attention forward, in all layers."""
    width = sizes.query_width / layout.width_ways["heads"]
    keys = sizes.keys_seen(workload.seq_len, BLOCK)
    flops = 4 * sizes.layers * width * keys
    chip = topology.chip
    used = min(1.0, sizes.head_dim / chip.matmul_tile)
    peak = topology.peak_flops_per_s("bfloat16") * chip.matmul_efficiency
    return flops / (peak * used * fitted.attention)


def _between_width(layout: Layout, sizes: Sizes) -> float:
    """Elements per token that one forward pass reads or writes between its products.

    Per layer two norms and two sums read and write D twice each, 8 D; rotation reads
    and writes q and k; SwiGLU reads gate and up and writes their product; routing
    copies a token to its experts and back, 4 D for each.
    """
    D = sizes.embed / max(layout.width_ways["embed"], layout.mesh.tensor)
    NH = sizes.query_width / layout.width_ways["heads"]
    KH = sizes.kv_width / layout.width_ways["kv_heads"]
    width = sizes.layers * (8 * D + 2 * NH + 2 * KH)
    for product in sizes.products:
        if product.tensor in FFN_IN:
            made = product.made / layout.width_ways.get(product.made_axis or "", 1)
            width += 1.5 * product.layers * product.chosen * made
        if product.tensor == "ffn_out" and product.experts > 1:
            width += 4 * product.layers * product.chosen * D
    return width
