"""The memory estimate against an allocation tracker, over whole training runs of models of more than 100 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.helpers.spawn import run
from tests.helpers.training import TARGETS, fine_tune_here, train_flags, write_corpus

MODEL = dict(
    num_layers=4, hidden_size=512, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=1376,
    max_position_embeddings=2048, vocab_size=16000, normalization="RMSNorm", swiglu=True,
    position_embedding_type="rope", untie_embeddings_and_output_weights=True,
)  # fmt: skip
LARGE = 100 * 2**20
MIXED = {"bf16": True}
FULL = {"recompute_granularity": "full"}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
FUSED = {"lora_fusion": True}
# so wide, and with so small an MLP, that most is alive inside the linears of attention
WIDE = dict(num_layers=3, hidden_size=1536, num_attention_heads=16, num_query_groups=8, ffn_hidden_size=512,
            vocab_size=2000)  # fmt: skip


def tracked_run(*, folder: str, model: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any],
                lora: dict[str, Any], length: int) -> dict[str, Any]:  # fmt: skip
    """Two steps; of the second the tracked bytes before it and at its peak, and what was estimated, and when."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from modellink_lora.training import job, loop
    from tests.helpers.allocations import Allocations

    prefix = Path(folder) / f"corpus{dist.get_rank()}"
    write_corpus(prefix)
    tracker, result = Allocations(), {}
    estimate, step = job.memory_of, loop.train_step

    def estimated(*args: Any, **kwargs: Any) -> Any:
        memory = estimate(*args, **kwargs)
        result.update(at_estimate=tracker.live, parts=memory[parallel_state.get_pipeline_model_parallel_rank()])
        return memory

    def measured(*args: Any, **kwargs: Any) -> Any:
        result["before"] = tracker.live
        tracker.reset_peak()
        answer = step(*args, **kwargs)
        result["peak"], result["largest"] = tracker.peak, tracker.at_peak().most_common(12)
        return answer

    with tracker, patch.object(job, "memory_of", estimated), patch.object(loop, "train_step", measured):
        fine_tune_here(
            train=train_flags(train_iters=2, **{"global_batch_size": 2, **train}),
            data=dict(data_path=(str(prefix),), seq_length=length, variable_seq_lengths=False),
            parallel=parallel,
            lora={"r": 8, "target_modules": TARGETS, **lora},
            model=model,
        )
    return result


def check(
    folder: Path, *, world_size: int = 1, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, length: int = 128,
) -> None:  # fmt: skip
    """Both the standing memory and the peak of every rank are within 5 % of what was said before allocation."""
    ranks = run(
        tracked_run, world_size=world_size, folder=str(folder), model={**MODEL, **(model or {})}, train=train or {},
        parallel=parallel or {}, lora=lora or {}, length=length,
    )  # fmt: skip
    weights = sum(rank["parts"]["frozen weights"] for rank in ranks)
    assert weights > LARGE / (2 if (train or {}).get("bf16") else 1), "too small to show anything"
    for number, rank in enumerate(ranks):
        parts = rank["parts"]
        assert rank["at_estimate"] < 2**20, "something was allocated before the estimate"
        standing = parts["frozen weights"] + parts["adapters"] + parts["gradients"] + parts["masters and moments"]
        told = f"rank {number}: {parts}, tracked {rank}"
        assert rank["peak"] - rank["before"] > 0.04 * rank["peak"], f"too little in motion; {told}"
        assert standing == pytest.approx(rank["before"], rel=0.05), told
        assert parts["total"] == pytest.approx(rank["peak"], rel=0.05), told
        # of the part that moves, too: weights must not hide what is wrong with activations
        assert parts["total"] - standing == pytest.approx(rank["peak"] - standing, rel=0.08), told


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, id="r 8, 2 micro-batches"),
        pytest.param({"lora": {"r": 64, "dropout": 0.1}}, id="r 64, dropout"),
        pytest.param({"train": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2}}, id="uniform"),
        pytest.param({"train": {**FULL, "recompute_method": "block", "recompute_num_layers": 3}}, id="block"),
        pytest.param(
            {"train": {"recompute_granularity": "selective"}, "lora": {"target_modules": ("linear_qkv",)}},
            id="selective",
        ),
        pytest.param(
            {"train": MIXED, "length": 32, "model": {"vocab_size": 15990, "padded_vocab_size": 16000}}, id="bf16"
        ),
        pytest.param({"train": FUSED}, id="fused"),
    ],
)
def test_a_process_holds_what_was_estimated_before_it_allocated_anything(tmp_path: Path, case: dict[str, Any]) -> None:
    check(tmp_path, **case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"parallel": TP2}, id="TP2"),
        pytest.param({"parallel": {**TP2, "sequence_parallel": True}}, id="TP2 with sequence parallel"),
        pytest.param({"parallel": PP2, "train": {"global_batch_size": 3}}, id="PP2"),
        pytest.param({"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}}, id="PP2, interleaved"),
        pytest.param(
            {"train": {"use_distributed_optimizer": True, **MIXED}, "lora": {"r": 64}, "length": 32},
            id="DP2 with the distributed optimizer",
        ),
        pytest.param(
            {"parallel": {**TP2, "sequence_parallel": True}, "train": FUSED, "model": WIDE, "length": 256},
            id="fused, TP2 with sequence parallel",
        ),
    ],
)
def test_each_of_two_processes_holds_what_was_estimated(tmp_path: Path, case: dict[str, Any]) -> None:
    check(tmp_path, world_size=2, **case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"model": {"attention_dropout": 0.1}}, id="attention dropout"),
        pytest.param({"model": {"hidden_dropout": 0.1}}, id="hidden dropout"),
        pytest.param({"model": {"qk_layernorm": True}}, id="qk norms"),
        pytest.param({"model": {"add_qkv_bias": True, "num_query_groups": 8}}, id="biases, a key for each query"),
        pytest.param({"train": MIXED, "lora": {"dtype": "fp32"}, "length": 64}, id="fp32 adapters on bf16"),
        pytest.param({"lora": {"target_modules": ("linear_fc2",)}}, id="one target"),
        pytest.param({"train": {"micro_batch_size": 2}, "length": 256}, id="more tokens"),
        pytest.param(
            {"parallel": PP2, "train": MIXED, "world_size": 2, "length": 64,
             "model": {"untie_embeddings_and_output_weights": False, "vocab_size": 30000}}, id="PP2, tied, bf16",
        ),
        pytest.param(
            {"parallel": {**TP2, "sequence_parallel": True}, "train": MIXED, "world_size": 2, "length": 64,
             "lora": {"dropout": 0.1}}, id="TP2 with sequence parallel, dropout, bf16",
        ),
        pytest.param(
            {"parallel": TP2, "train": FUSED, "world_size": 2, "model": WIDE, "length": 256,
             "lora": {"r": 64, "dropout": 0.1}}, id="fused, TP2, dropout",
        ),
        pytest.param(
            {"parallel": {**TP2, "sequence_parallel": True}, "world_size": 2, "model": WIDE, "length": 256,
             "train": {**FUSED, "lora_fusion_level": "L1", "lora_fusion_chunks": "2"},
             "lora": {"r": 64, "dropout": 0.1}}, id="fused, TP2 with sequence parallel, L1, chunks, dropout",
        ),
        pytest.param(
            {"parallel": {**TP2, "sequence_parallel": True}, "world_size": 2, "model": WIDE, "length": 64,
             "train": {**FUSED, **MIXED}}, id="fused, TP2 with sequence parallel, bf16",
        ),
        pytest.param(
            {"parallel": PP2, "world_size": 2, "train": {**FUSED, "recompute_lora_inputs": False}}, id="fused, PP2",
        ),
        pytest.param({"train": {**FUSED, **FULL, "recompute_method": "block", "recompute_num_layers": 2}},
                     id="fused, block"),
    ],
)  # fmt: skip
def test_rarer_settings_are_estimated_as_well(tmp_path: Path, case: dict[str, Any]) -> None:
    check(tmp_path, **case)


def test_the_tracker_counts_each_storage_once_and_forgets_what_is_freed() -> None:
    import torch

    from tests.helpers.allocations import Allocations

    before = torch.ones(1000)
    with Allocations() as tracker:
        tracker.watch([before])
        assert tracker.live == 4000
        x = torch.ones(100, 10, requires_grad=True)
        view = x.detach().view(-1)[10:]
        assert tracker.live == 8000, "a view is no memory"
        y = (x * 2).pow(2)  # pow keeps its input for the backward
        assert tracker.live == 16000
        y.sum().backward()
        del y
        assert tracker.live == 12000, "the gradient is there, what autograd kept is gone"
        assert 16000 < tracker.peak < 32000
        tracker.reset_peak()
        view.untyped_storage().resize_(0)
        assert tracker.live == 8000 and tracker.peak == 12000
        assert sum(tracker.at_peak().values()) == tracker.peak
