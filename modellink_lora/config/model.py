"""The dimensions and switches that define one model, in Megatron's names."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import flag

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ModelConfig:
    """Model (read from the checkpoint; a flag that contradicts it is an error)"""

    num_layers: int = flag(0, "transformer layers")
    hidden_size: int = flag(0, "width of the residual stream, h")
    num_attention_heads: int = flag(0, "query heads")
    ffn_hidden_size: int = flag(0, "width of the MLP, f")
    num_query_groups: int = flag(0, "key/value heads, g; default the number of query heads")
    kv_channels: int = flag(0, "width of one head, d; default hidden size / heads")
    max_position_embeddings: int = flag(0, "longest sequence the model was made for")
    vocab_size: int = flag(0, "tokens of the model, without padding")
    make_vocab_size_divisible_by: int = flag(1, "the padded vocabulary is a multiple of this times TP")
    padded_vocab_size: int = flag(0, "rows of the embedding in the checkpoint")
    normalization: str = flag("LayerNorm", "norm of the layers", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float = flag(1e-5, "epsilon inside the norm")
    swiglu: bool = flag(False, "gated SiLU MLP")
    position_embedding_type: str = flag(
        "learned_absolute", "position information", choices=("learned_absolute", "rope", "alibi")
    )
    rotary_base: float = flag(10000.0, "theta of the rotary embedding")
    rotary_percent: float = flag(1.0, "part of each head that is rotated")
    rope_scaling_type: str | None = flag(None, "rotary scaling", choices=("linear", "llama3"))
    rope_scaling_factor: float = flag(1.0, "factor of the rotary scaling")
    low_freq_factor: float = flag(1.0, "llama3 rotary scaling: low_freq_factor")
    high_freq_factor: float = flag(4.0, "llama3 rotary scaling: high_freq_factor")
    original_max_position_embeddings: int = flag(8192, "llama3 rotary scaling: length before it was extended")
    untie_embeddings_and_output_weights: bool = flag(False, "output layer with weights of its own")
    add_qkv_bias: bool = flag(False, "bias on the q, k and v projections (Qwen2)")
    qk_layernorm: bool = flag(False, "norm of each query and key head (Qwen3)")
    sliding_window: int = flag(0, "attention window of the source model; 0 for none", hidden=True)
    attention_dropout: float = flag(0.0, "dropout of attention weights; default what the model's config says")
    hidden_dropout: float = flag(0.0, "dropout of the residual branches; default what the model's config says")
    init_method_std: float = flag(0.02, "standard deviation of random initial weights")
    hf_model_type: str = flag("llama", "model_type of the Hugging Face config the model came from", hidden=True)
    params_dtype: str = flag("fp32", "dtype of the weights", choices=DTYPES, hidden=True)

    def __post_init__(self) -> None:
        """Fill derived sizes. Raises UserError when the numbers do not make a model this package can run."""
        for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is missing: give it, or --load a checkpoint that holds the dimensions"
                )
        derived = {
            "num_query_groups": self.num_attention_heads,
            "kv_channels": self.hidden_size // self.num_attention_heads,
            "ffn_hidden_size": int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size,
            "padded_vocab_size": pad_vocab(self.vocab_size, self.make_vocab_size_divisible_by),
        }
        for name, value in derived.items():
            if getattr(self, name) < 1:
                object.__setattr__(self, name, value)
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"{self.num_attention_heads} heads cannot share {self.num_query_groups} query groups evenly"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise UserError(
                f"--padded-vocab-size {self.padded_vocab_size} is below the vocabulary of {self.vocab_size}"
            )
        for name, supported in (("normalization", "RMSNorm"), ("swiglu", True), ("position_embedding_type", "rope")):
            if getattr(self, name) != supported:
                raise UserError(
                    f"{name} {getattr(self, name)} is not supported: this version runs models with RMSNorm, SwiGLU and "
                    "rotary positions (--normalization RMSNorm --swiglu --position-embedding-type rope)"
                )
        if self.rotary_percent != 1.0:
            raise UserError(f"--rotary-percent {self.rotary_percent}: only fully rotated heads (1.0) are supported")
        if self.params_dtype not in DTYPES:
            raise UserError(f"params_dtype {self.params_dtype!r}: choose one of {', '.join(DTYPES)}")

    def parameter_count(self) -> int:
        """All parameters of the model, without vocabulary padding."""
        h, f, q, kv = self.hidden_size, self.ffn_hidden_size, self.query_width, self.kv_width
        layer = h * (q + 2 * kv) + q * h + 3 * h * f + 2 * h
        layer += (q + 2 * kv) * self.add_qkv_bias + 2 * self.kv_channels * self.qk_layernorm
        return (
            self.num_layers * layer + h + self.vocab_size * h * (2 if self.untie_embeddings_and_output_weights else 1)
        )

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        return self.num_query_groups * self.kv_channels

    def padded_for(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rows on that many tensor ranks: these where they divide, else the next multiple."""
        if self.padded_vocab_size % tensor_model_parallel_size == 0:
            return self.padded_vocab_size
        return pad_vocab(self.vocab_size, self.make_vocab_size_divisible_by * tensor_model_parallel_size)

    def with_flags(self, given: dict[str, Any], source: str) -> ModelConfig:
        """This config, read from `source`, under flags that the user typed.

        A flag that changes neither shapes nor the function computed replaces the value; any other must agree.
        """
        changes = {}
        for name, value in given.items():
            stored = getattr(self, name)
            if name in _FREE:
                changes[name] = value
            elif not _same(stored, value):
                raise UserError(
                    f"--{name.replace('_', '-')} {value} contradicts {source}, which says {stored}: remove the flag"
                )
        return dataclasses.replace(self, **changes)


_FREE = {
    "max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method_std",
    "make_vocab_size_divisible_by", "padded_vocab_size",
}  # fmt: skip


def _same(stored: Any, given: Any) -> bool:
    if isinstance(stored, float) and isinstance(given, float):
        return math.isclose(stored, given, rel_tol=1e-6)
    return bool(stored == given)


def pad_vocab(vocab_size: int, multiple: int) -> int:
    """Rows of an embedding of `vocab_size` tokens padded to a multiple of `multiple`."""
    return -(-vocab_size // multiple) * multiple
