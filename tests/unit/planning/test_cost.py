"""The cost model: cases counted by hand, and what must make a step slower or faster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from modellink_lora.config.model import ModelConfig
from modellink_lora.parallel.partition import Partition
from modellink_lora.planning.cost import Link, Machine, Time, layer_passes, recomputed, step_time
from modellink_lora.planning.memory import Plan

MODEL = ModelConfig(
    num_layers=8, hidden_size=1024, num_attention_heads=16, num_query_groups=8, ffn_hidden_size=2816,
    max_position_embeddings=4096, vocab_size=32000, normalization="RMSNorm", swiglu=True,
    position_embedding_type="rope", untie_embeddings_and_output_weights=True,
)  # fmt: skip
RANKS = dict.fromkeys(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), 16)
ENDLESS = float("inf")
FREE = Link(0.0, ENDLESS)
# a machine on which only matrix products take time, a second for 10^12
PRODUCTS = Machine(
    name="", memory=ENDLESS, matmul=1e12, attention=ENDLESS, stream=ENDLESS, operator=0.0, queued=False, per_host=8,
    inside=FREE, between=FREE,
)  # fmt: skip
REAL = dataclasses.replace(
    PRODUCTS, attention=5e11, stream=1e12, operator=1e-6, inside=Link(1e-5, 1e11), between=Link(3e-5, 1e10)
)


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = dict(
        model=MODEL, partition=Partition((8,)), tp=1, dp=1, sequence_parallel=False, micro_batch_size=1, length=2048,
        micro_batches=4, dtype="bf16", adapter_dtype="bf16",
    )  # fmt: skip
    return Plan(**{**settings, **changes})


def seconds(machine: Machine = REAL, **changes: Any) -> Time:
    return step_time(plan(**changes), RANKS, machine)


def test_matrix_products_counted_by_hand() -> None:
    """4 per frozen weight and token, 6 per adapter weight, none for the gradient of the first layer's input."""
    frozen = 8 * (1024 * 2048 + 1024 * 1024 + 3 * 1024 * 2816) + 32000 * 1024
    adapters = 8 * 16 * ((1024 + 2048) + (1024 + 1024) + (1024 + 5632) + (2816 + 1024))
    first = 2 * 1024 * 2048
    expected = 4 * 2048 * (4 * frozen + 6 * adapters - first) / 1e12
    assert seconds(PRODUCTS).total == pytest.approx(expected)


def test_attention_costs_a_causal_square_forward_and_two_and_a_half_backward() -> None:
    machine = dataclasses.replace(PRODUCTS, matmul=ENDLESS, attention=1e12)
    square = 2 * 2048**2 * 1024 / 1e12
    assert seconds(machine).total == pytest.approx(4 * 8 * 3.5 * square)
    assert seconds(machine, recompute_granularity="selective").total == pytest.approx(4 * 8 * 4.5 * square)


def test_links_cost_latency_and_bytes() -> None:
    link = Link(1e-3, 1e6)
    assert link.all_reduce(4e6, 4) == pytest.approx(2 * 2e-3 + 2 * 4 * 3 / 4), "two levels, there and back"
    assert link.half(4e6, 4) == pytest.approx(2e-3 + 4 * 3 / 4)
    assert link.all_reduce(4e6, 1) == link.half(4e6, 1) == 0
    assert link.send(1e6) == pytest.approx(1.001)


def test_a_layers_collectives_counted_by_hand() -> None:
    """bf16 [2048, 1024]: two all-reduces in each direction, or with SP two gathers and two scatters: equal bytes."""
    wires = dataclasses.replace(PRODUCTS, matmul=ENDLESS, inside=Link(0.0, 1e9))
    ranks = (0, 0, 0, 0)
    for sp in (False, True):
        forward, backward = layer_passes(plan(tp=4, sequence_parallel=sp).shapes(), ranks, wires)
        assert forward.communication == backward.communication == pytest.approx(2 * 2 * 3 / 4 * 2048 * 1024 * 2 / 1e9)
    waits = dataclasses.replace(PRODUCTS, matmul=ENDLESS, inside=Link(1.0, ENDLESS))

    def messages(ranks: tuple[int, ...], sp: bool) -> list[float]:
        passes = layer_passes(plan(tp=2, sequence_parallel=sp).shapes(), ranks, waits)
        return [one.communication for one in passes]

    assert messages((0, 0, 0, 0), False) == [4, 4], "an all-reduce is two"
    assert messages((0, 0, 0, 0), True) == [4, 4]
    assert messages((16, 16, 16, 16), False) == [8, 8], "two adapters reduce in each direction"
    assert messages((16, 16, 16, 16), True) == [8, 8], "all four gather or scatter"
    assert messages((16, 0, 0, 0), False) == [4, 6], "a column linear's adapter reduces backward"
    assert messages((16, 0, 0, 0), True) == [5, 5]


def test_a_fused_adapter_owns_no_collective() -> None:
    waits = dataclasses.replace(PRODUCTS, matmul=ENDLESS, inside=Link(1.0, ENDLESS))

    def messages(**changes: Any) -> list[float]:
        shapes = plan(tp=2, lora_fusion=True, lora_fusion_chunks=1, **changes).shapes()
        return [one.communication for one in layer_passes(shapes, (16,) * 4, waits)]

    assert messages() == [4, 4], "the frozen layer's"
    assert messages(sequence_parallel=True) == [4, 4]
    assert messages(sequence_parallel=True, dtype="fp32", lora_dropout=0.1) == [4, 4]
    assert messages(sequence_parallel=True, lora_fusion_level="L0") == [4, 6], "two column linears scatter U"


def test_a_border_adds_its_bytes_to_the_frozen_linears_collective() -> None:
    wires = dataclasses.replace(PRODUCTS, matmul=ENDLESS, inside=Link(0.0, 1e9))
    for r, edge in ((16, 16), (12, 16)):
        shapes = plan(tp=2, sequence_parallel=True, lora_fusion=True, lora_fusion_level="L1").shapes()
        forward, backward = layer_passes(shapes, (r,) * 4, wires)
        assert forward.communication == backward.communication == pytest.approx(4 / 2 * 2048 * (1024 + edge) * 2 / 1e9)


def test_chunks_hide_a_collective_behind_its_product_where_kernels_are_queued() -> None:
    """A linear gathers for 1 s and multiplies for 1 s: in two chunks, half a second is waited for."""
    tokens, h, f = 2048, 1024, 2816
    linear = 2 * tokens * h * 2 * f / 2  # linear_fc1 at TP2
    size = tokens * h * 2
    machine = dataclasses.replace(PRODUCTS, matmul=linear, inside=Link(0.0, size / 2), queued=True)

    def waited(chunks: int | None, machine: Machine = machine) -> float:
        shapes = plan(tp=2, sequence_parallel=True, lora_fusion=True, lora_fusion_level="L0",
                      lora_fusion_chunks=chunks).shapes()  # fmt: skip
        return layer_passes(shapes, (0, 0, 16, 0), machine)[0].communication

    others = 3.0  # linears without an adapter: plain collectives of a second each
    assert waited(1) == pytest.approx(others + 1)
    assert waited(2) == pytest.approx(others + 0.5) and waited(4) == pytest.approx(others + 0.25)
    slow = dataclasses.replace(machine, inside=Link(0.0, size / 4))
    assert waited(2, slow) == pytest.approx(2 * others + 1 + 0.5), "what is longer than the product shows"
    late = dataclasses.replace(machine, inside=Link(1.0, size / 2))
    each = [waited(chunks, late) for chunks in (1, 2, 4)]
    assert each == sorted(set(each)) and waited(None, late) == each[0], "each chunk has its latency"
    assert waited(None) == waited(4), "auto takes the best"
    assert waited(2, dataclasses.replace(machine, queued=False)) == pytest.approx(others + 1), "a CPU does both itself"


def test_products_of_fused_adapters_are_as_many() -> None:
    assert seconds(PRODUCTS, lora_fusion=True).total == pytest.approx(seconds(PRODUCTS).total)
    border: dict[str, Any] = dict(tp=2, sequence_parallel=True, lora_fusion=True, lora_fusion_level="L1")
    plain = seconds(PRODUCTS, tp=2, sequence_parallel=True).total
    assert seconds(PRODUCTS, **border).total == pytest.approx(plain)
    assert seconds(PRODUCTS, **{**border, "lora_fusion_level": "L2"}).total == pytest.approx(plain)
    assert seconds(PRODUCTS, **{**border, "lora_fusion_level": "L0"}).total > plain, "all tokens on every rank"


@pytest.mark.parametrize("layout", [dict(tp=2), dict(tp=2, sequence_parallel=True), dict(tp=8, sequence_parallel=True)])
@pytest.mark.parametrize("kind", [{}, dict(adapter_dtype="fp32")])
def test_fusion_makes_a_step_of_tensor_ranks_faster(layout: dict[str, Any], kind: dict[str, Any]) -> None:
    machine = dataclasses.replace(REAL, matmul=5e14, stream=3e12, queued=True)
    kept = dict(recompute_lora_inputs=False)
    plain, fused = (seconds(machine, **layout, **kind, **kept, lora_fusion=on) for on in (False, True))
    assert fused.parts["tensor parallel"] < plain.parts["tensor parallel"]
    assert fused.total < plain.total


def test_computing_inputs_again_takes_time() -> None:
    again, kept = (seconds(lora_fusion=True, recompute_lora_inputs=on).total for on in (True, False))
    assert kept < again < 1.05 * kept


def test_a_slower_reduce_scatter_slows_sequence_parallel_only() -> None:
    slow = dataclasses.replace(REAL, scatter=Link(1e-5, 1e9))
    assert seconds(slow, tp=2).total == seconds(tp=2).total
    assert seconds(slow, tp=2, sequence_parallel=True).total > seconds(tp=2, sequence_parallel=True).total


def test_the_bubble_is_one_fill_and_drain_and_interleaving_divides_it() -> None:
    model = dataclasses.replace(MODEL, vocab_size=8, padded_vocab_size=8)
    whole = seconds(PRODUCTS, model=model).total
    parts = {
        chunks: seconds(PRODUCTS, model=model, partition=Partition((8 // (4 * chunks),) * (4 * chunks), chunks)).parts
        for chunks in (1, 2)
    }
    assert parts[1]["pipeline bubble"] == pytest.approx(3 / 16 * whole, rel=0.03), "3 stages wait for one micro-batch"
    assert parts[2]["pipeline bubble"] == pytest.approx(parts[1]["pipeline bubble"] / 2)
    fast = dataclasses.replace(REAL, inside=Link(1.0, ENDLESS))
    sends = [
        step_time(plan(partition=Partition((8 // (4 * c),) * (4 * c), c)), RANKS, fast).parts["pipeline transfers"]
        for c in (1, 2)
    ]
    assert sends[1] > 1.5 * sends[0], "and doubles the transfers"


def test_recomputation_runs_the_forward_of_those_layers_twice() -> None:
    settings: dict[str, Any] = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    assert recomputed(plan(**settings), 0) == 3
    interleaved = plan(**settings, partition=Partition((2,) * 4, 2))
    assert recomputed(interleaved, 0) == 4, "up to three layers of each chunk, which has two"
    assert recomputed(plan(**{**settings, "recompute_method": "uniform"}), 0) == 8
    times = [seconds(**{**settings, "recompute_num_layers": n}).total for n in range(1, 9)]
    assert times == sorted(times) and times[0] > seconds().total
    uniform = seconds(**{**settings, "recompute_method": "uniform", "recompute_num_layers": 1}).parts
    forward = layer_passes(plan().shapes(), (16,) * 4, REAL)[0]
    assert uniform["recompute"] == pytest.approx(4 * 8 * forward.compute)


def test_tensor_parallel_divides_products_and_adds_collectives() -> None:
    alone, two, across = seconds(), seconds(tp=2), seconds(dataclasses.replace(REAL, per_host=1), tp=2)
    assert 0.5 * alone.parts["compute"] < two.parts["compute"] < 0.75 * alone.parts["compute"]
    assert alone.parts["tensor parallel"] == 0 < two.parts["tensor parallel"] < across.parts["tensor parallel"]


def test_only_adapter_gradients_cross_between_replicas() -> None:
    wires = dataclasses.replace(PRODUCTS, matmul=ENDLESS, inside=Link(0.0, 1e9))
    adapters = 8 * 16 * ((1024 + 2048) + (1024 + 1024) + (1024 + 5632) + (2816 + 1024))
    assert seconds(wires, dp=4).total == pytest.approx(2 * 3 / 4 * 4 * adapters / 1e9), "fp32, once a step"
    shared = seconds(wires, dp=4, distributed_optimizer=True).total
    assert shared == pytest.approx(3 / 4 * (4 + 2) * adapters / 1e9), "fp32 gradients there, bf16 weights back"


def test_small_models_cost_their_operators() -> None:
    slow = dataclasses.replace(PRODUCTS, operator=1.0)
    assert seconds(slow).total > 4 * 8 * 250, "a layer dispatches some 300 operators"
    assert seconds(dataclasses.replace(REAL, queued=True)).total < seconds().total, "an accelerator hides them"
    queued = dataclasses.replace(REAL, queued=True, matmul=1e15, stream=1e13)
    assert seconds(queued, length=16).total > 0.5 * seconds(queued, length=64).total, "until kernels are too short"


@pytest.mark.parametrize(
    "slower",
    [
        dict(micro_batches=5), dict(length=4096), dict(lora_dropout=0.1), dict(adapter_dtype="fp32"),
        dict(model=dataclasses.replace(MODEL, vocab_size=64000, padded_vocab_size=64000)), dict(dp=2),
    ],
)  # fmt: skip
def test_what_must_make_a_step_slower_does(slower: dict[str, Any]) -> None:
    assert seconds(**slower).total > seconds().total
