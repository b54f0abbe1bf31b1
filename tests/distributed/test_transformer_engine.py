"""Layers of Transformer Engine train what the local layers train: on its double over gloo, and on a GPU where it is."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.spawn import run
from tests.helpers.te import MUTANTS, trace_of, verify_here
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

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1-dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
ROUNDING = 2e-5  # fp32, relative to the largest number of a tensor
# AdamW makes steps of one size out of gradients that are nothing but rounding, as those of key biases are
STEP_OF_NOTHING = 1e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("te")
    write_corpus(folder / "data", samples=16)
    return folder


def base_of(bases: Path, family: str, **overrides: Any) -> Path:
    root = bases / family
    if not root.exists():
        hf_to_megatron(tiny_model(family, bases / f"{family}-hf", **overrides), root, tp=2)
    return root


def trace(base: Path, impl: str, layout: str, *, dropout: float = 0.1, mutant: str | None = None, **train: Any) -> Any:
    return run(
        trace_of,
        world_size=2,
        double=True,
        transformer_impl=impl,
        train=train_flags(load=str(base), **{"train_iters": 2, "global_batch_size": 2, **train}),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel=LAYOUTS[layout],
        lora={"r": 3, "alpha": 6.0, "target_modules": TARGETS, "dropout": dropout},
        mutant=mutant,
    )[0]


@functools.cache
def local(base: Path, layout: str) -> Any:
    return trace(base, "local", layout)


def farthest(one: Any, other: Any) -> float:
    """The greatest relative difference between the losses, gradient norms and first gradients of two traces."""
    assert not other["stopped"]
    if one["stopped"]:  # by a guard
        return float("inf")
    found = [abs(a - b) / abs(b) for key in ("losses", "norms") for a, b in zip(one[key], other[key], strict=True)]
    return max(*found, _farthest(one["gradients"], other["gradients"]))


def _farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys() != set()
    assert all(tensor.any() for tensor in other.values()), "of zeros: nothing is compared"
    return max(((one[name] - tensor).abs().max() / tensor.abs().max()).item() for name, tensor in other.items())


def assert_same(one: Any, other: Any) -> None:
    assert farthest(one, other) < ROUNDING
    assert _farthest(one["change"], other["change"]) < STEP_OF_NOTHING


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_gradients_and_adapters_are_those_of_the_local_layers(layout: str, bases: Path) -> None:
    base = base_of(bases, "llama")
    assert_same(trace(base, "transformer_engine", layout), local(base, layout))


@pytest.mark.parametrize("layout", [pytest.param("tp2", marks=pytest.mark.slow), "tp2-sp"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_notices(mutant: str, layout: str, bases: Path) -> None:
    base = base_of(bases, "llama")
    assert farthest(trace(base, "transformer_engine", layout, mutant=mutant), local(base, layout)) > 1e-2


# 1 + weight; norms behind attention and MLP, soft caps; norms of heads; biases; LayerNorm, ALiBi, biases everywhere
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp1-dp2", "tp2-sp"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "qwen3", "qwen2", "bloom", "glm4"])
def test_families_are_those_of_the_local_layers(family: str, layout: str, bases: Path) -> None:
    base = base_of(bases, family)
    assert_same(trace(base, "transformer_engine", layout), trace(base, "local", layout))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ],
    ids=["recompute", "selective", "distributed optimizer"],
)
@pytest.mark.parametrize("layout", ["tp1-dp2", "tp2-sp"])
def test_settings_of_a_run_hold_for_its_layers_too(settings: dict[str, Any], layout: str, bases: Path) -> None:
    base = base_of(bases, "llama")
    found = trace(base, "transformer_engine", layout, **settings)
    assert_same(found, trace(base, "local", layout, **settings))


def job(base: Path, save: Path, iterations: int, *, resume: Path | None = None, **train: Any) -> list[float]:
    """Losses of the whole job at TP 2 with SP, the double at hand unless `bare`."""
    bare = train.pop("bare", False)
    settings = {"train_iters": iterations, "global_batch_size": 2, "lora_load": str(resume) if resume else None}
    run(
        fine_tune_with_double if not bare else fine_tune_here,
        world_size=2,
        double=not bare,
        train=train_flags(load=str(base), save=str(save), **settings, **train),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel=LAYOUTS["tp2-sp"],
        lora={} if resume else {"r": 3, "alpha": 6.0, "target_modules": TARGETS},
    )
    return losses(save)


def fine_tune_with_double(**arguments: Any) -> None:
    fine_tune_here(**arguments, double=True)


@pytest.mark.slow  # tests/unit/training/test_fused_adam.py is its short sibling
def test_fused_adam_resumes_bit_for_bit_and_reads_what_pytorchs_adamw_left(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "llama")
    whole = job(base, tmp_path / "whole", 6)
    job(base, tmp_path / "half", 3)
    assert job(base, tmp_path / "rest", 6, resume=tmp_path / "half") == whole[3:]
    exact, rest = adapter_tensors(tmp_path / "whole"), adapter_tensors(tmp_path / "rest")
    assert all(torch.equal(rest[name], exact[name]) for name in exact)
    job(base, tmp_path / "pytorch", 3, bare=True)
    after = job(base, tmp_path / "after", 6, resume=tmp_path / "pytorch")
    back = job(base, tmp_path / "back", 6, resume=tmp_path / "half", bare=True)
    assert after == pytest.approx(whole[3:], rel=1e-5) and back == pytest.approx(whole[3:], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_implementation(bases: Path, tmp_path: Path) -> None:
    base, te = base_of(bases, "llama"), {"transformer_impl": "transformer_engine"}
    whole = job(base, tmp_path / "whole", 6)
    job(base, tmp_path / "te", 3, **te)
    job(base, tmp_path / "local", 3)
    assert job(base, tmp_path / "te-local", 6, resume=tmp_path / "te") == pytest.approx(whole[3:], rel=1e-5)
    assert job(base, tmp_path / "local-te", 6, resume=tmp_path / "local", **te) == pytest.approx(whole[3:], rel=1e-5)


@pytest.mark.slow
def test_verify_compares_it_with_the_local_layers(bases: Path) -> None:
    good, said = run(
        verify_here,
        world_size=2,
        double=True,
        train=train_flags(load=str(base_of(bases, "llama")), transformer_impl="transformer_engine"),
        data={"data_path": (str(bases / "data"),), "seq_length": 32},
        parallel=LAYOUTS["tp2-sp"],
        lora={"r": 3, "alpha": 6.0, "target_modules": TARGETS},
    )[0]
    assert good and "plain" in said, said


def why_no_gpu(processes: int) -> str:
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    found = torch.cuda.device_count()
    return "" if found >= processes else f"needs {processes} GPUs, torch sees {found}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2", "tp2-sp"])
def test_on_gpus_the_real_package_trains_what_the_local_layers_train(
    layout: str, bases: Path, tmp_path: Path
) -> None:  # fmt: skip
    parallel = LAYOUTS.get(layout, {})
    processes = parallel.get("tensor_model_parallel_size", 1)
    if reason := why_no_gpu(processes):
        pytest.skip(reason)
    base = base_of(bases, "llama")
    arguments = {
        "train": {**train_flags(load=str(base), train_iters=2, global_batch_size=2, bf16=True), "device": "cuda"},
        "data": {"data_path": [str(bases / "data")], "seq_length": 32},
        "parallel": parallel,
        "lora": {"r": 3, "alpha": 6.0, "target_modules": TARGETS, "dropout": 0.1},
    }
    program = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "tests.helpers.te_gpu_program"]
    command = [sys.executable, *program, str(tmp_path / "traces"), json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    traces = torch.load(tmp_path / "traces", weights_only=True)
    one, other = traces["transformer_engine"], traces["local"]
    assert not one["stopped"] and one["losses"] == pytest.approx(other["losses"], rel=1e-2)
    for name, gradient in other["gradients"].items():  # 8 bits, and norms that are rounded at another place
        assert (one["gradients"][name] - gradient).norm() < 0.05 * gradient.norm(), name
