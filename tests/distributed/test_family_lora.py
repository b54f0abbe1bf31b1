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
from tests.helpers.tiny import tiny_model
from tests.helpers.training import hf_to_megatron

TOLERANCE = 2e-5  # of the greatest logit, in fp32: the merged weight is rounded once, the unmerged branch never
IDS = [[72, 101, 108, 108, 111, 33, 7, 200], [1, 2, 3]]
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
MODELS = ("bloom", "gemma2", "glm", "internlm", "internlm2")


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
        adapter = random_adapter(folder / f"{name}-lora", hf)
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
        assert biased == {"bloom": 8, "glm": 2, "internlm": 4}.get(name, 0), name
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
