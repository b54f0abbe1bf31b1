"""Seconds of a training step on a layout and a machine, from dimensions alone. Pure arithmetic.

What is counted: matrix products with frozen weights (forward, and the input gradient only), the adapters' own, causal
attention, element-wise passes of the unfused operators, what an operator costs by itself, collectives of tensor
parallelism, transfers and bubble of the pipeline, recomputation, gradient reduction, AdamW. Nothing overlaps except
where it is said: kernels of an accelerator with their own launches, collectives of fused linears with their products.

Letters: T tokens of a micro-batch, t tensor parallel size, h hidden, o outputs, i inputs, r rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from modellink_lora.planning.fused_tape import border, level_of
from modellink_lora.planning.memory import Plan
from modellink_lora.planning.tape import TARGETS, WIDTH, Shapes

# Operators that PyTorch dispatches for one layer and micro-batch, views included, counted in megatron-core 0.16.1 with
# all four adapters; for the loss; and for one adapter factor in AdamW with clipping.
_PLAIN_OPERATORS, _FUSED_OPERATORS = (120, 148), (140, 189)  # forward, backward
_LOSS_OPERATORS, _STEP_OPERATORS = 100, 14
_MOVED = 2.6  # bytes an element-wise operator reads and writes for each byte of its result: most have two inputs
_HASHED, _HASHED_IN_CACHE = 48, 5  # bytes of results, an element, of drawing a dropout mask: 12 int32; on a CPU
_CHUNKS = (1, 2, 4)  # of --lora-fusion-chunks
_Collective = Callable[[float, int], float]  # (bytes, ranks) -> seconds


@dataclass(frozen=True)
class Link:
    """Time of a message: latency + bytes / bandwidth, bytes being what one process sends.

    A collective is once or twice as many messages as the levels of a tree over its ranks, and the bytes of a ring.
    """

    latency: float  # seconds
    bandwidth: float  # bytes/s of one process, one direction

    def all_reduce(self, size: float, ranks: int) -> float:
        return self._collective(2 * size, 2, ranks)

    def half(self, size: float, ranks: int) -> float:
        """All-gather or reduce-scatter of `size` bytes in full."""
        return self._collective(size, 1, ranks)

    def _collective(self, size: float, rounds: int, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        return rounds * self.latency * math.log2(ranks) + size * (ranks - 1) / ranks / self.bandwidth

    def send(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """What devices of one kind do, and how they are connected. Rates are those reached, not peaks."""

    name: str
    memory: float  # bytes of tensors that fit on a device
    matmul: float  # FLOP/s of large matrix products in the run's dtype
    attention: float  # FLOP/s inside attention
    stream: float  # bytes/s of element-wise operators, reads and writes together
    operator: float  # seconds of an operator that does nothing
    queued: bool  # operators are launched ahead: their own time hides behind longer kernels
    per_host: int
    inside: Link
    between: Link
    weights: float = (
        math.inf
    )  # bytes/s of weights that a product takes in besides multiplying, as on CPUs that pack them
    scatter: Link | None = None  # reduce-scatter inside a host where it is slower than an all-gather, as over gloo


@dataclass(frozen=True)
class Time:
    """Seconds of one step by cause."""

    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Pass:
    """One layer and micro-batch in one direction."""

    compute: float
    attention: float  # of it
    communication: float


def step_time(plan: Plan, ranks: Mapping[str, int], machine: Machine) -> Time:
    """One optimizer step of `plan`.

    Args:
        ranks: LoRA rank by target; absent where there is no adapter.
    """
    shapes = plan.shapes()
    own = tuple(ranks.get(name, 0) for name in TARGETS)
    stages, chunks = plan.partition.stages, plan.partition.chunks
    crossing = _machine_link(machine, plan.tp * plan.dp * stages)
    forward, backward = layer_passes(shapes, own, machine)
    loss = _loss(shapes, machine)
    compute, communication, extra = [], [], []  # of a micro-batch on each stage
    for stage in range(stages):
        layers = plan.partition.layers_of_stage(stage)
        again = recomputed(plan, stage)
        compute.append(layers * (forward.compute + backward.compute) + (loss.compute if stage == stages - 1 else 0))
        communication.append(
            (layers + again) * forward.communication
            + layers * backward.communication
            + (loss.communication if stage == stages - 1 else 0)
        )
        if plan.recompute_granularity == "selective":
            extra.append(layers * forward.attention)
        else:
            extra.append(again * forward.compute)
    # the input of a model's first layer needs no gradient, unless layers are recomputed
    if plan.recompute_granularity != "full":
        compute[0] -= _first_layer_saves(shapes, own, machine)
    transfer = 2 * crossing.send(shapes.residual) if stages > 1 else 0.0
    slots = [a + b + c for a, b, c in zip(compute, communication, extra, strict=True)]
    slowest = slots.index(max(slots))
    m = plan.micro_batches
    # 1F1B: the slowest stage works m times, the pipeline fills and drains once; interleaved, in runs a chunk as long
    bubble = (sum(slots) - slots[slowest]) / chunks
    sends = transfer * (m * chunks * (2 if 0 < slowest < stages - 1 else 1) + (stages - 1))
    reduce, update = _optimizer(plan, own, machine)
    return Time(
        {
            "compute": m * compute[slowest],
            "recompute": m * extra[slowest],
            "tensor parallel": m * communication[slowest] + _shares(plan, own, machine),
            "pipeline bubble": bubble,
            "pipeline transfers": sends if stages > 1 else 0.0,
            "data parallel": reduce,
            "optimizer": update,
        }
    )


def recomputed(plan: Plan, stage: int) -> int:
    """Layers of a stage whose forward pass runs twice."""
    if plan.recompute_granularity != "full":
        return 0
    layers = plan.partition.layers_of_stage(stage)
    if plan.recompute_method == "uniform":
        return layers
    return min(layers, (plan.recompute_num_layers or 1) * plan.partition.chunks)  # of each chunk


@functools.lru_cache(maxsize=4096)
def layer_passes(shapes: Shapes, ranks: tuple[int, ...], machine: Machine) -> tuple[_Pass, _Pass]:
    """(forward, backward) of a layer inside the model."""
    tokens, local, w, fused = shapes.tokens, shapes.local_tokens, shapes.width, shapes.fusion
    h, f = shapes.hidden, shapes.ffn
    q, k = shapes.heads * shapes.head_dim, shapes.groups * shapes.head_dim
    linears = [
        _Linear(column, i, o, rank)
        for (column, i, o), rank in zip(
            ((True, h, q + 2 * k), (False, q, h), (True, h, 2 * f), (False, f, h)), ranks, strict=True
        )
    ]
    products = sum(_matmul(machine, tokens, one.inputs, one.outputs, w) for one in linears)
    sums = 0.0  # elements that adapters add to their bases' outputs
    inputs = 0.0  # elements that adapters read
    adapters = [0.0, 0.0]
    for one in linears:
        if not one.rank:
            continue
        a_tokens, b_tokens = (local, tokens) if one.column else (tokens, local)
        times = _fused_products(shapes, one, machine) if fused else _plain_products(shapes, one, machine)
        adapters = [so_far + time for so_far, time in zip(adapters, times, strict=True)]
        sums += b_tokens * one.outputs
        inputs += a_tokens * one.inputs
    area = 2.0 * shapes.batch * shapes.length**2 * q  # q k^T and the weighted sum, half of both masked
    attention = area / machine.attention
    norm = float(local * h)
    head_norms = float(tokens * (q + k) if shapes.qk_norm else 0)
    wide = 4  # norms work in fp32
    # results of element-wise operators, bytes, in the order of the layer: norms, rotation, gate, residuals, adapters
    one_norm = 3 * wide + (2 * w if w < 4 else 0)
    there = (2 * norm + head_norms) * one_norm + w * (tokens * (6.5 * q + 5.5 * k + 2 * f) + 2 * norm)
    back = (2 * norm + head_norms) * (6 * wide + (w if w < 4 else 0)) + w * 2 * norm
    back += w * tokens * (7.5 * q + 8.5 * k + 4 * f)
    thinned = inputs * bool(shapes.lora_dropout)
    hashed = _HASHED if machine.queued else _HASHED_IN_CACHE
    if fused:
        if fused.recompute_inputs:
            back += norm * one_norm * sum(bool(one.rank) for one in linears if one.column)
            back += 2 * w * tokens * f * bool(ranks[-1])
        back += thinned * hashed  # once for the input's gradient and once for that of lora_A
    else:
        there, back = there + w * sums, back + w * inputs
        if shapes.adapter_dtype != shapes.dtype:
            there += 2 * 4 * (inputs + sums)
            back += 2 * 4 * (inputs + sums)
    masks = thinned + 2 * norm * bool(shapes.hidden_dropout)
    masks += shapes.batch * shapes.heads * shapes.length**2 * bool(shapes.attention_dropout)
    there += masks * (hashed + 2 * w)
    back += masks * (hashed + 2 * w)
    forward = products + adapters[0] + attention + _MOVED * there / machine.stream
    backward = products + adapters[1] + 2.5 * attention + _MOVED * back / machine.stream
    to_row, to_column = _tensor_parallel(shapes, linears, machine)
    operators = _FUSED_OPERATORS if fused else _PLAIN_OPERATORS
    return (
        _Pass(_with_overhead(machine, forward, operators[0]), attention, to_row),
        _Pass(_with_overhead(machine, backward, operators[1]), 2.5 * attention, to_column),
    )


@dataclass(frozen=True)
class _Linear:
    """Features on one rank, and the adapter's rank."""

    column: bool
    inputs: int
    outputs: int
    rank: int


def _plain_products(shapes: Shapes, one: _Linear, machine: Machine) -> tuple[float, float]:
    """The adapter's own products: two forward, four backward."""
    a_tokens, b_tokens = (shapes.local_tokens, shapes.tokens) if one.column else (shapes.tokens, shapes.local_tokens)
    both = _matmul(machine, a_tokens, one.inputs, one.rank, shapes.width)
    both += _matmul(machine, b_tokens, one.rank, one.outputs, shapes.width)
    return both, 2 * both


def _fused_products(shapes: Shapes, one: _Linear, machine: Machine) -> tuple[float, float]:
    """The same, joined to the frozen linear's: its results are read once more, to add to them.

    At L2 a product of all tokens in either direction is part of the frozen linear's, and under a border the tensor that
    is sent is copied first. At L0 both factors work on all tokens.
    """
    level, w, stream = level_of(shapes, column=one.column), shapes.width, machine.stream
    local, tokens = shapes.local_tokens, shapes.tokens
    a_tokens = local if one.column and level != "L0" else tokens
    b_tokens = tokens if one.column or level == "L0" else local
    down, add_down = _matmul(machine, a_tokens, one.inputs, one.rank, w), w * a_tokens * one.inputs / stream
    up, add_up = _matmul(machine, b_tokens, one.rank, one.outputs, w), w * b_tokens * one.outputs / stream
    forward, backward = down + up + add_up, 2 * (down + up) + add_down
    if level == "L2":
        joined = 2 * tokens * one.rank * (one.outputs if one.column else one.inputs) / machine.matmul
        forward += joined - (up + add_up if one.column else down)
        backward += joined - (up if one.column else down + add_down)
    if level != "L0":
        copied = 2 * w * local * (one.inputs if one.column else one.outputs) / stream
        return (forward + copied, backward) if one.column else (forward, backward + copied)
    return forward, backward


def _tensor_parallel(shapes: Shapes, linears: Sequence[_Linear], machine: Machine) -> tuple[float, float]:
    """Collectives of a layer that computation waits for, (forward, backward).

    Without sequence parallelism the frozen linears all-reduce: row linears forward, column linears backward. With it a
    column linear gathers forward and scatters backward, a row linear the other way. A plain adapter repeats what its
    linear does, r wide. A fused one sends nothing of its own (but for a column linear at L0) and works in chunks.
    """
    t, width = shapes.ranks, shapes.width
    if t == 1:
        return 0.0, 0.0
    link = _machine_link(machine, t)
    scatter, full = machine.scatter or link, float(shapes.tokens * shapes.hidden * width)
    waits = [0.0, 0.0]
    for one in linears:
        collectives: tuple[_Collective | None, _Collective | None]
        if not shapes.sequence_parallel:
            collectives = (None, link.all_reduce) if one.column else (link.all_reduce, None)
        else:
            collectives = (link.half, scatter.half) if one.column else (scatter.half, link.half)
        product = _matmul(machine, shapes.tokens, one.inputs, one.outputs, width)
        for direction, collective in enumerate(collectives):
            if collective is None:
                continue
            if one.rank and shapes.fusion:
                bordered = level_of(shapes, column=one.column) != "L0"
                size = full + shapes.tokens * border(one.rank) * width * bordered
                waits[direction] += _exposed(collective, size, t, product, shapes.fusion.chunks, machine)
                if shapes.sequence_parallel and one.column and direction and not bordered:
                    waits[direction] += collective(float(shapes.tokens * one.rank * width), t)
                continue
            waits[direction] += collective(full, t)
            if one.rank:
                waits[direction] += collective(float(shapes.tokens * one.rank * WIDTH[shapes.adapter_dtype]), t)
    return waits[0], waits[1]


def _exposed(
    collective: _Collective, size: float, ranks: int, product: float, chunks: int | None, machine: Machine
) -> float:
    """The part of a collective that a product of the same tokens does not hide, both in chunks; None: as is best.

    One chunk is sent before the first is multiplied, or after the last; each of the others beside a product. A CPU's
    cores do both, so nothing hides there.
    """

    def of(c: int) -> float:
        all_chunks = c * collective(size / c, ranks)
        if not machine.queued:
            return all_chunks
        return all_chunks / c + (c - 1) / c * max(0.0, all_chunks - product)

    return of(chunks) if chunks else min(of(c) for c in _CHUNKS)


def _first_layer_saves(shapes: Shapes, ranks: tuple[int, ...], machine: Machine) -> float:
    """What a model's first layer does not compute: the gradient of its input."""
    q, k = shapes.heads * shapes.head_dim, shapes.groups * shapes.head_dim
    norm = _MOVED * 8 * 4 * shapes.local_tokens * shapes.hidden / machine.stream
    saved = _matmul(machine, shapes.tokens, shapes.hidden, q + 2 * k, shapes.width) + norm
    return saved if ranks[0] else 0.0  # without an adapter there, more; too rare to count


def _loss(shapes: Shapes, machine: Machine) -> _Pass:
    """Final norm, output layer and cross entropy, both directions."""
    width, columns = shapes.width, shapes.vocab
    product = 2 * _matmul(machine, shapes.tokens, shapes.hidden, columns, width)
    moved = 10.0 * 4  # fp32 reads and writes of maximum, difference, exponential, sum, quotient, gradient
    moved += 2 * (4 + width) if width < 4 else 0
    moved += 4 * width if shapes.padded_vocab else 0
    passes = shapes.tokens * columns * moved + _MOVED * 36 * shapes.local_tokens * shapes.hidden
    communication = 0.0
    if shapes.ranks > 1:
        link = _machine_link(machine, shapes.ranks)
        full = shapes.tokens * shapes.hidden * width
        communication = 3 * link.all_reduce(4 * shapes.tokens, shapes.ranks)
        if shapes.sequence_parallel:
            communication += 2 * link.half(full, shapes.ranks) + (machine.scatter or link).half(full, shapes.ranks)
        else:
            communication += 2 * link.all_reduce(full, shapes.ranks)
    return _Pass(_with_overhead(machine, product + passes / machine.stream, _LOSS_OPERATORS), 0.0, communication)


def _shares(plan: Plan, ranks: tuple[int, ...], machine: Machine) -> float:
    """The sum over tensor ranks of gradients that each has a share of, once a step: see training/optimizer.py."""
    if plan.tp == 1 or not (plan.lora_fusion or plan.sequence_parallel):
        return 0.0
    layers = max(plan.partition.layers_of_stage(stage) for stage in range(plan.partition.stages))
    return _machine_link(machine, plan.tp).all_reduce(4 * layers * sum(ranks) * plan.model.hidden_size, plan.tp)


def _optimizer(plan: Plan, ranks: tuple[int, ...], machine: Machine) -> tuple[float, float]:
    """(reduction of adapter gradients over replicas, AdamW) on the stage with most layers."""
    m, t = plan.model, plan.tp
    q, kv, f, h = m.query_width, m.kv_width, m.ffn_hidden_size, m.hidden_size
    per_rank = (h + (q + 2 * kv) / t, q / t + h, h + 2 * f / t, f / t + h)  # elements of both factors, per unit of rank
    layers = max(plan.partition.layers_of_stage(stage) for stage in range(plan.partition.stages))
    elements = layers * sum(rank * size for rank, size in zip(ranks, per_rank, strict=True))
    factors = 2 * layers * sum(1 for rank in ranks if rank)
    link = _machine_link(machine, plan.tp * plan.dp)
    reduce = link.all_reduce(4 * elements, plan.dp)
    if plan.distributed_optimizer:
        reduce = link.half(4 * elements, plan.dp) + link.half(WIDTH[plan.adapter_dtype] * elements, plan.dp)
        elements /= plan.dp
    update = 14 * 4 * elements / machine.stream  # reads and writes of gradient, master and moments
    operators = factors * _STEP_OPERATORS * machine.operator
    return reduce, max(update, operators) if machine.queued else update + operators


def _matmul(machine: Machine, m: float, k: float, n: float, width: int) -> float:
    """A narrow product moves more than it multiplies."""
    multiplied = 2 * m * k * n / machine.matmul + width * k * n / machine.weights
    return max(multiplied, width * (m * k + k * n + m * n) / machine.stream)


def _with_overhead(machine: Machine, kernels: float, operators: int) -> float:
    own = operators * machine.operator
    return max(kernels, own) if machine.queued else kernels + own


def _machine_link(machine: Machine, span: int) -> Link:
    """The link of a group whose members lie within `span` consecutive ranks."""
    return machine.inside if span <= machine.per_host else machine.between
