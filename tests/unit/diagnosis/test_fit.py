"""A training run is judged before it starts: inputs, layout, memory, each mistake with its flag and variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modellink_lora.cli.training_command import read_command
from modellink_lora.diagnosis.finding import Finding
from modellink_lora.diagnosis.fit import Here, fit_findings
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.training import write_corpus

GIB = 2**30
LLAMA_7B = ("--load", "llama-2-7b-mcore", "--bf16", "--seq-length", "4096")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    return ["--data-path", write_corpus(folder / "data"), "--tokenizer-name-or-path", str(tokenizer)]


def examine(
    inputs: list[str], *flags: str, processes: int = 8, variables: dict[str, str] | None = None, **here: Any
) -> dict[str, Finding]:
    words = ["torchrun", "--nproc-per-node", str(processes), "posttrain_gpt.py", *inputs, *flags, "--lr", "1e-4"]
    words += ["--train-iters", "5", "--lora-r", "16", "--lora-alpha", "32", "--lora-target-modules", "linear_qkv"]
    run = read_command(words, devices=8, variables=variables)
    return {f.what: f for f in fit_findings(run, Here(**{"kind": "cuda", "count": 8, "free": 80 * GIB, **here}))}


def test_a_run_that_fits_is_fine_apart_from_the_missing_checkpoint(inputs: list[str]) -> None:
    found = examine(inputs, *LLAMA_7B)
    assert {what for what, f in found.items() if f.level != "ok"} == {"--load"}
    assert "6,738,415,616 parameters, as llama-2-7b" in found["model"].found
    assert found["layout"].found.startswith("8 processes = TP 1 x PP 1 x DP 8; 8 samples a step, bf16")
    assert (
        found["memory of a rank"].found.startswith(("15.", "16.", "17.", "18.", "19.")) or "GiB" in found["fit"].found
    )
    assert "frozen weights 12.6 GiB" in found["memory of a rank"].found  # 6.74e9 x 2 bytes


def test_what_does_not_fit_names_the_first_flags_that_would(inputs: list[str]) -> None:
    flags = (*LLAMA_7B, "--micro-batch-size", "4", "--global-batch-size", "32")
    much = examine(inputs, *flags, free=60 * GIB)["fit"]
    assert much.level == "problem" and "--micro-batch-size 1 would need" in much.advice
    more = examine(inputs, *flags, free=20 * GIB)["fit"]
    assert more.level == "problem" and more.advice.startswith("--micro-batch-size 1 --recompute-granularity full")
    most = examine(inputs, *flags, free=8 * GIB)["fit"]
    assert most.level == "problem" and "--tensor-model-parallel-size" in most.advice


def test_between_free_memory_and_room_for_buffers_it_is_a_warning(inputs: list[str]) -> None:
    needed = float(examine(inputs, *LLAMA_7B)["memory of a rank"].found.split()[0])
    assert examine(inputs, *LLAMA_7B, free=int((needed + 0.5) * GIB))["fit"].level == "warning"
    assert examine(inputs, *LLAMA_7B, free=int((needed - 0.5) * GIB))["fit"].level == "problem"


def test_processes_on_a_cpu_share_its_memory(inputs: list[str]) -> None:
    needed = float(examine(inputs, *LLAMA_7B, processes=2, kind="cpu", free=2**50)["memory of a rank"].found.split()[0])
    assert examine(inputs, *LLAMA_7B, processes=2, kind="cpu", free=int(1.5 * needed * GIB))["fit"].level == "problem"
    assert examine(inputs, *LLAMA_7B, processes=2, kind="cpu", free=int(3 * needed * GIB))["fit"].level == "ok"


def test_a_run_on_another_kind_of_device_is_told_so(inputs: list[str]) -> None:
    found = examine(inputs, *LLAMA_7B, "--device", "npu")["--device"]
    assert found.level == "warning" and found.advice == "what follows holds for cuda: give doctor --device npu"
    assert "--device" not in examine(inputs, *LLAMA_7B, "--device", "cuda")


def test_each_mistake_is_a_line_with_its_variable(tmp_path: Path) -> None:
    flags = ["--load", "/nowhere/mine", "--data-path", "/nowhere/data", "--tokenizer-name-or-path", "/nowhere/hf",
             "--seq-length", "64", "--tensor-model-parallel-size", "3"]  # fmt: skip
    variables = {"--load": "CKPT_LOAD_DIR", "--data-path": "DATA_PATH", "--tokenizer-name-or-path": "TOKENIZER_MODEL",
                 "--tensor-model-parallel-size": "TP"}  # fmt: skip
    found = examine(flags, count=4, variables=variables)
    wrong = {what: f.advice for what, f in found.items() if f.level == "problem"}
    assert set(wrong) == {"--load", "--data-path", "--tokenizer-name-or-path", "devices", "model", "layout"}
    assert "CKPT_LOAD_DIR in the script" in wrong["--load"] and "DATA_PATH" in wrong["--data-path"]
    assert "TOKENIZER_MODEL" in wrong["--tokenizer-name-or-path"] and "TP" in wrong["layout"]
    assert "GPUS_PER_NODE or NPUS_PER_NODE) to 4" in wrong["devices"]
    assert "memory is not estimated" in found["model"].found


def test_a_config_beside_the_tokenizer_stands_in_for_the_checkpoint(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 259, "max_position_embeddings": 128}'
    )
    tiny_tokenizer(tmp_path)
    found = examine(
        [*inputs[:2], "--tokenizer-name-or-path", str(tmp_path), "--load", "/nowhere", "--seq-length", "256"]
    )
    assert "2 layers, hidden 64" in found["model"].found and str(tmp_path) in found["model"].found
    assert found["--seq-length"].level == "problem" and "128 positions" in found["--seq-length"].found


def test_flags_that_exclude_each_other_end_the_examination(inputs: list[str]) -> None:
    found = examine([*inputs, "--seq-length", "64", "--bf16", "--fp16"])
    assert found["training flags"].level == "problem" and "--fp16" in found["training flags"].found
    assert "layout" not in found
