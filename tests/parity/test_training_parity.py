"""Fifty AdamW steps against transformers + PEFT, fp32, on every layout: losses and adapters agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import peft_reference
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

STEPS, R, ALPHA, LR, SEED = 50, 4, 8.0, 5e-3, 1234
# fp32: a relative difference of 1e-7 per operation, in sums whose order differs between layouts, grows over 50 steps
LOSS_TOLERANCE, ADAPTER_TOLERANCE = 1e-5, 1e-4
MODELS = {"llama-tied": ("llama", True), "llama-untied": ("llama", False), "qwen2-tied": ("qwen2", True),
          "qwen2-untied": ("qwen2", False)}  # fmt: skip
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2-pp2-sp": (
        4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    base: Path
    prefix: str
    losses: list[float]
    adapter: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parity")
    prefix = write_corpus(folder / "data")

    @cache
    def case(name: str, shared_a: bool = True) -> Case:
        family, tied = MODELS[name]
        hf = tiny_model(family, folder / f"{name}-hf", layers=4, tied=tied)
        base = hf_to_megatron(hf, folder / f"{name}-mg")
        reference = peft_reference.train(
            hf, reference_batches(prefix), r=R, alpha=ALPHA, lr=LR, seed=SEED, shared_a=shared_a
        )
        return Case(base, prefix, *reference)

    return case


def reference_batches(prefix: str) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each step in the run's order, read without any parallelism."""
    from modellink_lora.data.batches import collate
    from modellink_lora.data.corpus import InstructionCorpus
    from modellink_lora.data.sft_dataset import sample_order

    corpus = InstructionCorpus(prefix)
    order = sample_order(len(corpus), STEPS * 4, seed=SEED, shuffle=True).tolist()
    samples = [
        collate([corpus[i]], pad_id=0, seq_length=32, variable_seq_lengths=True, pad_to_multiple_of=8) for i in order
    ]
    return [samples[start : start + 4] for start in range(0, len(samples), 4)]


def ours(case: Case, save: Path, layout: str, mutant: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    world, parallel = LAYOUTS[layout]
    run(
        fine_tune_here,
        world_size=world,
        train=train_flags(train_iters=STEPS, lr=LR, min_lr=LR, seed=SEED, load=str(case.base), save=str(save)),
        data={"data_path": (case.prefix,), "seq_length": 32},
        parallel=parallel,
        lora={"r": R, "alpha": ALPHA, "target_modules": TARGETS},
        mutant=mutant,
    )
    return losses(save), adapter_tensors(save)


def loss_error(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def adapter_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


# by world size, so that processes start once for each
CASES = sorted(((model, layout) for model in MODELS for layout in LAYOUTS), key=lambda case: LAYOUTS[case[1]][0])


@pytest.mark.parametrize("model, layout", CASES)
def test_losses_and_adapters_equal_peft(model: str, layout: str, cases: Any, tmp_path: Path) -> None:
    case = cases(model)
    assert case.losses[-1] < 0.7 * case.losses[0], "the rate must move the model, or a wrong gradient would pass"
    found_losses, found_adapter = ours(case, tmp_path / "run", layout)
    assert loss_error(found_losses, case.losses) < LOSS_TOLERANCE
    assert adapter_error(found_adapter, case.adapter) < ADAPTER_TOLERANCE


@pytest.mark.parametrize("mutant", ["no LoRA term in dX", "replicated factor not summed"])
def test_a_wrong_gradient_is_noticed(mutant: str, cases: Any, tmp_path: Path) -> None:
    case = cases("llama-tied")
    found_losses, found_adapter = ours(case, tmp_path / "run", "tp2-sp", mutant)
    assert loss_error(found_losses, case.losses) > 10 * LOSS_TOLERANCE
    assert adapter_error(found_adapter, case.adapter) > 10 * ADAPTER_TOLERANCE


def test_an_untied_a_is_noticed(cases: Any, tmp_path: Path) -> None:
    case = cases("llama-tied", shared_a=False)
    found_losses, _ = ours(case, tmp_path / "run", "tp2-sp")
    assert loss_error(found_losses, case.losses) > 10 * LOSS_TOLERANCE
