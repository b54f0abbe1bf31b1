"""Fifty AdamW steps against transformers + PEFT, fp32, on every layout: losses and adapters agree.

One model trains with dropout on the adapters' inputs. PEFT is given our masks, which are numbers of (seed, sample,
position, layer, feature): every layout must then drop the very same elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.reporting.run_record import read_record
from tests.helpers import peft_reference
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    FUSED_MUTANTS,
    TARGETS,
    adapter_tensors,
    fine_tune_here,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

FEW = 10  # steps after which a mutant shows
STEPS, R, ALPHA, LR, SEED = 50, 4, 8.0, 5e-3, 1234
# fp32: a relative difference of 1e-7 per operation, in sums whose order differs between layouts, grows over 50 steps
LOSS_TOLERANCE, ADAPTER_TOLERANCE = 1e-5, 1e-4
MODELS = {  # family, tied embeddings, dropout, layers
    "llama-tied": ("llama", True, 0.1, 4),
    "llama-untied": ("llama", False, 0.0, 2),
    "qwen2-tied": ("qwen2", True, 0.0, 2),
    "qwen2-untied": ("qwen2", False, 0.0, 2),
}
TP2, SP, PP2 = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
VPP2 = {"num_layers_per_virtual_pipeline_stage": 1}  # two runs of one layer on each of two stages
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
SHARED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
FUSED = {"lora_fusion": True, "lora_fusion_chunks": "2"}
# name: processes, layout, further settings of the run
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1": (1, {}, {}),
    "tp2": (2, TP2, {}),
    "tp2-sp": (2, TP2 | SP, {}),
    "pp2": (2, PP2, {}),
    "dp2": (2, {}, {}),
    "tp2-pp2-sp": (4, TP2 | PP2 | SP, {}),
}
# for one model: what shares out and schedules the same work in yet other ways
MORE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "uniform-recompute": (1, {}, FULL | {"recompute_method": "uniform"}),
    "block-recompute-pp2": (2, PP2, FULL | {"recompute_method": "block"}),
    "selective-recompute-tp2-sp": (2, TP2 | SP, {"recompute_granularity": "selective"}),
    "pp2-vpp2": (2, PP2 | VPP2, {}),
    "pp2-vpp2-uniform-recompute": (2, PP2 | VPP2, FULL | {"recompute_method": "uniform"}),
    "dp2-distributed-optimizer": (2, {}, {"use_distributed_optimizer": True}),
    "dp2-distributed-optimizer-overlapped": (2, {}, SHARED),
    "tp2-pp2-vpp2": (4, TP2 | PP2 | VPP2 | SP, {}),
    "pp2-vpp2-dp2-distributed-optimizer-overlapped": (4, PP2 | VPP2, SHARED),
}


@dataclass(frozen=True)
class Case:
    base: Path
    layers: int
    dropout: float
    prefix: str
    losses: list[float]
    adapter: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parity")
    prefix = write_corpus(folder / "data")

    @cache
    def case(name: str, shared_a: bool = True) -> Case:
        family, tied, dropout, layers = MODELS[name]
        hf = tiny_model(family, folder / f"{name}-hf", layers=layers, tied=tied)
        base = hf_to_megatron(hf, folder / f"{name}-mg")
        reference = peft_reference.train(
            hf,
            reference_batches(prefix),
            r=R,
            alpha=ALPHA,
            lr=LR,
            seed=SEED,
            shared_a=shared_a,
            dropout=dropout,
        )
        return Case(base, layers, dropout, prefix, *reference)

    return case


def reference_batches(prefix: str) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each step in the run's order, read without any parallelism."""
    from modellink_lora.data.batches import collate
    from modellink_lora.data.corpus import InstructionCorpus
    from modellink_lora.data.sft_dataset import sample_order

    corpus = InstructionCorpus(prefix)
    order = sample_order(len(corpus), STEPS * 4, seed=SEED, shuffle=True).tolist()
    settings: dict[str, Any] = dict(pad_id=0, seq_length=32, variable_seq_lengths=True, pad_to_multiple_of=8)
    samples = [collate([corpus[i]], **settings) | {"samples": torch.tensor([place])} for place, i in enumerate(order)]
    return [samples[start : start + 4] for start in range(0, len(samples), 4)]


def ours(
    case: Case, save: Path, layout: str, mutant: str | None = None, steps: int = STEPS, **more: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and adapter of the run; `more` are further TrainConfig fields. A fused run must be fused everywhere."""
    world, parallel, settings = (LAYOUTS | MORE)[layout]
    run(
        fine_tune_here,
        world_size=world,
        train=train_flags(
            train_iters=steps, lr=LR, min_lr=LR, seed=SEED, load=str(case.base), save=str(save), **settings, **more
        ),
        data={"data_path": (case.prefix,), "seq_length": 32},
        parallel=parallel,
        lora={"r": R, "alpha": ALPHA, "target_modules": TARGETS, "dropout": case.dropout},
        mutant=mutant,
    )
    fusion = read_record(save)["fusion"]["rows"]
    assert sum(int(count) for _, count, *_ in fusion) == (case.layers * len(TARGETS) if more.get("lora_fusion") else 0)
    assert all(int(owned) == 0 for _, _, _, owned, *_ in fusion) or more.get("lora_fusion_level") == "L0"
    return losses(save), adapter_tensors(save)


def loss_error(found: list[float], expected: list[float]) -> float:
    assert len(found) in (STEPS, FEW) and len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=False))


def adapter_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


# by world size, so that processes start once for each
CASES = sorted(
    [(model, layout) for model in MODELS for layout in LAYOUTS] + [("llama-tied", layout) for layout in MORE],
    key=lambda case: (LAYOUTS | MORE)[case[1]][0],
)
# Of each kind of layout, schedule and model some; all others run with the slow tests.
SOON = {("qwen2-untied", layout) for layout in LAYOUTS}
SOON |= {(model, "tp1") for model in MODELS}
SOON |= {("llama-tied", layout) for layout in (
    "uniform-recompute", "block-recompute-pp2", "pp2-vpp2-dp2-distributed-optimizer-overlapped",
)}  # fmt: skip
SOON_FUSED = {("qwen2-untied", "tp2-sp")} | {("llama-tied", layout) for layout in (
    "tp2", "pp2-vpp2-dp2-distributed-optimizer-overlapped",
)}  # fmt: skip  # level L1 below is the fused path at tp2-pp2-sp


def marked(soon: set[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*case, marks=() if case in soon else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("model, layout", marked(SOON))
def test_losses_and_adapters_equal_peft(model: str, layout: str, cases: Any, tmp_path: Path) -> None:
    case = cases(model)
    assert case.losses[-1] < 0.7 * case.losses[0], "the rate must move the model, or a wrong gradient would pass"
    found_losses, found_adapter = ours(case, tmp_path / "run", layout)
    assert loss_error(found_losses, case.losses) < LOSS_TOLERANCE
    assert adapter_error(found_adapter, case.adapter) < ADAPTER_TOLERANCE


@pytest.mark.parametrize("model, layout", marked(SOON_FUSED))
def test_the_fused_path_equals_peft_as_the_plain_one_does(model: str, layout: str, cases: Any, tmp_path: Path) -> None:
    case = cases(model)
    found_losses, found_adapter = ours(case, tmp_path / "run", layout, **FUSED)
    assert loss_error(found_losses, case.losses) < LOSS_TOLERANCE
    assert adapter_error(found_adapter, case.adapter) < ADAPTER_TOLERANCE


# L0 and L2 are also what the cases above run at; each level's gradients are compared in tests/distributed
LEVELS = ["L1", pytest.param("L0", marks=pytest.mark.slow), pytest.param("L2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_the_fused_path_equals_peft(level: str, cases: Any, tmp_path: Path) -> None:
    case = cases("qwen2-tied")  # without dropout, so that L2 is to be had everywhere; with biases
    found_losses, found_adapter = ours(case, tmp_path / "run", "tp2-pp2-sp", **FUSED | {"lora_fusion_level": level})
    assert loss_error(found_losses, case.losses) < LOSS_TOLERANCE
    assert adapter_error(found_adapter, case.adapter) < ADAPTER_TOLERANCE


@pytest.mark.parametrize(
    ("mutant", "layout"), [*((mutant, "tp2-sp") for mutant in FUSED_MUTANTS), ("no LoRA term in dX", "tp2")]
)
def test_a_broken_fused_path_is_noticed(mutant: str, layout: str, cases: Any, tmp_path: Path) -> None:
    case = cases("qwen2-tied")
    found_losses, _ = ours(case, tmp_path / "run", layout, mutant, FEW, **FUSED)
    assert loss_error(found_losses, case.losses) > 10 * LOSS_TOLERANCE


def test_a_fused_factor_whose_gradient_is_not_summed_stops_the_run(cases: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is not the same on all tensor-parallel ranks"):
        ours(cases("qwen2-tied"), tmp_path / "run", "tp2", "replicated factor not summed", FEW, **FUSED)


def test_a_factor_whose_gradient_is_not_summed_stops_the_run(cases: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lora_B is not the same on all tensor-parallel ranks"):
        ours(cases("qwen2-tied"), tmp_path / "run", "tp2-sp", "replicated factor not summed", FEW)


def test_a_wrong_gradient_is_noticed(cases: Any, tmp_path: Path) -> None:
    case = cases("qwen2-tied")
    found_losses, _ = ours(case, tmp_path / "run", "tp2-sp", "no LoRA term in dX", FEW)
    assert loss_error(found_losses, case.losses) > 10 * LOSS_TOLERANCE


def test_an_untied_a_is_noticed(cases: Any, tmp_path: Path) -> None:
    case = cases("qwen2-tied", shared_a=False)
    found_losses, _ = ours(case, tmp_path / "run", "tp1", None, FEW)
    assert loss_error(found_losses, case.losses) > 10 * LOSS_TOLERANCE
