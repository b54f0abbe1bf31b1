"""LoRA on families with biases, second norms and grouped sources: unmerged at TP2 equals merged at TP1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_verify import verify_here
from tests.helpers.conversion import convert, random_adapter
from tests.helpers.reference_models import reference_model
from tests.helpers.spawn import run
from tests.helpers.tiny import MOE_FAMILIES, tiny_model
from tests.helpers.training import TARGETS, error_of, hf_to_megatron, train_flags, write_corpus

TOLERANCE = 2e-5  # of the greatest logit, in fp32: the merged weight is rounded once, the unmerged branch never
IDS = [[72, 101, 108, 108, 111, 33, 7, 200], [1, 2, 3]]
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
MODELS = ("bloom", "gemma2", "glm", "internlm", "internlm2", "mixtral", "qwen2_moe")
ATTENTION = ("linear_qkv", "linear_proj")  # what is adapted in a mixture of experts


def logits_here(jobs: dict[str, tuple[str, str | None]], parallel: dict[str, Any], fused: bool) -> dict[str, Any]:
    """Name -> (logits of each row, classes of the adapted linears) of a base and its adapter on this layout."""
    from modellink_lora.adapters.fused import Fusion
    from modellink_lora.config.adapter import LoraConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.inference.logits import forward_logits
    from modellink_lora.parallel.context import make_context
    from modellink_lora.parallel.random import seed_everything
    from modellink_lora.training.base import open_base
    from modellink_lora.training.setup import choose_lora, set_up

    device = get_device("cpu")
    context = make_context(ParallelConfig(**parallel), torch.device("cpu"))
    seed_everything(1, context, device)
    result = {}
    for name, (root, lora_load) in jobs.items():
        base = open_base(root, {}, tp=context.tp_size, seed=1, use_mcore_models=None)
        lora, adapter = choose_lora({}, lora_load, base) if lora_load else (LoraConfig(), None)
        setup = set_up(
            base, lora, adapter, context, device, dtype="fp32", seed=1, overrides={},
            fusion=Fusion(device) if fused else None,
        )  # fmt: skip
        kinds = sorted({type(layer).__name__ for layer in setup.layers.values()})
        biased = sum(layer.base_layer.bias is not None for layer in setup.layers.values())
        result[name] = (forward_logits(setup.chunks[0], IDS, context), kinds, biased)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each model X its base `X-mg`, an adapter `X-lora` and the merged `X-merged`."""
    folder = tmp_path_factory.mktemp("family-lora")
    for name in MODELS:
        hf = folder / f"{name}-hf"
        reference_model(name, hf) if name.startswith("internlm") else tiny_model(name, hf)
        targets = ATTENTION if name in MOE_FAMILIES else TARGETS
        adapter = random_adapter(folder / f"{name}-lora", hf, targets=targets)
        convert(hf, folder / f"{name}-mg", to="mg", use_mcore_models=True)
        convert(hf, folder / f"{name}-merged", to="mg", use_mcore_models=True, lora_load=str(adapter))
    return folder


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_unmerged_equals_merged(fused: bool, folder: Path) -> None:
    merged = run(
        logits_here, world_size=1, parallel={}, fused=False,
        jobs={name: (str(folder / f"{name}-merged"), None) for name in MODELS},
    )[0]  # fmt: skip
    jobs = {name: (str(folder / f"{name}-mg"), str(folder / f"{name}-lora")) for name in MODELS}
    found = run(logits_here, world_size=2, parallel=TP2_SP, fused=fused, jobs=jobs)[0]
    for name in MODELS:
        logits, kinds, biased = found[name]
        assert kinds == (["FusedLoraLinear"] if fused else ["LoraLinear"]), name
        assert biased == {"bloom": 8, "glm": 2, "internlm": 4, "qwen2_moe": 2}.get(name, 0), name
        for mine, theirs in zip(logits, merged[name][0], strict=True):
            error = float((mine - theirs).abs().max() / theirs.abs().max())
            assert error < TOLERANCE, f"{name}: {error:.1e}"


def test_the_adapters_are_visible(folder: Path) -> None:
    jobs = {f"{name}-{kind}": (str(folder / f"{name}-{kind}"), None) for name in MODELS for kind in ("mg", "merged")}
    found = run(logits_here, world_size=1, parallel={}, fused=False, jobs=jobs)[0]
    for name in MODELS:
        base, merged = (found[f"{name}-{kind}"][0][0] for kind in ("mg", "merged"))
        assert float((base - merged).abs().max() / base.abs().max()) > 100 * TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("family, fused", [("bloom", True), ("gemma", False), ("gemma2", True), ("glm", False)])
def test_gradients_equal_peft_and_finite_differences(family: str, fused: bool, tmp_path: Path) -> None:
    hf = tiny_model(family, tmp_path / "hf", tied=family != "glm")
    base = hf_to_megatron(hf, tmp_path / "mg")
    (good, told), _ = run(verify_here, world_size=2, base=str(base), against=("dp",), steps=1, lora_fusion=fused)
    assert good, told
    assert " PEFT " in told and " finite differences " in told


@pytest.mark.parametrize("family, fused", [
    ("qwen2_moe", False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("mixtral", True), ("qwen3_moe", False))),
])  # fmt: skip
def test_gradients_of_a_mixtures_attention_equal_peft(family: str, fused: bool, tmp_path: Path) -> None:
    base = hf_to_megatron(tiny_model(family, tmp_path / "hf"), tmp_path / "mg")
    (good, told), _ = run(
        verify_here, world_size=2, base=str(base), against=("dp", "pp2"), steps=1, lora_fusion=fused, targets=ATTENTION
    )
    assert good, told
    assert " PEFT " in told and "jumps where a token changes its experts" in told


def test_what_training_a_mixture_does_not_do_is_refused(tmp_path: Path) -> None:
    base = str(hf_to_megatron(tiny_model("mixtral", tmp_path / "hf"), tmp_path / "mg"))
    data = {"data_path": (write_corpus(tmp_path / "data"),), "seq_length": 32}
    arguments: dict[str, Any] = {"train": train_flags(load=base, train_iters=1), "data": data}

    def told(targets: tuple[str, ...], **parallel: int) -> str:
        lora = {"r": 4, "target_modules": targets}
        return run(error_of, world_size=2, **arguments, lora=lora, parallel=parallel)[0]

    assert "--lora-target-modules linear_fc1: adapters inside experts are not trained" in told(("linear_fc1",))
    assert "trains with --sequence-parallel only" in told(ATTENTION, tensor_model_parallel_size=2)
