"""ModelConfig + ParallelContext -> this rank's part of a megatron-core GPT, filled with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from modellink_lora.config.model import ModelConfig
from modellink_lora.device import Device
from modellink_lora.models.dropout import Dropout
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import Vocab
from modellink_lora.models.rope import inverse_frequencies
from modellink_lora.models.shapes import full_shape
from modellink_lora.models.spec import block_spec
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
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
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
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # that is, the spec's own activation (models/spec.py): gate and product in one
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
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
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, although there are no experts
    )
    return TransformerConfig(**{**settings, **overrides})


def build_chunks(
    config: ModelConfig,
    context: ParallelContext,
    partition: Partition,
    device: Device,
    *,
    dtype: str,
    overrides: Mapping[str, Any] | None = None,
) -> list[GPT]:
    """The chunks of this rank's stage, with memory allocated and nothing in it; `fill` puts the weights there.

    Args:
        overrides: fields of megatron-core's TransformerConfig, such as recompute settings.
    """
    megatron = transformer_config(config, context, partition, dtype, overrides or {})
    return [_build_chunk(config, megatron, context, partition, device, chunk) for chunk in range(partition.chunks)]


def _build_chunk(
    config: ModelConfig,
    megatron: TransformerConfig,
    context: ParallelContext,
    partition: Partition,
    device: Device,
    chunk: int,
) -> GPT:
    model = GPT(
        megatron,
        block_spec(megatron, device, len(partition.layers(context.pp_rank, chunk)), context.tp_rank),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=context.is_first_stage and chunk == 0,
        post_process=context.is_last_stage and chunk == partition.chunks - 1,
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=int(config.rotary_base),  # replaced below: megatron-core knows only one scaling
        vp_stage=chunk if partition.chunks > 1 else None,
    ).to(context.device)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(config).to(context.device)
    if model.pre_process:
        cut = "positions" if context.sequence_parallel else None
        model.embedding.embedding_dropout = Dropout(config.hidden_dropout, rank=context.tp_rank, cut=cut)
    model.model_config = config
    rows = config.padded_vocab_size // context.tp_size
    model.first_padding_column = max(0, min(rows, config.vocab_size - context.tp_rank * rows))
    return model


def fill(
    model: GPT, weights: Weights, family: Family, context: ParallelContext, partition: Partition, chunk: int = 0
) -> None:
    """Copy this rank's shards into every parameter of a chunk. The vocabulary is padded anew for this layout."""
    config = model.model_config
    for local, parameter in model.named_parameters():
        name = partition.to_global(local, context.pp_rank, chunk)
        if name == "output_layer.weight" and not config.untie_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
        layout = family.tensor(name, config).layout
        if isinstance(layout, Vocab):
            shard = layout.shard(layout.fuse([weights.read(name)]), context.tp_rank, context.tp_size)
        else:
            shard = weights.read_shard(name, context.tp_rank, context.tp_size)
        assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
        with torch.no_grad():
            parameter.copy_(shard)
