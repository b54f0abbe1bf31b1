"""Base, unmerged adapter and merged models side by side: a right merge passes, a wrong one is told apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.evaluation.comparison import BASE, MERGED_HF, MERGED_META, UNMERGED, Comparison, Variant
from tests.helpers.comparing import compared
from tests.helpers.conversion import convert
from tests.helpers.engine import peft_adapter, reference
from tests.helpers.jobs import ROOT
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model, tiny_tokenizer

PROMPTS = ("The first prompt", "Another, which is a little longer than the first")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `hf`, an adapter `lora`, and models merged of them: right, rounded to bf16, and with a wrong alpha."""
    folder = tmp_path_factory.mktemp("compare")
    hf = tiny_tokenizer(tiny_model("llama", folder / "hf", std=0.15, vocab_size=260))
    peft_adapter(hf, folder / "lora", r=4, lora_alpha=8)
    for alpha in (9, 12):
        shutil.copytree(folder / "lora", folder / f"alpha{alpha}")
        file = folder / f"alpha{alpha}/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": alpha}))
    for name, adapter, dtype in (("", "lora", None), ("-bf16", "lora", "bf16"), ("-alpha9", "alpha9", None),
                                 ("-alpha12-bf16", "alpha12", "bf16")):  # fmt: skip
        settings = {"lora_load": str(folder / adapter), "params_dtype": dtype}
        convert(hf, folder / f"merged{name}", to="hf", **settings)
        convert(hf, folder / f"meta{name}", to="meta", target_tensor_parallel_size=2, **settings)
    return folder


def ask(
    models: Path, *, world_size: int = 1, parallel: dict[str, Any] | None = None, engine: Any = None, **given: Any
) -> tuple[Comparison, list[str]]:
    settings = {"load": str(models / "hf"), "lora_load": str(models / "lora")} if engine is None else engine
    comparison = {"prompt": PROMPTS, "max_new_tokens": 12, **given}
    return run(compared, world_size=world_size, comparison=comparison, engine=settings, parallel=parallel)[0]


def variants(found: Comparison) -> dict[str, Variant]:
    return {variant.name: variant for variant in found.variants}


def both(models: Path, kind: str = "") -> dict[str, str]:
    return {"merged_hf": str(models / f"merged{kind}/mg2hg"), "merged_meta": str(models / f"meta{kind}")}


def test_merged_models_are_the_unmerged_one_and_the_base_is_as_far_as_transformers_says(models: Path) -> None:
    found, said = ask(models, **both(models))
    assert list(variants(found)) == [BASE, UNMERGED, MERGED_HF, MERGED_META] and not found.wrong
    assert not any("left out" in line for line in said)
    answers = {name: variant.ids for name, variant in variants(found).items()}
    assert answers[UNMERGED] == answers[MERGED_HF] == answers[MERGED_META] != answers[BASE]
    tuned, base = reference(models / "hf", models / "lora"), reference(models / "hf", None)
    largest, same, positions = 0.0, 0, 0
    for prompt, answer in zip(PROMPTS, answers[UNMERGED], strict=True):
        ids = torch.tensor([[*prompt.encode(), *answer]])
        with torch.no_grad():
            one, other = tuned(ids).logits[0], base(ids).logits[0]
        largest = max(largest, (one - other).abs().max().item())
        same, positions = same + int((one.argmax(-1) == other.argmax(-1)).sum()), positions + ids.numel()
    gap = variants(found)[BASE].gap
    assert gap is not None and gap.largest == pytest.approx(largest, rel=1e-4)
    assert (gap.same_best, gap.positions) == (same, positions)
    for name in (MERGED_HF, MERGED_META):
        gap = variants(found)[name].gap
        assert gap is not None and gap.largest < 1e-4 and gap.same_best == positions
    base_bytes, tuned_bytes = (variants(found)[name].weight_bytes for name in (BASE, UNMERGED))
    assert base_bytes == sum(p.nbytes for p in base.parameters())
    # projections that share a linear are kept side by side: q, k and v have rank 12 together, gate and up 8
    factors = 12 * (64 + 128) + 4 * (64 + 64) + 8 * (64 + 256) + 4 * (128 + 64)
    assert tuned_bytes - base_bytes == 2 * 4 * factors


def test_a_wrong_alpha_is_told_apart_from_rounding(models: Path) -> None:
    right, wrong, slightly_wrong = both(models, "-bf16"), both(models, "-alpha12-bf16"), both(models, "-alpha9")
    found, _ = ask(models, merged_hf=right["merged_hf"], merged_meta=wrong["merged_meta"])
    assert [one.name for one in found.wrong] == [MERGED_META]
    # that one file was rounded to bf16 is no excuse for another in fp32
    found, _ = ask(models, merged_hf=slightly_wrong["merged_hf"], merged_meta=right["merged_meta"])
    assert [one.name for one in found.wrong] == [MERGED_HF]


@pytest.mark.parametrize("kind", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_parallel_runs_find_the_same(kind: str, models: Path) -> None:
    given = {"merged_hf": both(models)["merged_hf"], "merged_meta": both(models, "-alpha9")["merged_meta"]}
    expected, _ = ask(models, **given)
    found, _ = ask(models, world_size=2, parallel={f"{kind}_model_parallel_size": 2}, **given)
    assert [one.name for one in found.wrong] == [MERGED_META]
    for name, one in variants(found).items():
        assert one.ids == variants(expected)[name].ids
        gap, other = one.gap, variants(expected)[name].gap
        assert (gap is None) == (other is None)
        if gap and other and name in (BASE, MERGED_META):
            assert gap.largest == pytest.approx(other.largest, rel=1e-3)


def test_what_is_missing_is_left_out_with_a_line_and_one_model_is_refused(models: Path) -> None:
    found, said = ask(models, engine={}, **both(models))
    assert list(variants(found)) == [MERGED_HF, MERGED_META] and not found.wrong and found.reference == MERGED_HF
    assert said == ["no --load: base and unmerged adapter are left out"]
    found, said = ask(models, engine={"load": str(models / "hf")}, merged_hf=both(models)["merged_hf"])
    assert list(variants(found)) == [BASE, MERGED_HF] and not found.wrong
    assert said == ["no --lora-load: the unmerged adapter is left out", "no --merged-meta: left out"]
    error, _ = ask(models, engine={"load": str(models / "hf")})
    assert str(error).startswith("nothing to compare: give at least two of")
    error, _ = ask(models, merged_hf=str(models / "merged"))
    assert str(error).startswith(f"--merged-hf {models / 'merged'}: holds no config.json")


def test_the_command_reports_and_its_exit_status_is_the_verdict(models: Path, tmp_path: Path) -> None:
    words = ["--load", models / "hf", "--lora-load", models / "lora", "--merged-hf", both(models)["merged_hf"],
             "--merged-meta", both(models, "-alpha9")["merged_meta"], "--prompt", *PROMPTS, "--max-new-tokens", "8",
             "--save", tmp_path / "out"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "modellink_lora", "compare", *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "merged (HF): the same model as unmerged" in done.stdout
    assert "merged (Meta): NOT the same model as unmerged" in done.stdout
    for name in ("compare.md", "compare.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "merged (Meta): NOT the same model as unmerged" in text and PROMPTS[1] in text
        assert "http" not in text.replace("https://www.w3.org", "")
