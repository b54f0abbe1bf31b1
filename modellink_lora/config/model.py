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
    add_rmsnorm_offset: bool = flag(False, "RMSNorm multiplies by 1 + weight (Gemma)")
    embed_layernorm: bool = flag(False, "norm on the embedding (BLOOM)")
    post_norm: bool = flag(False, "norms behind attention and MLP as well as before them (Gemma 2, GLM-4-0414)")
    swiglu: bool = flag(False, "gated SiLU MLP")
    geglu: bool = flag(False, "gated GELU MLP; without --swiglu and --geglu the MLP is a GELU without gate")
    gelu_tanh: bool = flag(False, "GELU in its tanh approximation (Gemma, BLOOM)")
    position_embedding_type: str = flag(
        "learned_absolute", "position information", choices=("learned_absolute", "rope", "alibi")
    )
    rotary_base: float = flag(10000.0, "theta of the rotary embedding")
    rotary_percent: float = flag(1.0, "part of each head that is rotated")
    rotary_interleaved: bool = flag(
        False, "rotary pairs are neighbours instead of halves (GLM)", aliases=("use-glm-rope",)
    )
    rope_scaling_type: str | None = flag(None, "rotary scaling", choices=("linear", "llama3", "dynamic"))
    rope_scaling_factor: float = flag(1.0, "factor of the rotary scaling")
    low_freq_factor: float = flag(1.0, "llama3 rotary scaling: low_freq_factor")
    high_freq_factor: float = flag(4.0, "llama3 rotary scaling: high_freq_factor")
    original_max_position_embeddings: int = flag(8192, "llama3 rotary scaling: length before it was extended")
    untie_embeddings_and_output_weights: bool = flag(False, "output layer with weights of its own")
    add_qkv_bias: bool = flag(False, "bias on the q, k and v projections (Qwen2)")
    add_dense_bias: bool = flag(False, "bias on the attention's output projection (InternLM, BLOOM)")
    add_mlp_bias: bool = flag(False, "biases in the MLP (BLOOM)")
    qk_layernorm: bool = flag(False, "norm of each query and key head (Qwen3)")
    input_embeds_norm: bool = flag(False, "embeddings are multiplied by the root of the hidden size (Gemma)")
    scale_emb: float = flag(1.0, "embeddings are multiplied by this (MiniCPM)")
    scale_depth: float = flag(0.0, "residual branches are multiplied by this / root of the layers (MiniCPM); 0 for 1")
    dim_model_base: int = flag(0, "the head's input is divided by hidden size / this (MiniCPM); 0 for 1")
    normalize_head: bool = flag(False, "rows of the output layer are used at length 1 (Baichuan 2, Index)")
    query_pre_attn_scalar: float = flag(0.0, "attention scores are divided by the root of this; 0 for the head's width")
    attn_logit_softcapping: float = flag(0.0, "scores become c tanh(scores / c) (Gemma 2); 0 for none")
    final_logit_softcapping: float = flag(0.0, "logits become c tanh(logits / c) (Gemma 2); 0 for none")
    sliding_window: int = flag(0, "attention window of the source model; 0 for none", hidden=True)
    num_experts: int = flag(0, "experts of each layer's MLP; 0 for a dense model")
    moe_router_topk: int = flag(2, "experts that each token is sent to")
    moe_router_pre_softmax: bool = flag(
        False, "weights of a token's experts are a softmax over all experts (Qwen2-MoE), else over the chosen ones"
    )
    moe_ffn_hidden_size: int = flag(
        0, "width of one expert; default --ffn-hidden-size", aliases=("moe-intermediate-size",)
    )
    moe_shared_expert_intermediate_size: int = flag(0, "width of the expert that sees every token; 0 for none")
    moe_shared_expert_gate: bool = flag(
        False, "the shared expert's output has a gate for each token (Qwen2-MoE)", aliases=("shared-expert-gate",)
    )
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
            "ffn_hidden_size": int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.gated else 4 * self.hidden_size,
            "padded_vocab_size": pad_vocab(self.vocab_size, self.make_vocab_size_divisible_by),
        }
        for name, value in derived.items():
            if getattr(self, name) < 1:
                object.__setattr__(self, name, value)
        if self.num_experts and self.moe_ffn_hidden_size < 1:
            object.__setattr__(self, "moe_ffn_hidden_size", self.ffn_hidden_size)
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"{self.num_attention_heads} heads cannot share {self.num_query_groups} query groups evenly"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise UserError(
                f"--padded-vocab-size {self.padded_vocab_size} is below the vocabulary of {self.vocab_size}"
            )
        for problem, holds in self._contradictions().items():
            if holds:
                raise UserError(f"no model here has that: {problem}")
        if self.params_dtype not in DTYPES:
            raise UserError(f"params_dtype {self.params_dtype!r}: choose one of {', '.join(DTYPES)}")

    def _contradictions(self) -> dict[str, bool]:
        """What models here cannot be, and whether this one is. A setting that `models` would not obey stands here."""
        rope = self.position_embedding_type == "rope"
        rotated = self.kv_channels * self.rotary_percent
        return {
            "--position-embedding-type learned_absolute: give rope or alibi":
                self.position_embedding_type == "learned_absolute",
            "--swiglu together with --geglu": self.swiglu and self.geglu,
            "--gelu-tanh together with --swiglu": self.gelu_tanh and self.swiglu,
            f"--rotary-percent {self.rotary_percent:g} of {self.kv_channels} channels is not a whole number of pairs":
                rope and (not 0 < self.rotary_percent <= 1 or rotated != int(rotated) or int(rotated) % 2 == 1),
            "rotary settings together with --position-embedding-type alibi": not rope and (
                self.rotary_percent != 1 or self.rotary_interleaved or self.rope_scaling_type is not None),
            "--add-rmsnorm-offset without --normalization RMSNorm": self.add_rmsnorm_offset and self.norm_bias,
            "--qk-layernorm or --post-norm without --normalization RMSNorm":
                (self.qk_layernorm or self.post_norm) and self.norm_bias,
            "--add-dense-bias without --add-qkv-bias": self.add_dense_bias and not self.add_qkv_bias,
            "--input-embeds-norm together with --scale-emb": self.input_embeds_norm and self.scale_emb != 1,
            "a normalized output layer that is also the embedding: give --untie-embeddings-and-output-weights":
                self.normalize_head and not self.untie_embeddings_and_output_weights,
            "experts without --swiglu, or with MLP biases or --post-norm":
                self.num_experts > 0 and (not self.swiglu or self.add_mlp_bias or self.post_norm),
            "--moe-ffn-hidden-size or --moe-shared-expert-intermediate-size without --num-experts":
                self.num_experts == 0 and (self.moe_ffn_hidden_size or self.moe_shared_expert_intermediate_size) > 0,
            "--moe-shared-expert-gate without --moe-shared-expert-intermediate-size":
                self.moe_shared_expert_gate and not self.moe_shared_expert_intermediate_size,
            f"--moe-router-topk {self.moe_router_topk} of {self.num_experts} experts":
                self.num_experts > 0 and not 0 < self.moe_router_topk <= self.num_experts,
            "--moe-router-topk 1 without --moe-router-pre-softmax, where every weight would be 1":
                self.num_experts > 0 and self.moe_router_topk == 1 and not self.moe_router_pre_softmax,
            "a negative scale or soft cap": min(self.scale_emb, self.scale_depth, self.dim_model_base,
                self.query_pre_attn_scalar, self.attn_logit_softcapping, self.final_logit_softcapping) < 0,
        }  # fmt: skip

    def parameter_count(self) -> int:
        """All parameters of the model, without vocabulary padding."""
        h, f, q, kv = self.hidden_size, self.ffn_hidden_size, self.query_width, self.kv_width
        norm, columns = h * (1 + self.norm_bias), f * self.fc1_parts
        layer = h * (q + 2 * kv) + q * h + self.mlp_weights(self.num_experts) + norm * (4 if self.post_norm else 2)
        layer += (q + 2 * kv) * self.add_qkv_bias + h * self.add_dense_bias + (columns + h) * self.add_mlp_bias
        layer += 2 * self.kv_channels * self.qk_layernorm
        ends = norm * (2 if self.embed_layernorm else 1)
        ends += self.vocab_size * h * (2 if self.untie_embeddings_and_output_weights else 1)
        return self.num_layers * layer + ends

    def mlp_weights(self, experts: int, tp: int = 1) -> int:
        """Elements of the weights of one layer's MLP on each of `tp` ranks; of mixtures with that many experts."""
        one = self.hidden_size * (self.fc1_parts + 1)  # per unit of width
        if not self.num_experts:
            return one * self.ffn_hidden_size // tp
        whole = self.hidden_size * (self.num_experts + self.moe_shared_expert_gate)  # router and gate
        return one * (experts * self.moe_ffn_hidden_size + self.moe_shared_expert_intermediate_size) // tp + whole

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """Width of the MLP, or experts of a mixture, width of one and of the shared one, and whether it is gated."""
        if not self.num_experts:
            return (self.ffn_hidden_size,)
        shared = self.moe_shared_expert_intermediate_size, int(self.moe_shared_expert_gate)
        return self.num_experts, self.moe_ffn_hidden_size, *shared

    @property
    def widths_cut_by_tp(self) -> dict[str, int]:
        """Sizes that the tensor parallel size has to divide."""
        widths = {"attention heads": self.num_attention_heads, "query groups": self.num_query_groups}
        if not self.num_experts:
            return {**widths, "ffn_hidden_size rows": self.ffn_hidden_size}
        shared = self.moe_shared_expert_intermediate_size
        return {**widths, "rows of an expert": self.moe_ffn_hidden_size} | (
            {"rows of the shared expert": shared} if shared else {}
        )

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its activation by a second projection."""
        return self.swiglu or self.geglu

    @property
    def fc1_parts(self) -> int:
        """Projections in linear_fc1: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def norm_bias(self) -> bool:
        """LayerNorm has a bias beside its weight."""
        return self.normalization == "LayerNorm"

    @property
    def residual_scale(self) -> float:
        return self.scale_depth / math.sqrt(self.num_layers) if self.scale_depth else 1.0

    @property
    def exact_length(self) -> int:
        """Tokens up to which source and model here compute the same; 0 for no such limit.

        Behind it the source attends through a window or changes its rotary frequencies with the length.
        """
        limits = [self.sliding_window]
        if self.rope_scaling_type == "dynamic":
            limits.append(self.original_max_position_embeddings)
        return min(filter(None, limits), default=0)

    def beyond_llama(self) -> list[str]:
        """Settings of what this model computes and Llama does not, apart from sizes, q/k/v biases and head norms."""
        plain = {
            "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "rotary_percent": 1.0,
            **dict.fromkeys(("add_rmsnorm_offset", "embed_layernorm", "post_norm", "rotary_interleaved",
                             "add_dense_bias", "add_mlp_bias", "input_embeds_norm"), False),
            "scale_emb": 1.0, "scale_depth": 0.0, "dim_model_base": 0, "attn_logit_softcapping": 0.0,
            "final_logit_softcapping": 0.0, "num_experts": 0,
        }  # fmt: skip
        return [f"{name} {getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]

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
