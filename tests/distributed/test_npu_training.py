"""LoRA training through posttrain_gpt.py on simulated NPUs takes the same steps as a serial run on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.npu import run_on_simulated_npu, skip_without_simulator
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

ITERATIONS = 5
LORA = {"r": 4, "alpha": 8.0, "target_modules": TARGETS}
ROUNDING = 1e-5  # relative, fp32, five steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_simulator()
    folder = tmp_path_factory.mktemp("npu")
    write_corpus(folder / "data", samples=20)
    return hf_to_megatron(tiny_model("llama", folder / "hf", layers=4, tied=True), folder / "mg")


@pytest.fixture(scope="module")
def on_cpu(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("on-cpu")
    train_on_cpu(base, save, ITERATIONS)
    return save


def train_on_cpu(base: Path, save: Path, iterations: int, **flags: Any) -> None:
    run(
        fine_tune_here,
        world_size=1,
        train=train_flags(load=str(base), save=str(save), train_iters=iterations, **flags),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel={},
        lora={"dropout": 0.1} if "lora_load" in flags else {**LORA, "dropout": 0.1},
    )


TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
TRANSFER = {"TORCH_TRANSFER_TO_NPU": "1"}  # torch_npu then calls NPU tensors CUDA's, in all of torch


def train_on_npus(
    base: Path, save: Path, *flags: object, iterations: int = ITERATIONS, env: dict[str, str] | None = None
) -> str:
    """Train on two simulated NPUs; what was printed."""
    done = run_on_simulated_npu(
        "posttrain_gpt.py",
        [
            "--device", "npu", *flags, "--load", base, "--save", save, "--data-path", base.parent / "data",
            "--split", "100,0,0", "--seq-length", 32, "--variable-seq-lengths", "--lora-r", 4, "--lora-alpha", 8,
            "--lora-dropout", "0.1",
            "--lora-target-modules", *TARGETS, "--micro-batch-size", 1, "--global-batch-size", 4,
            "--train-iters", iterations, "--lr", "5e-3", "--min-lr", "5e-3", "--lr-decay-style", "constant",
            "--eval-iters", 0, "--log-interval", 1,
        ],
        env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "Ascend910B1" in done.stdout  # the run says which device it used
    return " ".join((done.stdout + done.stderr).replace("│", " ").split())  # cells of tables are wrapped


def like(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        # AdamW divides by the root of the second moment: an element that hardly moves shows rounding the most
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("layout", "env"),
    [
        pytest.param(TP2, {}, marks=pytest.mark.slow),
        ((*TP2, "--lora-fusion", "--use-mc2"), {}),
        pytest.param((*TP2, "--recompute-granularity", "full", "--recompute-method", "uniform",
                      "--recompute-num-layers", 1), {}, marks=pytest.mark.slow),
        pytest.param(
            ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1), {},
            marks=pytest.mark.slow,
        ),
        pytest.param(("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"), {},
                     marks=pytest.mark.slow),
        (("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"), TRANSFER),
        pytest.param(TP2, TRANSFER, marks=pytest.mark.slow),
    ],
    ids=["tp2-sp", "tp2-sp-fused", "tp2-sp-recompute", "pp2-vpp2-tied", "dp2-distributed-optimizer",
         "dp2-distributed-optimizer-transfer-to-npu", "tp2-sp-transfer-to-npu"],
)  # fmt: skip
def test_two_simulated_npus_learn_what_one_cpu_learns(
    layout: tuple[object, ...], env: dict[str, str], base: Path, on_cpu: Path, tmp_path: Path
) -> None:
    said = train_on_npus(base, tmp_path, *layout, env=env)
    assert "replaced by plain PyTorch" not in said  # every norm, gate, rotation and attention was fused
    assert "fused operators: npu_rms_norm, npu_swiglu, npu_rotary_mul, npu_fusion_attention" in said
    assert losses(tmp_path) == pytest.approx(losses(on_cpu), rel=ROUNDING)
    like(adapter_tensors(tmp_path), adapter_tensors(on_cpu))


@pytest.mark.slow
def test_without_fused_operators_the_same_is_learnt(base: Path, on_cpu: Path, tmp_path: Path) -> None:
    said = train_on_npus(base, tmp_path, *TP2, "--npu-plain-operators", "all")
    assert "fused operators: none" in said
    assert losses(tmp_path) == pytest.approx(losses(on_cpu), rel=ROUNDING)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_of_the_other_device(base: Path, on_cpu: Path, tmp_path: Path) -> None:
    cpu, npu, there, back = (tmp_path / name for name in ("cpu", "npu", "there", "back"))
    train_on_cpu(base, cpu, 3)
    train_on_npus(base, npu, *TP2, iterations=3)
    train_on_npus(base, there, *TP2, "--lora-load", cpu)
    train_on_cpu(base, back, ITERATIONS, lora_load=str(npu))
    for save in (there, back):
        assert losses(save) == pytest.approx(losses(on_cpu)[3:], rel=ROUNDING)
        like(adapter_tensors(save), adapter_tensors(on_cpu))


@pytest.mark.slow
def test_a_run_on_npus_goes_on_from_its_own_checkpoint_bit_for_bit(base: Path, tmp_path: Path) -> None:
    whole, half, rest = (tmp_path / name for name in ("whole", "half", "rest"))
    train_on_npus(base, whole, *TP2)
    train_on_npus(base, half, *TP2, iterations=3)
    train_on_npus(base, rest, *TP2, "--lora-load", half)
    assert losses(rest) == losses(whole)[3:]
    for name, tensor in adapter_tensors(whole).items():
        assert torch.equal(adapter_tensors(rest)[name], tensor), name
