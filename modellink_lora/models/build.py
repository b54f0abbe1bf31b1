"""ModelConfig + ParallelContext -> this rank's part of a megatron-core GPT, filled with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from modellink_lora.checkpoint.names import from_module
from modellink_lora.config.model import ModelConfig
from modellink_lora.device import Device
from modellink_lora.megatron.differences import complete, config_fields, set_chunks
from modellink_lora.models.dropout import Dropout
from modellink_lora.models.family import Family
from modellink_lora.models.finite import check_weight
from modellink_lora.models.layouts import Vocab
from modellink_lora.models.parts import LayerParts
from modellink_lora.models.rope import inverse_frequencies
from modellink_lora.models.shapes import full_shape, kinds_of
from modellink_lora.models.spec import Router, activation_spec, block_spec, local_parts, norm_spec
from modellink_lora.models.te_spec import te_parts
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.partition import Partition
from modellink_lora.parallel.random import normal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Weights(Protocol):
    """Where weights come from: full tensors by global Megatron name, or the shard of one rank."""

    def read(self, name: str) -> Tensor: ...
    def read_shard(self, name: str, rank: int, size: int) -> Tensor: ...


@dataclass(frozen=True)
class RandomWeights:
    """Random weights drawn from (seed, name): the same model on every layout."""

    family: Family
    config: ModelConfig
    seed: int

    def read(self, name: str) -> Tensor:
        shape = full_shape(name, self.config)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.zeros(shape) if self.config.add_rmsnorm_offset else torch.ones(shape)
        return normal(name, shape, seed=self.seed, std=self.config.init_method_std)

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        return self.family.tensor(name, self.config).layout.shard(self.read(name), rank, size)


class GPT(GPTModel):
    """megatron-core's GPT without its one silent error: padding rows of the vocabulary take no part in the softmax."""

    model_config: ModelConfig
    first_padding_column: int  # on this rank

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, v / t] -> [b, s] token losses in fp32."""
        if self.first_padding_column < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.first_padding_column
            logits = logits.masked_fill(padding, float("-inf"))
        return super().compute_language_model_loss(labels, logits)

    def require_input_grad(self) -> None:
        """Make embeddings differentiable: a checkpointed layer whose input needs no gradient would train nothing."""
        if self.pre_process:
            self.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def transformer_config(
    config: ModelConfig, context: ParallelContext, partition: Partition, dtype: str, overrides: Mapping[str, Any]
) -> TransformerConfig:
    """megatron-core's own configuration of this model on this layout."""
    runs = [["decoder"] * count for count in partition.counts]
    runs[0].insert(0, "embedding")
    runs[-1].append("loss")
    interleaved = partition.chunks > 1
    settings: dict[str, Any] = dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization=config.normalization,
        layernorm_epsilon=config.norm_epsilon,
        layernorm_zero_centered_gamma=config.add_rmsnorm_offset,  # of Transformer Engine's norms; ours are told apart
        gated_linear_unit=config.gated,
        activation_func=F.silu if config.swiglu else F.gelu,
        use_te_activation_func=True,  # that is, the spec's own activation (models/spec.py): gate and product in one
        add_bias_linear=config.add_mlp_bias,  # of the MLP; models/spec.py decides about attention's output
        add_qkv_bias=config.add_qkv_bias,
        softmax_scale=config.query_pre_attn_scalar**-0.5 if config.query_pre_attn_scalar else None,
        rotary_interleaved=config.rotary_interleaved,
        qk_layernorm=config.qk_layernorm,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        tensor_model_parallel_size=context.tp_size,
        pipeline_model_parallel_size=context.pp_size,
        pipeline_model_parallel_layout=runs if context.pp_size > 1 else None,
        virtual_pipeline_model_parallel_size=partition.chunks if interleaved else None,
        # The interleaved schedule sends forward and backward between the same two processes when there are two stages.
        # Posted in one batch, the sends would be matched crosswise, silently; one by one they cannot.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=context.sequence_parallel,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        perform_initialization=False,  # every tensor is filled by `fill`
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=False,  # a use-after-free on gloo, and worth one activation elsewhere
        num_moe_experts=config.num_experts or None,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size or None,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_load_balancing_type="none",
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size or None,
        moe_shared_expert_gate=config.moe_shared_expert_gate,
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, even where there are no experts
    )
    return TransformerConfig(**config_fields({**settings, **overrides}))


def build_chunks(
    config: ModelConfig,
    context: ParallelContext,
    partition: Partition,
    device: Device,
    *,
    dtype: str,
    overrides: Mapping[str, Any] | None = None,
    transformer_impl: str = "local",
) -> list[GPT]:
    """The chunks of this rank's stage, with memory allocated and nothing in it; `fill` puts the weights there.

    Args:
        overrides: fields of megatron-core's TransformerConfig, such as recompute settings.
        transformer_impl: "local" or "transformer_engine".
    """
    set_chunks(partition.chunks)
    megatron = transformer_config(config, context, partition, dtype, overrides or {})
    parts = te_parts() if transformer_impl == "transformer_engine" else local_parts(config, device)
    return [
        _build_chunk(config, megatron, context, partition, device, chunk, parts) for chunk in range(partition.chunks)
    ]


def _build_chunk(
    config: ModelConfig,
    megatron: TransformerConfig,
    context: ParallelContext,
    partition: Partition,
    device: Device,
    chunk: int,
    parts: LayerParts,
) -> GPT:
    rope = config.position_embedding_type == "rope"
    model = GPT(
        megatron,
        block_spec(megatron, config, device, len(partition.layers(context.pp_rank, chunk)), context.tp_rank, parts),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=context.is_first_stage and chunk == 0,
        post_process=context.is_last_stage and chunk == partition.chunks - 1,
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        position_embedding_type="rope" if rope else "none",  # ALiBi is attention's affair
        rotary_base=int(config.rotary_base),  # replaced below: megatron-core knows only one scaling
        vp_stage=chunk if partition.chunks > 1 else None,
    )
    complete(model, activation_spec(config, device), Router)
    model.to(context.device)
    if rope:
        model.rotary_pos_emb.inv_freq = inverse_frequencies(config).to(context.device)
    if model.pre_process:
        shape_embedding(model.embedding.word_embeddings, config, megatron, device)
        cut = "positions" if context.sequence_parallel else None
        model.embedding.embedding_dropout = Dropout(config.hidden_dropout, rank=context.tp_rank, cut=cut)
    if model.post_process:
        shape_logits(model.output_layer, config)
    model.model_config = config
    rows = config.padded_vocab_size // context.tp_size
    model.first_padding_column = max(0, min(rows, config.vocab_size - context.tp_rank * rows))
    return model


def shape_embedding(
    embedding: torch.nn.Module, config: ModelConfig, megatron: TransformerConfig, device: Device
) -> None:
    """Scale and norm what the lookup gives, where the model does."""
    if config.embed_layernorm:
        spec = norm_spec(config, device)
        embedding.norm = spec.module(megatron, config.hidden_size, config.norm_epsilon, **spec.params)

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:  # [b, s, h], or [s / t, b, h]
        if config.input_embeds_norm:  # the root is rounded to the model's dtype, as the source does
            output = output * torch.full((), config.hidden_size**0.5, dtype=output.dtype, device=output.device)
        if config.scale_emb != 1.0:
            output = output * config.scale_emb
        return module.norm(output) if config.embed_layernorm else output

    if config.input_embeds_norm or config.scale_emb != 1.0 or config.embed_layernorm:
        embedding.register_forward_hook(hook)


def shape_logits(output_layer: torch.nn.Module, config: ModelConfig) -> None:
    """Scale the input of the output layer and cap its logits, where the model does."""
    if config.dim_model_base:
        output_layer.register_forward_pre_hook(lambda module, args: (head_input(args[0], config), *args[1:]))
    if config.final_logit_softcapping:
        output_layer.register_forward_hook(lambda module, args, out: (capped(out[0], config), *out[1:]))


def head_input(x: Tensor, config: ModelConfig) -> Tensor:
    """What the output layer multiplies."""
    return x / (config.hidden_size / config.dim_model_base) if config.dim_model_base else x


def capped(logits: Tensor, config: ModelConfig) -> Tensor:
    """Logits within their bounds; those that are not finite become NaN."""
    cap = config.final_logit_softcapping
    if not cap:
        return logits
    scaled = logits / cap
    # tanh would make an ordinary number of infinity, and an overflow would be an answer: 0 x infinity is NaN
    scaled.sub_(scaled.detach(), alpha=0)
    return torch.tanh(scaled) * cap


def fill(
    model: GPT, weights: Weights, family: Family, context: ParallelContext, partition: Partition, chunk: int = 0,
    *, where: Path | None = None,
) -> dict[str, torch.dtype]:  # fmt: skip
    """Copy this rank's shards into every parameter of a chunk. The vocabulary is padded anew for this layout.

    Args:
        where: the checkpoint, for messages.
    Returns:
        Tensors whose values the parameter's dtype cannot keep -> their dtype in the checkpoint.
    Raises:
        UserError: a value is NaN or infinite, or would be in the parameter's dtype.
    """
    config, rounded = model.model_config, {}
    for local, parameter in model.named_parameters():
        name = from_module(partition.to_global(local, context.pp_rank, chunk))
        if name == "output_layer.weight" and not config.untie_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
        layout = family.tensor(name, config).layout
        if isinstance(layout, Vocab):
            shard = layout.shard(layout.fuse([weights.read(name)]), context.tp_rank, context.tp_size)
        else:
            shard = weights.read_shard(name, context.tp_rank, context.tp_size)
        assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
        check_weight(shard, parameter.dtype, f"{where}: {name}" if where else name)
        if torch.promote_types(shard.dtype, parameter.dtype) != parameter.dtype:
            rounded[name] = shard.dtype
        with torch.no_grad():
            parameter.copy_(shard)
            if config.normalize_head and name == "output_layer.weight":
                # each row belongs to one rank; the base is frozen and never written from here, so once is enough
                parameter.copy_(F.normalize(parameter))
    return rounded


def rounding_notes(rounded: Mapping[str, torch.dtype], dtype: str) -> list[str]:
    """What of the checkpoint `fill` rounded on any rank, in words; a line for each dtype. All ranks must call it."""
    ranks: list[Any] = [rounded]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, dict(rounded))
    everywhere = {name: kind for each in ranks for name, kind in each.items()}
    return [
        f"rounded from {str(kind).removeprefix('torch.')} to {dtype}: "
        + kinds_of([name for name, source in everywhere.items() if source == kind])
        for kind in dict.fromkeys(everywhere.values())
    ]
