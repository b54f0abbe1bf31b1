"""The self-check passes where all is right, and names a tensor under every planted error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import TARGETS, hf_to_megatron, mutated, train_flags

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LORA = {"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dropout": 0.1}


@contextmanager
def gate_and_up_cut_in_one() -> Iterator[None]:
    """Rank 0 gets the gate's rows and rank 1 the up projection's: each pairs the wrong halves."""
    from modellink_lora.models.layouts import Column, GateUp

    kept = GateUp.shard, GateUp.gather
    GateUp.shard, GateUp.gather = Column.shard, Column.gather  # type: ignore[method-assign]
    try:
        yield
    finally:
        GateUp.shard, GateUp.gather = kept  # type: ignore[method-assign]


def verify_here(
    *, base: str, against: tuple[str, ...], steps: int, mutant: str | None = None, parallel: Any = TP2_SP,
    targets: tuple[str, ...] = TARGETS, **train: Any,
) -> tuple[bool, str]:  # fmt: skip
    """Verdict and output of a verification in this world, of TP2 with sequence parallelism if nothing else is said."""
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.config.train import TrainConfig
    from modellink_lora.config.verify import VerifyConfig
    from modellink_lora.device import get_device
    from modellink_lora.verification.verify import verify

    planted = gate_and_up_cut_in_one() if mutant == "gate and up cut in one" else mutated(mutant)
    with planted, redirect_stdout(StringIO()) as output:
        good = verify(
            VerifyConfig(verify_steps=steps, against=against), train=TrainConfig(**train_flags(load=base, **train)),
            data_flags={"seq_length": 32}, parallel=ParallelConfig(**parallel), model_flags={},
            lora_flags={**LORA, "target_modules": targets},
            device=get_device("cpu"), torch_device=torch.device("cpu"),
        )  # fmt: skip
    return good, output.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return hf_to_megatron(tiny_model("llama", folder / "hf", layers=4, tied=True), folder / "mg")


@pytest.mark.parametrize(
    "against, checks, compared",
    [
        (("pp2,vpp1",), 8, ["pp2,vpp1"]),
        pytest.param((), 17, ["dp", "tp2", "pp2", "pp2,vpp1"], marks=pytest.mark.slow),
    ],
    ids=["one-other-layout", "all-layouts"],
)
def test_a_right_setup_passes_against_layouts_and_peft(
    against: tuple[str, ...], checks: int, compared: list[str], base: Path
) -> None:
    verdicts = run(verify_here, world_size=2, base=str(base), against=against, steps=2)
    assert [good for good, _ in verdicts] == [True, True]
    told = verdicts[0][1]
    assert f"verdict: ok, all {checks} checks passed, 0 skipped" in told
    for other in (*compared, "PEFT", "finite differences"):
        assert f" {other} " in told
    assert verdicts[1][1] == "", "one process speaks"


@pytest.mark.slow
def test_the_fused_path_is_compared_with_the_plain_one(base: Path) -> None:
    (good, told), _ = run(verify_here, world_size=2, base=str(base), against=(), steps=2, lora_fusion=True)
    assert good, told
    assert ", plain " in told


@pytest.mark.slow
def test_the_distributed_optimizer_is_compared_with_the_plain_one(base: Path) -> None:
    shared = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    (good, told), _ = run(verify_here, world_size=2, base=str(base), against=(), steps=2, parallel={}, **shared)
    assert good, told
    assert " dp, plain " in told


@pytest.mark.parametrize(
    "mutant, found",
    [
        # wrong on every layout alike: only what is not a layout can tell
        ("no LoRA term in dX", ["against finite differences: decoder.layers.", "against PEFT: decoder.layers."]),
        ("replicated factor not summed", ["lora_B is not the same on all tensor-parallel ranks"]),
        ("gate and up cut in one", ["32 tensors against dp: decoder.layers.", "against PEFT: decoder.layers."]),
    ],
)
def test_a_planted_error_fails_and_is_named(mutant: str, found: list[str], base: Path) -> None:
    verdicts = run(verify_here, world_size=2, base=str(base), against=("dp",), steps=1, mutant=mutant)
    assert [good for good, _ in verdicts] == [False, False]
    failures = [line for line in verdicts[0][1].splitlines() if line.startswith("FAILED: ")]
    for words in found:
        assert any(words in line for line in failures), failures
    assert "verdict: FAILED" in verdicts[0][1]


def command(*flags: str) -> tuple[int, str]:
    words = [sys.executable, "-m", "modellink_lora", "verify", "--device", "cpu", "--lora-r", "2", "--seq-length", "16"]
    targets = ["--lora-target-modules", "linear_qkv", "linear_fc2"]
    done = subprocess.run([*words, *targets, *flags], capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_one_process_is_checked_against_peft_and_ends_with_status_0(base: Path) -> None:
    status, told = command("--load", str(base), "--verify-steps", "1")
    assert status == 0, told
    assert "verdict: ok, all 5 checks passed, 0 skipped" in told


def test_a_verdict_on_nothing_is_a_failure(base: Path) -> None:
    model: dict[str, Any] = {
        "num-layers": 1, "hidden-size": 64, "num-attention-heads": 4, "max-position-embeddings": 64, "vocab-size": 99,
        "normalization": "RMSNorm", "position-embedding-type": "rope",
    }  # fmt: skip
    flags = [word for name, value in model.items() for word in (f"--{name}", str(value))]
    status, told = command("--bf16", "--swiglu", *flags)
    assert status == 1, told
    assert "the base keeps no hf/config.json" in told
    assert "there was nothing to compare with" in told
