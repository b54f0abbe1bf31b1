"""The Triton kernels, in triton's interpreter, against the plain operations; and what happens outside their limits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modellink_lora.device import limits, lora_triton
from modellink_lora.device.lora_ops import LoraOps
from modellink_lora.device.lora_triton import TritonLoraOps
from tests.helpers import triton_program

pytest.importorskip("triton", reason="triton exists for Linux only")
ROOT = Path(__file__).resolve().parents[3]


def run(module: str, *args: str, interpret: bool, cache: Path) -> str:
    """A program of its own: triton reads the variable when it is imported, and other tests may have imported it."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("triton")
    run("tests.helpers.triton_program", "interpret", str(folder / "results.pt"), interpret=True, cache=folder)
    found: dict[str, Any] = torch.load(folder / "results.pt")
    return found


def error(value: Tensor, truth: Tensor) -> float:
    """Of the worst row and of the worst column, relative to them: one that is lost is an error of 1."""
    assert (value.shape, value.dtype) == (truth.shape, truth.dtype)
    difference, truth = value.double() - truth.double(), truth.double()
    return max((difference.norm(dim=d) / truth.norm(dim=d).clamp_min(1e-30)).max().item() for d in (0, 1))


@pytest.mark.parametrize("case", triton_program.cases())
def test_a_kernel_gives_what_the_plain_operation_gives(interpreted: dict[str, Any], case: str) -> None:
    values, truths = interpreted[case]["triton"], interpreted[case]["plain"]
    assert list(values) == ["down", "U", "dB", "dA", "dx"]
    errors = {name: error(values[name], truths[name]) for name in values}
    # the interpreter cuts fp32 to bf16 where a GPU rounds: up to one unit in the last of 8 bits
    worst = {name: 2**-7 if value.dtype == torch.bfloat16 else 2e-6 for name, value in values.items()}
    assert {name: found for name, found in errors.items() if found > worst[name]} == {}


def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path: Path) -> None:
    lines = run("tests.helpers.triton_program", "compile", interpret=False, cache=tmp_path).splitlines()
    shared = [(line.split(" ")[0], int(line.split(" ")[1])) for line in lines]
    assert {name for name, _ in shared} == {"down_kernel", "pass_kernel", "add_kernel", "sum_kernel"}
    assert max(size for _, size in shared) <= 99 * 1024  # for one block: Ada; an A100 has 163 KiB, an H100 227


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x": torch.randn(4, 8).double()}, "input is torch.float64"),
        ({"x": torch.randn(8, 4).t()}, "elements of a row lie apart"),
        ({"A": torch.randn(129, 8)}, "rank 129, at most 128"),
        ({"A": torch.randn(2, 8).double()}, "factors are ['torch.float64']"),
    ],
)
def test_outside_the_limits_the_plain_operation_is_taken_and_said_once(
    change: dict[str, Tensor], reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraOps, "down", lambda *args: "plain")
    limits.report.cache_clear()
    inputs = {"x": torch.randn(4, 8), "A": torch.randn(2, 8), **change}
    with caplog.at_level(logging.WARNING):
        answers = {TritonLoraOps(interpret=True).down(inputs["x"], inputs["A"], None) for _ in range(2)}
    assert answers == {"plain"}
    assert [record.getMessage() for record in caplog.records] == [
        f"Triton's down is replaced by plain PyTorch: {reason}"
    ]


def test_every_operation_on_a_cpu_is_the_plain_one() -> None:
    ops, plain = TritonLoraOps(), LoraOps()
    x, A, U, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.randn(8, 2)
    assert torch.equal(ops.down(x, A, None), plain.down(x, A, None))
    assert torch.equal(ops.down_gradient(U, x, None), plain.down_gradient(U, x, None))
    assert all(map(torch.equal, ops.up_gradients(x, B, U), plain.up_gradients(x, B, U)))
    dx = x.clone()
    ops.add_input_gradient(dx, U, A, 0.5, None)
    assert torch.allclose(dx, x + 0.5 * U @ A)


def test_kernels_that_cannot_run_here_are_not_available() -> None:
    assert lora_triton.available() == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def test_importing_the_devices_does_not_import_triton() -> None:
    code = "import sys, modellink_lora.device, modellink_lora.device.lora_triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
