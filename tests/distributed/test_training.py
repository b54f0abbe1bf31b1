"""Precisions, loss reductions, padding and validation: what may change a result, and what must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.models.build import rounding_notes
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    error_of,
    fine_tune_here,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
ROUNDING = 1e-5  # relative, fp32, ten steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_corpus(folder / "data", samples=40)
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def tune(
    base: Path,
    save: Path,
    parallel: dict[str, Any],
    *,
    job: Any = fine_tune_here,
    data: Any = None,
    lora: Any = None,
    **train: Any,
) -> Any:
    """Losses of a run over two processes, or what `job` answers."""
    answers = run(
        job,
        world_size=2,
        train=train_flags(load=str(base), save=str(save), **train),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32, **(data or {})},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS, **(lora or {})},
    )
    return losses(save) if job is fine_tune_here else answers


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return tune(base, tmp_path_factory.mktemp("plain"), PP2)


@pytest.fixture(scope="module")
def fifty(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return tune(base, tmp_path_factory.mktemp("fifty"), PP2, train_iters=50)


@pytest.mark.parametrize(
    "dtype, parallel",
    [
        pytest.param("bf16", TP2_SP, id="tp2-sp-bf16", marks=pytest.mark.slow),
        pytest.param("fp16", TP2_SP, id="tp2-sp-fp16"),
        pytest.param("bf16", PP2, id="pp2-bf16"),
        pytest.param("fp16", PP2, id="pp2-fp16"),
    ],
)
def test_low_precision_follows_fp32(
    dtype: str, parallel: dict[str, Any], base: Path, fifty: list[float], tmp_path: Path
) -> None:
    found = tune(base, tmp_path, parallel, **{dtype: True}, initial_loss_scale=2.0**12, train_iters=50)
    # bf16 keeps 8 bits, 0.4 % a rounding; one per cent of the loss must be little beside what the run learns
    assert 0.01 * max(fifty) <= 0.1 * (fifty[0] - min(fifty))
    assert found == pytest.approx(fifty, rel=1e-2)


def test_adapters_may_have_a_dtype_of_their_own(base: Path, plain: list[float], tmp_path: Path) -> None:
    found = tune(base, tmp_path, TP2_SP, bf16=True, use_distributed_optimizer=True, lora={"dtype": "fp32"})
    assert found == pytest.approx(plain, rel=1e-2)
    assert {tensor.dtype for tensor in adapter_tensors(tmp_path).values()} == {torch.float32}


def test_an_fp32_base_with_16_bit_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    said = run(
        error_of,
        world_size=1,
        train=train_flags(load=str(base), save=str(tmp_path / "run")),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel={},
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dtype": "bf16"},
    )[0]
    assert said.startswith("--lora-dtype bf16 with an fp32 base") and "\n" not in said


def test_fixed_length_padding_does_not_change_the_losses(base: Path, plain: list[float], tmp_path: Path) -> None:
    assert tune(base, tmp_path, TP2_SP, data={"variable_seq_lengths": False}) == pytest.approx(plain, rel=ROUNDING)


def test_a_pad_multiple_that_sequence_parallel_cannot_cut_is_raised(
    base: Path, plain: list[float], tmp_path: Path
) -> None:
    assert tune(base, tmp_path, TP2_SP, data={"pad_to_multiple_of": 3}) == pytest.approx(plain, rel=ROUNDING)


def test_token_loss_does_not_depend_on_how_samples_are_batched(base: Path, tmp_path: Path) -> None:
    one_by_one = tune(base, tmp_path / "dp2", {}, loss_reduction="token")
    together = tune(base, tmp_path / "pp2", PP2, loss_reduction="token", micro_batch_size=4)
    assert together == pytest.approx(one_by_one, rel=ROUNDING)
    means = tune(base, tmp_path / "means", PP2, micro_batch_size=4)
    assert means != pytest.approx(tune(base, tmp_path / "means1", PP2), rel=1e-3), "means of means do depend on it"


def test_validation_and_test_losses_agree_between_layouts(base: Path, tmp_path: Path) -> None:
    found = {}
    for name, parallel in (("tp2-sp", TP2_SP), ("pp2", PP2), ("dp2", {})):
        tune(base, tmp_path / name, parallel, data={"split": "60,20,20"}, eval_iters=2, eval_interval=4)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [(r["iteration"], k, r[k]) for r in rows for k in ("validation loss", "test loss") if k in r]
    assert [(i, k) for i, k, _ in found["dp2"]] == [
        (0, "validation loss"), (4, "validation loss"), (8, "validation loss"), (10, "validation loss"),
        (10, "test loss"),
    ]  # fmt: skip
    for name in ("tp2-sp", "pp2"):
        for (*_, value), (*_, expected) in zip(found[name], found["dp2"], strict=True):
            assert value == pytest.approx(expected, rel=ROUNDING)


def test_interleaved_stages_ask_for_a_multiple_of_the_stages_of_micro_batches(base: Path, tmp_path: Path) -> None:
    interleaved = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
    said = tune(base, tmp_path, interleaved, job=error_of, global_batch_size=3)
    assert all("needs a multiple of 2 micro-batches a step and replica" in line for line in said)


def test_random_weights_are_the_same_model_on_every_layout(base: Path, tmp_path: Path) -> None:
    dims = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "swiglu": True,
        "normalization": "RMSNorm", "position_embedding_type": "rope", "max_position_embeddings": 128,
        "vocab_size": 259,
    }  # fmt: skip
    found = []
    for name, parallel in (("tp2-sp", TP2_SP), ("pp2", PP2)):
        run(
            fine_tune_here,
            world_size=2,
            train=train_flags(save=str(tmp_path / name)),
            data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
            parallel=parallel,
            lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
            model=dims,
        )
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=ROUNDING)


def test_deterministic_mode_trains_to_the_same_losses(base: Path, plain: list[float], tmp_path: Path) -> None:
    assert tune(base, tmp_path, TP2_SP, deterministic=True) == pytest.approx(plain, rel=ROUNDING)


def rounded_here() -> list[str]:
    """What is told when rank r had to round a tensor of layer r."""
    name = f"decoder.layers.{torch.distributed.get_rank()}.input_layernorm.weight"
    return rounding_notes({name: torch.float32}, "bf16")


def test_what_any_stage_rounds_is_told_on_all() -> None:
    told = ["rounded from float32 to bf16: 2 tensors (decoder.layers.*.input_layernorm.weight)"]
    assert run(rounded_here, world_size=2) == [told, told]
