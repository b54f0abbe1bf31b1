"""What the fused LoRA path sends, saves and calls, where it falls back, and that its other dtypes are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.reporting.run_record import read_record
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    fine_tune_here,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

WIDTH, RANK, TOKENS = 2048, 8, 8  # the proportion of 4096 to 16
LEVELS = ("L0", "L1", "L2")


def sent(sequence_parallel: bool, dtype: torch.dtype) -> dict[str, dict[str, tuple[int, int]]]:
    """kind of linear: layer: collectives and bytes of one forward and backward pass of a linear."""
    import torch.distributed as dist

    from benchmarks.counters import Counts
    from benchmarks.layers import Shape, make_case
    from benchmarks.peers import build
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.parallel.context import make_context

    assert dist.get_world_size() > 1, "nothing is sent by one process"
    make_context(ParallelConfig(tensor_model_parallel_size=dist.get_world_size()), torch.device("cpu"))
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for kind in ("column", "row"):
        found[kind] = {}
        for name in ("frozen", "plain", "auto", *(LEVELS if sequence_parallel else ())):
            shape = Shape(kind, TOKENS, WIDTH, WIDTH, rank=RANK, dtype=dtype, sequence_parallel=sequence_parallel)
            case = make_case(shape, build(name, shape, dist.group.WORLD), dist.group.WORLD)
            with Counts() as counts:
                case.step()
            found[kind][name] = len(counts.collectives), counts.payload
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [2, 4])
def test_with_sequence_parallelism_lora_owns_no_collective_and_adds_half_a_percent(tp: int, dtype: torch.dtype) -> None:
    for found in run(sent, world_size=tp, sequence_parallel=True, dtype=dtype):
        for kind, layers in found.items():
            calls, payload = layers["frozen"]
            assert calls == 2 and layers["plain"][0] > calls, (kind, layers)
            for name in ("auto", "L1", "L2"):
                assert layers[name][0] == calls, (kind, name, layers)
                assert layers[name][1] <= 1.005 * payload, (kind, name, layers)
        assert found["column"]["L0"][0] == 3 and found["row"]["L0"] == found["row"]["frozen"]


def test_without_sequence_parallelism_lora_sends_nothing_at_all() -> None:
    for found in run(sent, world_size=2, sequence_parallel=False, dtype=torch.float32):
        for kind, layers in found.items():
            assert layers["auto"] == layers["frozen"] == (1, TOKENS * WIDTH * 4), (kind, layers)
            assert layers["plain"][0] == 2


def kept_and_called() -> dict[str, Any]:
    """Bytes that a 7B decoder layer keeps, over those of the frozen one; kernels that one linear calls."""
    import torch.distributed as dist

    from benchmarks.counters import Counts
    from benchmarks.layers import Shape, make_case
    from benchmarks.peers import build
    from benchmarks.saved import layers
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.parallel.context import make_context

    make_context(ParallelConfig(tensor_model_parallel_size=dist.get_world_size()), torch.device("cpu"))
    shape = Shape("column", 64, 256, 256)
    case = make_case(shape, build("auto", shape, dist.group.WORLD), dist.group.WORLD)
    with Counts() as counts:
        case.step()
    added = {(row["peer"], row["p"]): row["added"] for row in layers(("plain", "auto", "auto recompute"), (0.0, 0.1))}
    return {"calls": counts.calls, "kernels": dict(counts.kernels), "added": added}


@pytest.mark.parametrize("tp", [1, 2])
def test_lora_adds_at_most_a_percent_to_what_a_layer_keeps_and_never_a_mask(tp: int) -> None:
    for found in run(kept_and_called, world_size=tp):
        added = found["added"]
        assert added["plain", 0.0] > 0.2 and added["plain", 0.1] > added["plain", 0.0]
        for p in (0.0, 0.1):
            assert 0 < added["auto recompute", p] <= 0.01, added
        assert added["auto", 0.1] - added["auto", 0.0] < 0.001  # without recomputation: inputs, and no mask


def test_a_fused_linear_calls_eight_kernels_forward_and_backward() -> None:
    found = run(kept_and_called, world_size=1)[0]
    assert found["calls"] <= 8, found["kernels"]


def small_updates() -> dict[str, dict[str, Any]]:
    import torch.distributed as dist

    from benchmarks.survival import survival
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.parallel.context import make_context

    make_context(ParallelConfig(tensor_model_parallel_size=dist.get_world_size()), torch.device("cpu"))
    return {kind: survival(kind, ("plain", "merged", *LEVELS, "auto"), 256, 256) for kind in ("column", "row")}


def test_in_bf16_small_updates_survive_at_the_levels_that_are_chosen() -> None:
    """B of std 1e-5: adding to an output that is rounded already loses most of the update, one rounding loses none."""
    for found in run(small_updates, world_size=2):
        for kind, layers in found.items():
            assert layers["auto"]["share"] == pytest.approx(1.0, abs=0.15), (kind, layers)
            assert layers["auto"]["branch_error"] < 0.005, (kind, layers)
            assert layers["plain"]["share"] < 0.5, (kind, layers)
        assert found["column"]["merged"]["share"] < 0.5


def decisions() -> dict[str, Any]:
    """What is decided for linears that the fused path cannot, or can, take over; and for a disabled adapter."""
    import torch.distributed as dist

    from benchmarks.layers import Shape, make_base, make_factors
    from modellink_lora.adapters.fused import FusedLoraLinear, Fusion, fusion_rows, make_layer
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.parallel.context import make_context

    make_context(ParallelConfig(), torch.device("cpu"))
    group, shape = dist.group.WORLD, Shape("row", 8, 32, 16)
    a, b = make_factors(shape, group)
    settings: dict[str, Any] = dict(lora_A=a, lora_B=b, scaling=2.0, dropout=0.0)
    whole, cut, trained = (make_base(shape, group) for _ in range(3))
    cut.input_is_parallel = False
    trained.weight.requires_grad_(True)
    layers = {
        f"decoder.layers.{n}.mlp.linear_fc2": make_layer(base, Fusion(get_device("cpu")), **settings)
        for n, base in enumerate((whole, cut, trained))
    }
    fused = layers["decoder.layers.0.mlp.linear_fc2"]
    assert isinstance(fused, FusedLoraLinear)
    x = torch.randn(8, 1, 32)
    with_adapter = fused(x)[0]
    fused.enabled = False
    return {
        "rows": fusion_rows(layers, 8),
        "changed": float((fused(x)[0] - with_adapter).abs().max()),
        "base": float((fused(x)[0] - whole(x)[0]).abs().max()),
    }


def test_what_cannot_be_fused_runs_plain_and_says_why() -> None:
    found = run(decisions, world_size=1)[0]
    fused, fallen = found["rows"]
    assert [row[:3] for row in fused] == [("linear_fc2", "L0", "0")]
    assert fallen == [
        "warning: decoder.layers.1.mlp.linear_fc2 runs on the plain LoRA path: it cuts its input itself",
        "warning: decoder.layers.2.mlp.linear_fc2 runs on the plain LoRA path: its weight or bias is trained",
    ]
    assert found["changed"] > 0 and found["base"] == 0  # a disabled adapter leaves the frozen linear


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusion")
    write_corpus(folder / "data")
    return hf_to_megatron(tiny_model("llama", folder / "hf", layers=2), folder / "mg")


def tune(base: Path, save: Path, world: int, parallel: dict[str, Any], *, dtype: str = "", **changes: Any) -> None:
    run(
        fine_tune_here,
        world_size=world,
        train=train_flags(load=str(base), save=str(save), **changes),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32, "split": "80,20,0"},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dropout": 0.1, "dtype": dtype or None},
    )


SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    "settings, tolerance",
    [
        ({"bf16": True}, 0.01),
        ({"bf16": True, "dtype": "fp32"}, 0.01),
        ({"fp16": True, "dtype": "fp32", "initial_loss_scale": 1024.0}, 0.002),
    ],
    ids=["bf16", "bf16-fp32-adapters", "fp16-fp32-adapters"],
)
def test_other_dtypes_follow_the_plain_path_in_training_and_validation(
    settings: dict[str, Any], tolerance: float, base: Path, tmp_path: Path
) -> None:
    common = dict(train_iters=5, eval_iters=1, eval_interval=5)
    tune(base, tmp_path / "plain", 2, SP2, **common, **settings)
    tune(base, tmp_path / "fused", 2, SP2, lora_fusion=True, **common, **settings)
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


def test_inputs_that_are_recomputed_give_the_same_bits(base: Path, tmp_path: Path) -> None:
    common = dict(train_iters=3, lora_fusion=True, lora_fusion_chunks="1")
    tune(base, tmp_path / "kept", 2, SP2, recompute_lora_inputs=False, **common)
    tune(base, tmp_path / "again", 2, SP2, **common)
    kept, again = adapter_tensors(tmp_path / "kept"), adapter_tensors(tmp_path / "again")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def bytes_sent(constant: bool, **job: Any) -> int:
    """Payload of all collectives of a job; `constant`: whether the first layer is known to have a constant input."""
    from benchmarks.counters import Counts
    from modellink_lora.adapters import inject

    first = inject.FIRST
    inject.FIRST = first if constant else "none"
    try:
        with Counts() as counts:
            fine_tune_here(**job)
    finally:
        inject.FIRST = first
    return counts.payload


def test_the_gradient_of_the_embeddings_is_neither_computed_nor_sent(base: Path, tmp_path: Path) -> None:
    """Full recomputation makes them require one, because a checkpointed layer needs an input that does."""
    sent = []
    for constant in (True, False):
        sent += run(
            bytes_sent,
            world_size=2,
            constant=constant,
            train=train_flags(
                load=str(base), save=str(tmp_path / str(constant)), train_iters=2, lora_fusion=True,
                lora_fusion_chunks="1", recompute_granularity="full", recompute_method="uniform",
                recompute_num_layers=1,
            ),
            data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
            parallel=SP2,
            lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
        )[:1]  # fmt: skip
    assert sent[0] < sent[1], sent
    skipped, computed = adapter_tensors(tmp_path / "True"), adapter_tensors(tmp_path / "False")
    for name in skipped:
        torch.testing.assert_close(skipped[name], computed[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tp, heads, groups, hidden", [(2, 8, 4, 64), (3, 9, 3, 144)], ids=["tp2", "tp3"])
def test_a_run_says_at_which_level_each_linear_runs_and_what_it_owns(
    tp: int, heads: int, groups: int, hidden: int, tmp_path: Path
) -> None:
    """Head counts that are common in small models; the second does not divide by powers of two."""
    write_corpus(tmp_path / "data")
    shape = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": hidden,
             "intermediate_size": 2 * hidden}  # fmt: skip
    hf = tiny_model("llama", tmp_path / "hf", layers=2, **shape)
    levels_of(hf_to_megatron(hf, tmp_path / "mg", tp=tp), tmp_path / "run", tp)


def levels_of(base: Path, save: Path, tp: int) -> None:
    tune(base, save, tp, {"tensor_model_parallel_size": tp, "sequence_parallel": True}, train_iters=1,
         lora_fusion=True)  # fmt: skip
    rows = read_record(save)["fusion"]["rows"]
    assert {row[0] for row in rows} == set(TARGETS)
    assert all(row[2] in ("L1", "L2") and row[3] == "0" for row in rows), rows
