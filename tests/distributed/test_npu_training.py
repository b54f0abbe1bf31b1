"""LoRA training through posttrain_gpt.py on simulated NPUs takes the same steps as a serial run on the CPU."""

from __future__ import annotations

from pathlib import Path

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
    run(
        fine_tune_here,
        world_size=1,
        train=train_flags(load=str(base), save=str(save), train_iters=ITERATIONS),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel={},
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dropout": 0.1},
    )
    return save


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("--tensor-model-parallel-size", 2, "--sequence-parallel"), marks=pytest.mark.slow),
        ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--lora-fusion", "--use-mc2"),
        pytest.param(
            ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1), marks=pytest.mark.slow
        ),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ],
    ids=["tp2-sp", "tp2-sp-fused", "pp2-vpp2-tied", "dp2-distributed-optimizer"],
)
def test_two_simulated_npus_learn_what_one_cpu_learns(
    layout: tuple[str, ...], base: Path, on_cpu: Path, tmp_path: Path
) -> None:
    done = run_on_simulated_npu(
        "posttrain_gpt.py",
        [
            "--device", "npu", *layout, "--load", base, "--save", tmp_path, "--data-path", base.parent / "data",
            "--split", "100,0,0", "--seq-length", 32, "--variable-seq-lengths", "--lora-r", 4, "--lora-alpha", 8,
            "--lora-dropout", "0.1",
            "--lora-target-modules", *TARGETS, "--micro-batch-size", 1, "--global-batch-size", 4,
            "--train-iters", ITERATIONS, "--lr", "5e-3", "--min-lr", "5e-3", "--lr-decay-style", "constant",
            "--eval-iters", 0, "--log-interval", 1,
        ],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "Ascend910B1" in done.stdout  # the run says which device it used
    assert "replaced by plain PyTorch" not in done.stderr  # and every norm and attention went to the fused operators
    assert losses(tmp_path) == pytest.approx(losses(on_cpu), rel=ROUNDING)
    expected, found = adapter_tensors(on_cpu), adapter_tensors(tmp_path)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            # AdamW divides by the root of the second moment: an element that hardly moves shows rounding the most
            found[name],
            expected[name],
            rtol=0,
            atol=1e-4,
            msg=lambda text, n=name: f"{n}: {text}",
        )
