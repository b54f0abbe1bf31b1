"""The main job through the top-level scripts, as a user types them: preprocess, convert, train on 4 processes, merge.

Runs on a real trained model with real Alpaca rows where they are at hand, else, and with the slow tests, on a generated
model and generated rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.shared import is_there, shared
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MERGED = 1e-5  # of the greatest logit: fp32 sums of some hundred terms in another order
PROMPTS = ["Give three tips for staying healthy.", "What is the capital of France?"]


@dataclass(frozen=True)
class Source:
    name: str
    hf: Path
    rows: Path
    seq_length: int


def generated_rows(path: Path) -> Path:
    """Alpaca rows with one simple rule that a small adapter learns."""
    rows = [
        {"instruction": f"Repeat {word} {n} times.", "input": "", "output": " ".join([word] * n)}
        for word in ("cat", "dog", "sun", "moon", "tree", "sea") for n in range(2, 18)
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


REAL = "models/stories260K-hf"
GENERATED = pytest.param("generated", marks=pytest.mark.slow if is_there(REAL) else ())


@pytest.fixture(scope="module", params=["stories260K", GENERATED])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "stories260K":
        hf = shared(REAL)
        return Source("stories260K", hf, shared("data/alpaca/alpaca_data_2k.parquet"), 384)
    hf = tiny_model("llama", folder / "hf", layers=5, tied=True, tokenizer=True, max_position_embeddings=512)
    return Source("generated", hf, generated_rows(folder / "rows.json"), 320)


def command(*words: object, processes: int = 0) -> str:
    """Run a script of the repository, under torchrun if `processes`; returns what it printed."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29617"]
    done = subprocess.run(
        [*launcher, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def hf_logits(folder: Path, token_ids: list[torch.Tensor]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(ids[None]).logits[0] for ids in token_ids]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Greatest difference of logits, relative to the greatest logit."""
    greatest = max(float(e.abs().max()) for e in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / greatest


def test_preprocess_convert_train_merge(source: Source, tmp_path: Path) -> None:
    convert = ("convert_ckpt.py", "--model-type", "GPT", "--use-mcore-models", "--params-dtype", "fp32")
    command(
        "preprocess_data.py", "--input", source.rows, "--tokenizer-name-or-path", source.hf,
        "--output-prefix", tmp_path / "data/alpaca", "--handler-name", "AlpacaStyleInstructionHandler",
        "--prompt-type", "alpaca", "--seq-length", source.seq_length, "--workers", 2,
    )  # fmt: skip
    command(
        *convert, "--load-model-type", "hf", "--save-model-type", "mg", "--model-type-hf", "llama2",
        "--load-dir", source.hf, "--save-dir", tmp_path / "base",
        "--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2, "--num-layer-list", "3,2",
    )  # fmt: skip
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--num-layer-list", "3,2",
              "--sequence-parallel")  # fmt: skip
    printed = command(
        "posttrain_gpt.py", "--stage", "sft", *layout, "--load", tmp_path / "base", "--save", tmp_path / "adapter",
        "--use-mcore-models", "--data-path", tmp_path / "data/alpaca", "--split", "90,10,0",
        "--seq-length", source.seq_length, "--variable-seq-lengths", "--prompt-type", "alpaca",
        "--lora-r", 8, "--lora-alpha", 16, "--lora-target-modules", "query_key_value", "dense", "dense_h_to_4h",
        "dense_4h_to_h", "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 40, "--lr", "3e-3",
        "--min-lr", "3e-4", "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.05", "--eval-iters", 1,
        "--log-interval", 10, "--log-throughput", "--lora-fusion", "--distributed-backend", "nccl", processes=4,
    )  # fmt: skip
    assert printed.count("has no effect") == 1
    rows = [[cell.strip() for cell in line.strip().strip("│").split("│")] for line in printed.splitlines()]
    levels = [row for row in rows if len(row) > 3 and row[2] in ("L0", "L1", "L2")]
    assert {row[0] for row in levels} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}, printed
    assert all(row[2] == "L2" and row[3] == "0" for row in levels), levels  # collectives of its own: none
    rows = [json.loads(line) for line in (tmp_path / "adapter/metrics.jsonl").read_text().splitlines()]
    held_out = [row["validation loss"] for row in rows if "validation loss" in row]
    assert held_out[-1] <= held_out[0] - 0.2, held_out
    assert (tmp_path / "adapter/loss.png").read_bytes().startswith(b"\x89PNG")

    adapter = ("--lora-load", tmp_path / "adapter")
    out = ("--load-model-type", "mg", "--load-dir", tmp_path / "base")
    command(*convert, *out, *adapter, "--save-model-type", "hf", "--save-dir", tmp_path / "merged")
    command(*convert, *out, *adapter, "--save-model-type", "peft", "--save-dir", tmp_path / "peft")
    command(
        *convert, *out, *adapter, "--save-model-type", "mg", "--save-dir", tmp_path / "merged-mg",
        "--target-tensor-parallel-size", 2,
    )  # fmt: skip
    command(
        *convert, "--load-model-type", "mg", "--load-dir", tmp_path / "merged-mg",
        "--save-model-type", "hf", "--save-dir", tmp_path / "merged-again",
    )  # fmt: skip
    merged = tmp_path / "merged/mg2hg"
    first, again = (load_file_of(folder) for folder in (merged, tmp_path / "merged-again/mg2hg"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first), "merged via mg"

    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    unmerged(tmp_path)
    recorded = load_file(tmp_path / "logits.safetensors")
    ids = [recorded[f"ids.{i}"] for i in range(len(PROMPTS))]
    ours = [recorded[f"logits.{i}"] for i in range(len(PROMPTS))]
    to_merged = distance(hf_logits(merged, ids), ours)
    assert to_merged < MERGED
    assert distance(hf_logits(source.hf, ids), ours) > 100 * MERGED, "the adapter must matter"
    assert distance(peft_logits(source.hf, tmp_path / "peft", ids), ours) < MERGED


def unmerged(folder: Path) -> None:
    """Logits of base and adapter, unmerged, at another layout than the trained one."""
    arguments = (
        "-m", "modellink_lora", "logits", "--load", folder / "base", "--lora-load", folder / "adapter",
        "--tensor-model-parallel-size", 2, "--prompt-file", folder / "prompts.json", "--prompt-type", "alpaca",
        "--output", folder / "logits.safetensors",
    )  # fmt: skip
    command(*arguments, processes=2)


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def peft_logits(base: Path, adapter: Path, token_ids: list[torch.Tensor]) -> list[torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return [model(input_ids=ids[None]).logits[0] for ids in token_ids]
