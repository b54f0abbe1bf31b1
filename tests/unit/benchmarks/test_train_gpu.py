"""The benchmark of training on a GPU runs: its code on a tiny model here, and one line where there is no GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def bench(*words: str) -> str:
    program = [sys.executable, "-m", "benchmarks.bench_train_gpu", *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and the benchmark would run for minutes")
def test_without_a_gpu_it_says_so_and_measures_nothing() -> None:
    assert bench().startswith("no CUDA device")


@pytest.mark.slow
def test_every_peer_trains_and_is_compared_with_peft() -> None:
    said = bench("--device", "cpu", "--steps", "1", "--warm-up", "1", "--passes", "1")
    found = re.findall(r"^(.+): [\d,]+ tokens/s, peak [\d.]+ GiB, [\d.]+ x PEFT$", said, re.MULTILINE)
    assert found == ["local", "local, --lora-fusion", "PEFT", "PEFT, 16-bit adapters"]
    assert "left out, transformer_engine: --transformer-impl transformer_engine needs a CUDA device" in said
    assert not (ROOT / "benchmarks/results/train-gpu.json").exists() or "written" not in said
