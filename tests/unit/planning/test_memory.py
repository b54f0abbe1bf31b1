"""The arithmetic of the memory estimate: cases counted by hand, schedules, and what must grow or shrink it."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from modellink_lora.adapters.targets import adapted_linears
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.parallel.partition import Partition
from modellink_lora.planning.fused_tape import level_of
from modellink_lora.planning.layer_tape import layer
from modellink_lora.planning.memory import Plan, frozen_elements, rank_memory, schedule

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MODEL = ModelConfig(
    num_layers=8, hidden_size=1024, num_attention_heads=16, num_query_groups=8, ffn_hidden_size=2816,
    max_position_embeddings=4096, vocab_size=32000, normalization="RMSNorm", swiglu=True,
    position_embedding_type="rope", untie_embeddings_and_output_weights=True,
)  # fmt: skip
STANDING = ("frozen weights", "adapters", "gradients", "masters and moments")


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = dict(
        model=MODEL, partition=Partition((8,)), tp=1, dp=1, sequence_parallel=False, micro_batch_size=1, length=2048,
        micro_batches=4, dtype="bf16", adapter_dtype="bf16",
    )  # fmt: skip
    return Plan(**{**settings, **changes})


def memory(r: int = 16, targets: tuple[str, ...] = TARGETS, stage: int = 0, **changes: Any) -> dict[str, int]:
    linears = adapted_linears(family_of("llama"), changes.get("model", MODEL), LoraConfig(r=r, target_modules=targets))
    return rank_memory(plan(**changes), linears, stage=stage)


def test_standing_parts_counted_by_hand() -> None:
    layer = 1024 * (1024 + 2 * 512) + 1024 * 1024 + 3 * 1024 * 2816 + 2 * 1024
    assert frozen_elements(plan(), 0) == 8 * layer + 2 * 32000 * 1024 + 1024 == MODEL.parameter_count()
    factors = 8 * 16 * ((1024 + 2048) + (1024 + 1024) + (1024 + 5632) + (2816 + 1024))
    parts = memory()
    assert parts["frozen weights"] == 2 * MODEL.parameter_count()
    assert [parts[name] // factors for name in STANDING[1:]] == [2, 4, 12], "weight; gradient; master, two moments"
    mixed = memory(adapter_dtype="fp32")
    assert [mixed[name] // factors for name in STANDING[1:]] == [4, 4, 8], "an fp32 adapter is its own master"
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")


def test_the_tensor_ranks_share_cut_factors_and_repeat_whole_ones() -> None:
    # linear_qkv: A [16, 1024] whole, B [2048, 16] cut; linear_fc2: A [16, 2816] cut, B [1024, 16] whole
    assert memory(targets=("linear_qkv",), tp=2)["adapters"] == 2 * 8 * 16 * (1024 + 2048 // 2)
    assert memory(targets=("linear_fc2",), tp=2)["adapters"] == 2 * 8 * 16 * (2816 // 2 + 1024)


def test_pipeline_stages_hold_their_own_layers_and_ends() -> None:
    split = plan(partition=Partition((5, 3)))
    assert frozen_elements(split, 0) + frozen_elements(split, 1) == MODEL.parameter_count()
    tied = dataclasses.replace(MODEL, untie_embeddings_and_output_weights=False)
    whole = dataclasses.replace(split, model=tied)
    assert frozen_elements(whole, 0) + frozen_elements(whole, 1) == tied.parameter_count() + 32000 * 1024, "a copy"
    assert frozen_elements(plan(model=tied), 0) == tied.parameter_count()


def test_a_mixtures_experts_are_cut_over_tensor_ranks_and_its_router_is_not() -> None:
    sizes = {"moe_ffn_hidden_size": 512, "moe_shared_expert_intermediate_size": 1024, "moe_shared_expert_gate": True}
    mixture = dataclasses.replace(MODEL, num_experts=16, add_qkv_bias=True, **sizes)
    assert frozen_elements(plan(model=mixture), 0) == mixture.parameter_count()
    whole = 8 * (1024 * (16 + 1) + 2 * 1024) + 1024  # routers, gates, norms
    assert 2 * frozen_elements(plan(model=mixture, tp=2), 0) == mixture.parameter_count() + whole


def test_the_distributed_optimizer_shares_masters_and_moments_only() -> None:
    alone, shared = memory(dp=8), memory(dp=8, distributed_optimizer=True)
    assert shared["masters and moments"] == alone["masters and moments"] // 8
    assert shared["gradients"] == pytest.approx(alone["gradients"], rel=1e-3)
    assert {n: v for n, v in alone.items() if n[:3] in ("fro", "act")} == {
        n: v for n, v in shared.items() if n[:3] in ("fro", "act")
    }


def test_activations_of_a_layer_counted_by_hand() -> None:
    """What one more layer adds to the peak is what autograd keeps of it."""
    tokens, h, q, kv, f, r = 2048, 1024, 1024, 512, 2816, 16
    kept = 2 * (2 * tokens * h + 4 * tokens + 2 * tokens * h)  # both norms: input, 1 / rms; output, for the adapter
    kept += 2 * tokens * (q + 2 * kv)  # q, k, v before rotation: alive through v
    kept += 2 * tokens * (q + kv) + 2 * tokens * q  # rotated q and k; attention's output
    kept += 4 * tokens * 16  # logarithms of attention's sums
    kept += 4 * 2048 * 64 * 2  # cosines and sines for q and k
    kept += 3 * 2 * tokens * f  # gate and up; product, for the adapter
    kept += 4 * 2 * tokens * r  # scaled low-rank activations of four adapters
    more = memory(partition=Partition((9,)), model=dataclasses.replace(MODEL, num_layers=9))
    assert more["activations"] - memory()["activations"] == kept


def test_of_a_fused_adapter_a_layer_keeps_r_wide_tensors_and_nothing_else() -> None:
    tokens, r = 2048, 16
    frozen, fused = layer_kept(0), layer_kept(r, lora_fusion=True)
    assert fused - frozen == 2 * tokens * 4 * r, "S of four linears"
    assert layer_kept(r, lora_fusion=True, lora_dropout=0.1) - fused == 4 * (4 * tokens + 3 * 1024 + 2816), "keys"
    assert layer_kept(r, lora_fusion=True, adapter_dtype="fp32") == fused
    kept = layer_kept(r, lora_fusion=True, recompute_lora_inputs=False)
    assert kept - fused == 2 * tokens * (2 * 1024 + 2816), "outputs of two norms and the gate"
    assert layer_kept(r) == kept, "as the plain path without dropout"


def test_lora_adds_at_most_one_percent_to_what_a_frozen_layer_keeps() -> None:
    for hidden, ffn, groups in ((4096, 11008, 32), (8192, 28672, 8)):
        model = dataclasses.replace(
            MODEL, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=hidden // 128, num_query_groups=groups
        )
        for tp, sp, level in ((1, False, "L0"), (2, False, "L0"), (8, False, "L0"), (2, True, "L0"), (8, True, "L1")):
            settings: dict[str, Any] = dict(
                model=model, tp=tp, sequence_parallel=sp, lora_fusion_level=level, length=4096, lora_dropout=0.1
            )
            frozen = layer_kept(0, **settings)
            added = layer_kept(16, lora_fusion=True, **settings) - frozen
            assert 0 < added <= 0.01 * frozen, (hidden, tp, sp, added / frozen)
            assert layer_kept(16, **settings) - frozen > 0.25 * frozen, "the plain path"


def layer_kept(r: int, **changes: Any) -> int:
    """Bytes that a layer inside a model keeps for backward."""
    return layer(plan(**changes).shapes(), (r,) * 4, grad_in=True, recompute_attention=False).kept


def test_a_weight_of_level_two_has_a_border() -> None:
    layout: dict[str, Any] = dict(tp=2, sequence_parallel=True, adapter_dtype="fp32", dtype="fp32")
    rows = (2048 + 5632, 1024 + 2816)  # outputs of column linears, inputs of row linears
    for r, edge in ((16, 16), (12, 16)):
        added = memory(r, lora_fusion=True, **layout)["frozen weights"] - memory(r, **layout)["frozen weights"]
        assert added == 4 * 8 * edge * sum(rows) // 2
    for wider in (dict(sequence_parallel=False), dict(lora_fusion_level="L1")):
        changed = {**layout, **wider}
        assert memory(lora_fusion=True, **changed)["frozen weights"] == memory(**changed)["frozen weights"]


def test_more_chunks_never_take_more_memory_and_auto_is_counted_as_one() -> None:
    def activations(**changes: Any) -> int:
        return memory(tp=2, sequence_parallel=True, lora_fusion=True, **changes)["activations"]

    assert activations() == activations(lora_fusion_chunks=1) >= activations(lora_fusion_chunks=4)


@pytest.mark.parametrize("level", ["auto", "L0", "L1", "L2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_levels_are_those_that_the_adapters_decide(level: str, dtype: str) -> None:
    """adapters/fused.py decides on megatron-core's modules, the estimate on dimensions alone."""
    from modellink_lora.adapters.fused import decide

    for column, tp, sp, dropout, whole in itertools.product(
        [True, False], [1, 2], [True, False], [0.0, 0.1], [True, False]
    ):
        kind = ColumnParallelLinear if column else RowParallelLinear
        base = kind.__new__(kind)
        torch.nn.Module.__init__(base)
        base.tp_group, base.sequence_parallel = SimpleNamespace(size=lambda tp=tp: tp), sp
        base.weight = torch.nn.Parameter(torch.empty(4, 4, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16))
        decided = decide(base, dropout=dropout, wanted=level, fused_collectives=whole)
        shapes = plan(
            tp=tp, sequence_parallel=sp, dtype=dtype, lora_dropout=dropout, lora_fusion=True, lora_fusion_level=level,
            fused_collectives=whole,
        ).shapes()  # fmt: skip
        assert level_of(shapes, column=column) == decided.level


@pytest.mark.parametrize(
    "smaller",
    [
        dict(tp=2), dict(length=1024), dict(recompute_granularity="full", recompute_method="uniform",
                                            recompute_num_layers=1),
        dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=4),
        dict(partition=Partition((4, 4)), stage=1),
    ],
)  # fmt: skip
def test_what_must_shrink_activations_does(smaller: dict[str, Any]) -> None:
    assert memory(**smaller)["activations"] < memory()["activations"]


@pytest.mark.parametrize("larger", [dict(micro_batch_size=2), dict(lora_dropout=0.1), dict(adapter_dtype="fp32")])
def test_what_must_grow_activations_does(larger: dict[str, Any]) -> None:
    assert memory(**larger)["activations"] > memory()["activations"]


def test_recompute_from_least_to_most() -> None:
    def activations(method: str, layers: int) -> int:
        return memory(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)["activations"]

    blocks = [activations("block", layers) for layers in range(1, 9)]
    assert blocks == sorted(blocks, reverse=True) and len(set(blocks)) == 8
    assert activations("uniform", 1) == blocks[-1], "every layer by itself, either way"
    assert activations("uniform", 8) > activations("uniform", 2)
    assert memory(recompute_granularity="selective")["activations"] < memory()["activations"]
    without_proj = ("linear_qkv", "linear_fc1")
    saved = memory(targets=without_proj)["activations"]
    saved -= memory(targets=without_proj, recompute_granularity="selective")["activations"]
    assert saved == 8 * (2 * 2048 * 1024 + 4 * 2048 * 16), "attention's output too, where no adapter needs it"


def test_sequence_parallel_cuts_norms_and_residuals() -> None:
    assert memory(tp=4, sequence_parallel=True)["activations"] < memory(tp=4)["activations"]
    assert memory(sequence_parallel=True) == memory(), "with one tensor rank there is nothing to cut"


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages() -> None:
    four = Partition((2, 2, 2, 2))
    stages = [memory(partition=four, stage=stage, micro_batches=16)["activations"] for stage in range(3)]
    assert stages == sorted(stages, reverse=True)
    few = [memory(partition=four, micro_batches=count)["activations"] for count in (1, 2, 3, 4, 5)]
    assert few[:4] == sorted(set(few[:4])) and few[4] == few[3]


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(1, 1, 3), (4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 3, 8)])
def test_every_forward_has_its_backward_and_none_comes_first(stages: int, chunks: int, micro_batches: int) -> None:
    for stage in range(stages):
        flying = [0] * chunks
        done = [0] * chunks
        for step, chunk in schedule(stages, stage, chunks, micro_batches):
            flying[chunk] += 1 if step == "forward" else -1
            done[chunk] += step == "backward"
            assert flying[chunk] >= 0
        assert flying == [0] * chunks and done == [micro_batches] * chunks


def test_interleaving_holds_more_micro_batches_at_once() -> None:
    def most(stages: int, chunks: int) -> float:
        live = best = 0.0
        for step, _ in schedule(stages, 0, chunks, 16):
            live += (1 if step == "forward" else -1) / chunks
            best = max(best, live)
        return best

    assert most(4, 1) == 4
    assert most(4, 2) == 4 * (1 + 3 / 8), "(2 (p - 1) + (v - 1) p + 1) / v runs of layers: arXiv:2104.04473"


def test_the_estimate_needs_no_torch() -> None:
    program = "import sys; import modellink_lora.planning.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
