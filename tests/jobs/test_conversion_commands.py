"""The documented commands of merging, as users type them, on a small legacy model with an adapter."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.cli.convert import main
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = Dimensions(layers=4, hidden=32, ffn=64, head_dim=8, dtype=torch.float16)
LORA = """--lora-load ./ckpt/llama-2-7b-lora --lora-r 16 --lora-alpha 32
    --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h"""
TO_LEGACY = f"""--model-type GPT --load-model-type mg --save-model-type mg --load-dir ./model_weights/llama-2-7b-legacy/
    {LORA} --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1
    --save-dir ./model_weights/llama-2-7b-lora2legacy"""
TO_HF = f"""--model-type GPT --load-model-type mg --save-model-type hf
    --load-dir ./model_weights/llama-2-7b-legacy/ {LORA} --target-tensor-parallel-size 1
    --target-pipeline-parallel-size 1 --save-dir ./model_from_hf/llama-2-7b-hf/"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ./model_from_hf, ./model_weights (TP 2, interleaved stages) and ./ckpt, which is entered."""
    hf = made_model(tmp_path / "model_from_hf/llama-2-7b-hf", MODEL)
    convert(hf, tmp_path / "model_weights/llama-2-7b-legacy", to="mg", target_tensor_parallel_size=2,
            target_pipeline_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)  # fmt: skip
    random_adapter(tmp_path / "ckpt/llama-2-7b-lora", hf, r=16, alpha=32.0)
    convert(hf, tmp_path / "expected", to="hf", lora_load=str(tmp_path / "ckpt/llama-2-7b-lora"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def equal(a: Path, b: Path) -> bool:
    x, y = hf_tensors(a), hf_tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in y)


def test_merging_into_legacy_and_into_hugging_face(place: Path) -> None:
    assert main(shlex.split(TO_LEGACY)) == 0
    merged = open_rank_files(place / "model_weights/llama-2-7b-lora2legacy")
    assert (merged.spelling, merged.tp, merged.partition.stages, merged.dtype) == ("legacy", 1, 1, torch.float16)
    assert main(shlex.split(TO_HF)) == 0
    assert equal(place / "model_from_hf/llama-2-7b-hf/mg2hg", place / "expected/mg2hg")
    convert(place / "model_weights/llama-2-7b-lora2legacy", place / "back", to="hf")
    assert equal(place / "back/mg2hg", place / "expected/mg2hg")


def test_the_scripts_of_both_directions(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("legacy2legacy_lora", "legacy2hf_lora"):
        script = ROOT / f"examples/legacy/llama2/ckpt_convert_llama2_{name}.sh"
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert equal(place / "model_from_hf/llama-2-7b-hf/mg2hg", place / "expected/mg2hg")
    assert open_rank_files(place / "model_weights/llama-2-7b-lora2legacy").spelling == "legacy"


@pytest.mark.parametrize("kind", ["llama", "qwen", "chatglm3"])
def test_the_older_spellings_of_an_export(place: Path, kind: str) -> None:
    words = f"--loader megatron --saver megatron --save-model-type save_huggingface_{kind} --w-pack False " + LORA
    assert main([*shlex.split(words), "--load-dir", "model_weights/llama-2-7b-legacy", "--save-dir", "out"]) == 0
    assert equal(place / "out/mg2hg", place / "expected/mg2hg")
