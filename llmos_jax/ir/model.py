"""ModelSpec: the numbers that make one model of a family.

Letters as in sharding_rules/axes.toml: D embed_dim, F ffn_dim, L num_layers, N
num_heads, K num_kv_heads, H head_dim, V vocab_size. A spec holds sizes and constants of
the mathematics; it knows nothing of chips, batches or dtypes of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmos_jax.errors import ConfigError
from llmos_jax.ir.artefact import Artefact


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotation is slowed for contexts longer than a model was first trained on.

    `llama3` slows low frequencies only (Meta's llama-models, `apply_scaling`, 2024-07);
    `linear` divides every position by `factor` (arXiv 2306.15595), in Gemma's global
    layers alone.
    """

    kind: Literal["llama3", "linear"] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Small trainable factors beside frozen weights: W + alpha / rank * A B (arXiv
    2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names in LORA_TARGETS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """In how few bits a model's matrices are stored, and what they are multiplied with.

    The matrices are those of attention, of dense feed-forward blocks, the table of
    embeddings and the head; norms, biases and routers stay. Scales are symmetric: a
    weight is its whole number times its scale.
    """

    weights: Literal["int8", "int4", "float8"] = "int8"
    """`float8` is float8_e4m3fn."""
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output (per channel)."""
    activations: Literal["none", "int8", "float8"] = "none"
    """`none`: only weights have few bits. Else each token is quantized on its way into
    a product, with one scale, and whole numbers are multiplied."""
    embedding: Literal["int8", "none"] = "int8"
    """The table of embeddings, a scale for each token; with tied embeddings also the
    head."""
    head: Literal["int8", "none"] = "int8"
    """The head of an untied model, a scale for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """What a classifier tells apart, and from what of a text it does."""

    labels: tuple[str, ...]
    """Names, in the order of its outputs."""
    pooling: Literal["mean", "last", "max"] = "mean"
    """How the features of all tokens become those of the text."""
    is_frozen: bool = False
    """Whether all but the head that gives the classes stays as it is."""


CLASSIFIERS = ("lstm_classifier", "transformer_classifier")
"""Families that are nothing but classifiers; a decoder with `classes` is one, too."""

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Weights of a layer that may have factors beside them; of dense blocks, not of
experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Artefact):
    """One decoder-only transformer: RMSNorm, RoPE, grouped queries, a gated block.

    With experts, `ffn_dim` is the width of each expert. The defaults are a Llama's. A
    `transformer_classifier` is the same without a causal mask; of an `lstm_classifier`,
    `ffn_dim` is the width of a direction's state, and heads mean nothing.
    """

    name: str
    family: str
    num_layers: int
    embed_dim: int
    ffn_dim: int
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 2
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before rotation (Qwen3)."""
    num_experts: int = 0
    """Feed-forward blocks a router chooses from; 0: one dense block."""
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    """Whether the chosen experts' weights are made to sum to 1."""
    architecture: str = ""
    """What Hugging Face calls it (`model_type`): llama, mistral, mixtral, qwen2, qwen3,
    qwen3_moe, gemma2, gemma3_text. Empty: the plainest that has these features."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the gate: SwiGLU or GeGLU."""
    qkv_bias: bool = False
    """Biases on q, k and v (Qwen2)."""
    out_bias: bool = False
    """A bias on attention's output."""
    norm_offset: bool = False
    """RMSNorm multiplies by 1 + scale (Gemma)."""
    post_norms: bool = False
    """RMSNorm also on what attention and the feed-forward block give (Gemma 2, 3)."""
    scaled_embeddings: bool = False
    """Embeddings times the square root of `embed_dim` (Gemma)."""
    attention_scale: float | None = None
    """Scores are multiplied by this; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores s become c tanh(s / c) (Gemma 2)."""
    logit_softcap: float | None = None
    """The same of logits."""
    sliding_window: int | None = None
    """Tokens that a sliding layer sees, its own among them."""
    layer_pattern: tuple[Literal["sliding", "full"], ...] = ()
    """Which layers slide, repeated over all of them; empty: all, if there is a
    window."""
    local_rope_theta: float | None = None
    """`rope_theta` of sliding layers, never scaled (Gemma 3); None: the same."""
    lora: Lora | None = None
    """Factors beside weights, which alone are trained."""
    quantization: Quantization | None = None
    """None: all weights are floating-point numbers."""
    classes: Classes | None = None
    """What it tells apart, in place of predicting tokens; None: it is no classifier."""
    source: str = ""

    def check(self) -> ModelSpec:
        """Return self, or raise ConfigError for sizes that make no model."""
        for key in (
            "num_layers embed_dim ffn_dim num_heads num_kv_heads head_dim vocab_size "
            "max_seq_len"
        ).split():
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"model {self.name}: {key} is {getattr(self, key)}; "
                    "it must be at least 1."
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model {self.name}: num_heads = {self.num_heads} is not a multiple "
                f"of num_kv_heads = {self.num_kv_heads}; each KV head serves a whole "
                "number of query heads."
            )
        if not 0 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"model {self.name}: experts_per_token = {self.experts_per_token} of "
                f"num_experts = {self.num_experts}; a token takes at most all of them."
            )
        if self.num_experts and not self.experts_per_token:
            raise ConfigError(
                f"model {self.name}: {self.num_experts} experts and "
                "experts_per_token = 0; a token needs at least one."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model {self.name}: head_dim = {self.head_dim} is odd; "
                "RoPE rotates pairs."
            )
        self._check_window()
        self._check_classes()
        self._check_lora()
        self._check_quantization()
        return self

    def _check_window(self) -> None:
        if self.sliding_window is None and "sliding" in self.layer_pattern:
            raise ConfigError(
                f"model {self.name}: layer_pattern has sliding layers, and "
                "sliding_window does not say how far they see."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"model {self.name}: sliding_window = {self.sliding_window}; a token "
                "sees at least itself."
            )

    def _check_classes(self) -> None:
        if self.classes is None:
            return
        if self.family == "moe":
            raise ConfigError(
                f"model {self.name} has experts, and this release classifies with "
                "dense models only."
            )
        labels = self.classes.labels
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ConfigError(
                f"model {self.name}: its classes are {list(labels)}; a classifier "
                "tells two or more apart, each with a name of its own."
            )

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        unknown = [name for name in self.lora.targets if name not in LORA_TARGETS]
        if unknown or not self.lora.targets:
            raise ConfigError(
                f"lora.targets = {list(self.lora.targets)}; choose among "
                f"{', '.join(LORA_TARGETS)}."
            )
        if self.lora.rank < 1:
            raise ConfigError(f"lora.rank = {self.lora.rank}; it must be at least 1.")
        if self.num_experts and {"gate", "up", "down"} & set(self.lora.targets):
            raise ConfigError(
                f"model {self.name} has experts, which take no LoRA factors: choose "
                "lora.targets among q, k, v, o."
            )

    def _check_quantization(self) -> None:
        how = self.quantization
        if how is None:
            return
        if self.num_experts:
            raise ConfigError(
                f"model {self.name} has experts, and this release quantizes dense "
                "models only. Leave it in floating point."
            )
        if self.lora is not None:
            raise ConfigError(
                f"model {self.name} has LoRA factors; merge them before its weights "
                "are quantized: convert MODEL --to hf --out FOLDER."
            )
        if how.activations == "int8" and how.weights != "int8":
            raise ConfigError(
                "quantization: activations = int8 goes with weights = int8, which one "
                f"product of whole numbers takes; got weights = {how.weights}."
            )
        if how.activations == "float8" and how.weights != "float8":
            raise ConfigError(
                "quantization: activations = float8 goes with weights = float8; got "
                f"weights = {how.weights}."
            )
        if how.activations != "none" and how.group is not None:
            raise ConfigError(
                "quantization: groups of inputs have scales of their own, which a "
                "product of whole numbers cannot apply. Leave group out, or set "
                "activations = none."
            )
        if how.group is None:
            if how.weights == "int4":
                raise ConfigError(
                    "quantization: weights = int4 needs group, the inputs that share "
                    "a scale: 32 or 128."
                )
            return
        widths = sorted({self.embed_dim, self.ffn_dim, self.num_heads * self.head_dim})
        if how.group % 2 or how.group < 2 or any(w % how.group for w in widths):
            fitting = [
                g for g in (256, 128, 64, 32, 16) if not any(w % g for w in widths)
            ]
            raise ConfigError(
                f"quantization: group = {how.group} does not divide the inputs of "
                f"{self.name}'s matrices, {', '.join(map(str, widths))} wide. "
                f"These do: {', '.join(map(str, fitting)) or 'none'}."
            )

    @property
    def rules(self) -> str:
        """The file of sharding_rules/ that says how it may be split."""
        is_headed = self.classes is not None and self.family == "llama"
        return "transformer_classifier" if is_headed else self.family

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """Whether each layer sees no further than the window."""
        pattern = self.layer_pattern or (
            ("full",) if self.sliding_window is None else ("sliding",)
        )
        return tuple(
            pattern[layer % len(pattern)] == "sliding"
            for layer in range(self.num_layers)
        )

    @property
    def layer_period(self) -> int:
        """After how many layers the pattern of `is_sliding` begins again."""
        kinds = self.is_sliding
        return next(
            period
            for period in range(1, self.num_layers + 1)
            if all(kinds[i] == kinds[i % period] for i in range(self.num_layers))
        )

    @property
    def num_params(self) -> int:
        """Parameters in closed form: embeddings, attention, feed-forward and norms."""
        D, F, H = self.embed_dim, self.ffn_dim, self.head_dim
        N, K = self.num_heads, self.num_kv_heads
        attention = D * H * (2 * N + 2 * K) + 2 * H * self.qk_norm
        attention += (N + 2 * K) * H * self.qkv_bias + D * self.out_bias
        ffn = 3 * D * F * max(1, self.num_experts) + D * self.num_experts
        layer = attention + ffn + 2 * D * (1 + self.post_norms)
        if self.lora is not None:
            both = {"q": N * H, "k": K * H, "v": K * H, "o": N * H}
            widths = (both.get(name, F) + D for name in self.lora.targets)
            layer += self.lora.rank * sum(widths)
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * D + D
