"""Bytes that a rank will hold, known before anything is allocated. Pure arithmetic over configs.

Static parts are counted tensor by tensor. The peak of the rest is found by walking the pipeline schedule of the rank's
stage with what each layer keeps and needs on the way (planning/layer_tape.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modellink_lora.config.model import ModelConfig
from modellink_lora.parallel.partition import Partition
from modellink_lora.planning.fused_tape import border, level_of
from modellink_lora.planning.layer_tape import layer
from modellink_lora.planning.tape import TARGETS, WIDTH, Footprint, Fusion, Shapes, logits_bytes, loss

if TYPE_CHECKING:
    from modellink_lora.adapters.targets import AdaptedLinear

_BUCKET_PADDING = 128  # elements: megatron-core 0.16.1, param_and_grad_buffer.py, _pad_end_of_bucket_if_needed
Ranks = Mapping[tuple[int, str], int]  # LoRA rank by layer and target
_PARAMETER_PADDING = 64  # the same file, _pad_start_of_param_if_needed


@dataclass(frozen=True)
class Plan:
    """Everything that decides the memory of a rank, as the run's configs say it."""

    model: ModelConfig  # vocabulary padded for this layout
    partition: Partition
    tp: int
    dp: int
    sequence_parallel: bool
    micro_batch_size: int
    length: int  # padded
    micro_batches: int  # of one step on one replica
    dtype: str
    adapter_dtype: str
    lora_dropout: float = 0.0
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    distributed_optimizer: bool = False
    lora_fusion: bool = False
    lora_fusion_level: str = "auto"
    lora_fusion_chunks: int | None = None  # None: chosen for each shape
    recompute_lora_inputs: bool = True  # says nothing without lora_fusion
    fused_collectives: bool = False  # likewise; --use-mc2 or --use-symmetric-memory takes effect
    cpu: bool = True  # the device

    def shapes(self, tp_rank: int = 0) -> Shapes:
        """The dimensions that layers of a rank see."""
        m, t = self.model, self.tp
        rows = m.padded_vocab_size // t
        again = self.recompute_lora_inputs and self.recompute_method != "uniform"  # which runs all layers again anyway
        fusion = Fusion(again, self.lora_fusion_chunks, self.lora_fusion_level, self.fused_collectives)
        return Shapes(
            batch=self.micro_batch_size, length=self.length, hidden=m.hidden_size,
            heads=m.num_attention_heads // t, groups=m.num_query_groups // t, head_dim=m.kv_channels,
            ffn=m.ffn_hidden_size // t, vocab=rows, padded_vocab=(tp_rank + 1) * rows > m.vocab_size,
            qk_norm=m.qk_layernorm, ranks=t, sequence_parallel=self.sequence_parallel and t > 1, dtype=self.dtype,
            adapter_dtype=self.adapter_dtype, lora_dropout=self.lora_dropout, hidden_dropout=m.hidden_dropout,
            attention_dropout=m.attention_dropout, fusion=fusion if self.lora_fusion else None, cpu=self.cpu,
        )  # fmt: skip


def rank_memory(
    plan: Plan, linears: Sequence[AdaptedLinear], *, stage: int, tp_rank: int | None = None
) -> dict[str, int]:
    """Bytes by part, and their "total": the most tensors that a rank of `stage` holds during a training step.

    "optimizer step" is what that needs beyond the activations, which are gone by then: mostly nothing.

    Args:
        linears: all adapted linears of the model.
        tp_rank: default the last, which has the vocabulary's padding rows and so the most.
    """
    width = WIDTH[plan.dtype]
    trained = _trained(plan, linears, stage)
    elements = sum(trained)
    buffer = _buffer_elements(plan, trained)
    share = plan.dp if plan.distributed_optimizer else 1
    masters = 0 if plan.adapter_dtype == "fp32" else 4  # an fp32 adapter is its own master
    parts = {
        "frozen weights": (frozen_elements(plan, stage) + _border_elements(plan, linears, stage)) * width,
        "adapters": (buffer if plan.distributed_optimizer else elements) * WIDTH[plan.adapter_dtype],
        "gradients": buffer * 4,  # main_grad: fp32 whatever the adapter's dtype
        "masters and moments": -(-elements // share) * (masters + 8),
    }
    activations, logits = _peak(plan, linears, stage, plan.tp - 1 if tp_rank is None else tp_rank)
    parts["activations"] = activations
    parts["logits and loss"] = logits
    step = _step(plan, trained, buffer, _shared(plan, linears, stage))
    parts["optimizer step"] = max(0, step - activations - logits)
    return {**parts, "total": sum(parts.values())}


def frozen_elements(plan: Plan, stage: int) -> int:
    """Base weights on a rank of `stage`."""
    m, t = plan.model, plan.tp
    h, q, kv = m.hidden_size, m.query_width // t, m.kv_width // t
    norm, f = h * (1 + m.norm_bias), m.ffn_hidden_size // t
    one = h * (q + 2 * kv) + q * h + m.mlp_weights(m.num_experts, t) + norm * (4 if m.post_norm else 2)
    one += (q + 2 * kv) * m.add_qkv_bias + 2 * m.kv_channels * m.qk_layernorm
    one += h * m.add_dense_bias + (f * m.fc1_parts + h) * m.add_mlp_bias
    elements = plan.partition.layers_of_stage(stage) * one
    rows = m.padded_vocab_size // t * h
    first, last = stage == 0, stage == plan.partition.stages - 1
    if first:
        elements += rows + norm * m.embed_layernorm
    if last:
        elements += norm  # the final one
        if m.untie_embeddings_and_output_weights or not first:  # a tied output layer of another stage is a copy
            elements += rows
    return elements


def _trained(plan: Plan, linears: Sequence[AdaptedLinear], stage: int) -> list[int]:
    """Elements of every adapter factor on a rank of `stage`: the factor on the cut side is cut (adapters/lora.py)."""
    sizes = []
    for linear, column in _of_stage(plan, linears, stage):
        sizes.append(linear.r * linear.in_features // (1 if column else plan.tp))
        sizes.append(linear.r * linear.out_features // (plan.tp if column else 1))
    return sizes


def _border_elements(plan: Plan, linears: Sequence[AdaptedLinear], stage: int) -> int:
    """Room beside the weights of fused linears at level L2."""
    shapes = plan.shapes()
    if shapes.fusion is None:
        return 0
    return sum(
        border(linear.r) * (linear.out_features if column else linear.in_features) // plan.tp
        for linear, column in _of_stage(plan, linears, stage)
        if level_of(shapes, column=column) == "L2"
    )


def _of_stage(plan: Plan, linears: Sequence[AdaptedLinear], stage: int) -> Iterator[tuple[AdaptedLinear, bool]]:
    """Adapted linears that a stage holds, and whether each is a column linear."""
    held = {index for chunk in range(plan.partition.chunks) for index in plan.partition.layers(stage, chunk)}
    for linear in linears:
        layer_index, target = _place(linear.name)
        if layer_index in held:
            yield linear, target in ("linear_qkv", "linear_fc1")


@functools.lru_cache(maxsize=4096)
def _place(name: str) -> tuple[int, str]:
    """(layer, target) of a linear's global name."""
    parts = name.split(".")
    return int(parts[2]), parts[-1]


def _buffer_elements(plan: Plan, trained: Sequence[int]) -> int:
    """Elements of megatron-core's gradient buffer, which the distributed optimizer pads to cut it evenly."""
    if not plan.distributed_optimizer:
        return sum(trained)
    padded = sum(-(-size // _PARAMETER_PADDING) * _PARAMETER_PADDING for size in trained)
    return -(-padded // _BUCKET_PADDING) * _BUCKET_PADDING


def _shared(plan: Plan, linears: Sequence[AdaptedLinear], stage: int) -> int:
    """Elements of factors of whose gradients each tensor rank has a share (training/optimizer.py)."""
    if plan.tp == 1 or not (plan.lora_fusion or plan.sequence_parallel):
        return 0
    whole = (linear.r * (linear.in_features if column else linear.out_features)
             for linear, column in _of_stage(plan, linears, stage))  # fmt: skip
    return sum(whole)


def _step(plan: Plan, trained: Sequence[int], buffer: int, shared: int) -> int:
    """The most that reducing gradients and updating weights allocate, when all activations are gone."""
    update = 3 * 4 * max(trained, default=0)  # AdamW's root and quotient, parameter by parameter
    copied = plan.distributed_optimizer and plan.dp > 1  # by gloo's reduce-scatter, as in layer_tape.py
    return max(update, 4 * buffer if copied else 0, 4 * shared)  # shares are summed as one flat tensor


def _peak(plan: Plan, linears: Sequence[AdaptedLinear], stage: int, tp_rank: int) -> tuple[int, int]:
    """The most bytes of activations at once, and how many of them are as wide as the vocabulary."""
    shapes = plan.shapes(tp_rank)
    stages, chunks = plan.partition.stages, plan.partition.chunks
    ends = [(chunk, _is_first(stage, chunk), _is_last(plan, stage, chunk)) for chunk in range(chunks)]
    ranks = {_place(linear.name): linear.r for linear in linears}
    costs = {chunk: _chunk(plan, shapes, ranks, stage, chunk, first, last) for chunk, first, last in ends}
    wide = logits_bytes(shapes)
    live, best = _stale(plan, shapes, stage), (0, 0)
    for step, chunk in schedule(stages, stage, chunks, plan.micro_batches):
        cost = costs[chunk]
        if step == "backward":
            live -= cost.kept
        for moment, inside in ((cost.forward, 0), (cost.loss, wide)) if step == "forward" else ((cost.backward, 0),):
            if moment and live + moment > best[0]:
                best = (live + moment, inside)
        if step == "forward":
            live += cost.kept
    batch = plan.micro_batch_size * plan.length * (3 * 8 + 4)  # tokens, labels, positions; loss mask
    rotary = plan.length * plan.model.kv_channels * 4 * 2  # angles, and their double
    return best[0] - best[1] + batch + rotary, best[1]


def _stale(plan: Plan, shapes: Shapes, stage: int) -> int:
    """What a pipeline stage holds beyond micro-batches in flight: measured, in whole [s, b, h].

    A chunk remembers the last input it was sent, and its gradient, until the next one (TransformerBlock.input_tensor).
    The interleaved schedule receives the next input and gradient while it computes.
    """
    received = plan.partition.chunks - (stage == 0)
    if plan.partition.stages == 1 or not received:
        return 0
    ahead = 2 if plan.partition.chunks > 1 and stage > 0 else 0
    return (2 * received - 1 + ahead) * shapes.residual


@dataclass(frozen=True)
class _Chunk(Footprint):
    """One run of layers and one micro-batch: bytes kept until its backward, and the most alive at three moments."""

    loss: int  # 0 without an output layer


def _is_first(stage: int, chunk: int) -> bool:
    return stage == 0 and chunk == 0


def _is_last(plan: Plan, stage: int, chunk: int) -> bool:
    return stage == plan.partition.stages - 1 and chunk == plan.partition.chunks - 1


def _chunk(plan: Plan, shapes: Shapes, ranks: Ranks, stage: int, chunk: int, first: bool, last: bool) -> _Chunk:
    h = shapes.residual
    alone = plan.partition.stages == 1
    # Held by a variable until the forward pass returns: the embeddings, or what the stage before sent. The latter stays
    # in the schedule's list until the backward, and so does what was sent on.
    entry = h if first else 0
    held = 0 if first else h * (shapes.width < 4)
    held += 0 if last else h
    groups = list(_groups(plan, _layers(plan, shapes, ranks, stage, chunk, first)))
    live, forward, backward = held + entry, 0, 0
    for members, checkpointed in groups:
        if checkpointed:
            live += h  # its input
            continue
        for one in members:
            forward = max(forward, live + one.forward)
            live += one.kept
    end = loss(shapes) if last else None
    at_loss = live + end.forward if end else 0
    kept = live - entry
    live -= entry
    if end:
        backward = live + end.backward
    for members, checkpointed in reversed(groups):
        if checkpointed:
            live -= h
            inside = h  # the gradient that came in, while the layers are computed again
            for one in members:
                backward = max(backward, live + inside + one.forward)
                inside += one.kept
            inside += h  # their output, which a variable holds
            for one in reversed(members):
                inside -= one.kept
                backward = max(backward, live + inside + one.backward)
            continue
        for one in reversed(members):
            live -= one.kept
            backward = max(backward, live + one.backward)
    assert not alone or live == 0
    return _Chunk(kept, forward, backward, at_loss)


def _layers(plan: Plan, shapes: Shapes, ranks: Ranks, stage: int, chunk: int, first: bool) -> list[Footprint]:
    """What each layer of a chunk keeps and needs."""
    selective = plan.recompute_granularity == "selective"
    grad = not first or plan.recompute_granularity == "full"  # full recompute makes embeddings differentiable
    result: list[Footprint] = []
    known: dict[tuple[int, int, int, int, bool], Footprint] = {}
    for index in plan.partition.layers(stage, chunk):
        qkv, proj, fc1, fc2 = (ranks.get((index, name), 0) for name in TARGETS)
        kind = (qkv, proj, fc1, fc2, grad)
        if kind not in known:
            known[kind] = layer(shapes, (qkv, proj, fc1, fc2), grad_in=grad, recompute_attention=selective)
        result.append(known[kind])
        grad = grad or any(kind[:4])
    return result


def _groups(plan: Plan, layers: list[Footprint]) -> Iterator[tuple[list[Footprint], bool]]:
    """Layers as megatron-core checkpoints them (transformer_block.py, _checkpointed_forward), and whether it does."""
    if plan.recompute_granularity != "full":
        yield layers, False
        return
    count = plan.recompute_num_layers or 1
    if plan.recompute_method == "uniform":
        for start in range(0, len(layers), count):
            yield layers[start : start + count], True
        return
    for one in layers[:count]:
        yield [one], True
    yield layers[count:], False


def schedule(stages: int, stage: int, chunks: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """("forward" or "backward", chunk) in the order of megatron-core's schedules on one stage.

    One forward one backward (arXiv:2104.04473, section 2.2): as many forwards first as there are stages behind this
    one; interleaved, twice as many and a round of all other chunks.
    """
    if chunks == 1:
        first = min(stages - stage - 1, micro_batches)
        order = [0] * micro_batches
        back = order
    else:
        order = [
            chunk
            for start in range(0, micro_batches, stages)
            for chunk in range(chunks)
            for _ in range(min(stages, micro_batches - start))
        ]
        back = [chunks - 1 - chunk for chunk in order]
        first = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(order))
    for chunk in order[:first]:
        yield "forward", chunk
    for forward, backward in zip(order[first:], back, strict=False):
        yield "forward", forward
        yield "backward", backward
    for backward in back[len(order) - first :]:
        yield "backward", backward
