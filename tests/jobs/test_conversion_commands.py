"""The documented commands of merging, as users type them, on a small legacy model with an adapter."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.cli.convert import main
from tests.golden import modellink_adapter, modellink_base
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model
from tests.helpers.tiny import tiny_model

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
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LORA_CHECKPOINT": "./ckpt/llama-2-7b-lora",
    }  # fmt: skip
    for name in ("legacy2legacy_lora", "legacy2hf_lora"):
        script = ROOT / f"examples/legacy/llama2/ckpt_convert_llama2_{name}.sh"
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert equal(place / "model_from_hf/llama-2-7b-hf-legacy/mg2hg", place / "expected/mg2hg")
    assert open_rank_files(place / "model_weights/llama-2-7b-lora2legacy").spelling == "legacy"


def test_logits_before_and_after_merging_are_compared(place: Path) -> None:
    words = [*shlex.split(TO_HF), "--params-dtype", "fp32", "--verify-logits", "3,1,4,1,5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(ROOT / "convert_ckpt.py"), *words], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("logits of 5 tokens"))
    gap, reach = map(float, re.findall(r"(?:difference|reach) ([\d.e+-]+)", line))
    assert 0 <= gap < 1e-4 * reach and "the same best token at 5 of 5 positions" in line


@pytest.mark.parametrize("kind", ["llama", "qwen", "chatglm3"])
def test_the_older_spellings_of_an_export(place: Path, kind: str) -> None:
    words = f"--loader megatron --saver megatron --save-model-type save_huggingface_{kind} --w-pack False " + LORA
    assert main([*shlex.split(words), "--load-dir", "model_weights/llama-2-7b-legacy", "--save-dir", "out"]) == 0
    assert equal(place / "out/mg2hg", place / "expected/mg2hg")


HEADS, GROUPS, D = 4, 2, 16  # of tiny_model
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What a user of ModelLink has at the places of the commands; returns the adapter's full tensors.

    The base lies on 2 x 2 x 2, the adapter of a legacy run on 2 tensor ranks.
    """
    hf = tiny_model("llama", tmp_path / "model_from_hf/llama-2-7b-hf", layers=4, tokenizer=True)
    base = modellink_base.megatron_tensors(hf_tensors(hf), modellink_base.LLAMA, heads=HEADS, groups=GROUPS)
    modellink_base.write(tmp_path / "model_weights/llama-2-7b-legacy", base, heads=HEADS, groups=GROUPS, legacy=True,
                         tp=2, pp=2, vpp=2)  # fmt: skip
    generator, adapter = torch.Generator().manual_seed(9), {}
    for name, weight in base.items():
        if name.split(".")[-2] in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            out_features, in_features = weight.shape
            module = name.removesuffix(".weight")
            adapter[f"{module}.lora_A"] = torch.randn(16, in_features, generator=generator) * 0.1
            adapter[f"{module}.lora_B"] = torch.randn(out_features, 16, generator=generator) * 0.1
    padded = {n: torch.cat([t, t[-1:]]) if len(t) == 259 else t for n, t in base.items()}
    modellink_adapter.write(tmp_path / "ckpt/llama-2-7b-lora", padded, adapter, heads=HEADS, groups=GROUPS, tp=2,
                            legacy=True, alpha=32)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return adapter


def logits_of_base_and_adapter(folder: Path, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' model with alpha / r B A x added to what each linear gives, and nothing merged."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

    def added(linear: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> None:
        linear.register_forward_hook(lambda _, inputs, output: output + 2.0 * (inputs[0] @ a.T @ b.T))

    for number, layer in enumerate(model.model.layers):
        at = f"decoder.layers.{number}."
        a, b = (adapter[f"{at}self_attention.linear_qkv.lora_{x}"] for x in "AB")
        rows = b.view(GROUPS, HEADS // GROUPS + 2, D, -1)
        added(layer.self_attn.q_proj, a, rows[:, :-2].reshape(HEADS * D, -1))
        added(layer.self_attn.k_proj, a, rows[:, -2].reshape(GROUPS * D, -1))
        added(layer.self_attn.v_proj, a, rows[:, -1].reshape(GROUPS * D, -1))
        a, b = (adapter[f"{at}mlp.linear_fc1.lora_{x}"] for x in "AB")
        added(layer.mlp.gate_proj, a, b[:128])
        added(layer.mlp.up_proj, a, b[128:])
        for linear, name in ((layer.self_attn.o_proj, "self_attention.linear_proj"),
                             (layer.mlp.down_proj, "mlp.linear_fc2")):  # fmt: skip
            added(linear, *(adapter[f"{at}{name}.lora_{x}"] for x in "AB"))
    with torch.no_grad():
        return model(IDS).logits


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_what_modellink_saved_becomes_base_plus_adapter_in_transformers(theirs: dict[str, torch.Tensor]) -> None:
    original = Path("model_from_hf/llama-2-7b-hf")
    expected, plain = logits_of_base_and_adapter(original, theirs), logits(original)
    reach = plain.abs().max()
    assert (expected - plain).abs().max() > 0.01 * reach, "the adapter must matter"
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    assert main(shlex.split(TO_HF)) == 0
    assert (logits(original / "mg2hg") - expected).abs().max() < 1e-5 * reach
    assert all((original / name).read_bytes() == content for name, content in before.items())
    # into legacy, and from there without an adapter: the same bits
    assert main(shlex.split(TO_LEGACY)) == 0
    merged = open_rank_files(Path("model_weights/llama-2-7b-lora2legacy"))
    assert (merged.spelling, merged.tp, merged.holds_adapter) == ("legacy", 1, False)
    words = "--loader megatron --saver megatron --save-model-type save_huggingface_llama"
    Path("again").mkdir()
    Path("again/config.json").write_bytes(before["config.json"])
    assert main(f"{words} --load-dir model_weights/llama-2-7b-lora2legacy --save-dir again".split()) == 0
    assert equal(Path("again/mg2hg"), original / "mg2hg")


def test_a_script_takes_places_and_flags_of_the_user(theirs: dict[str, torch.Tensor]) -> None:
    given = {"CKPT_LOAD_DIR": "model_weights/llama-2-7b-legacy", "LORA_CHECKPOINT": "ckpt/llama-2-7b-lora",
             "CKPT_SAVE_DIR": "out", "TP": "2", "PP": "4", "PYTHONPATH": str(ROOT)}  # fmt: skip
    environment = {**os.environ, **given, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ROOT / "examples/legacy/llama2/ckpt_convert_llama2_legacy2legacy_lora.sh"
    done = subprocess.run(["bash", script, "--params-dtype", "bf16"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged = open_rank_files(Path("out"))
    assert (merged.tp, merged.partition.counts, merged.dtype) == (2, (1, 1, 1, 1), torch.bfloat16)
    original = Path("model_from_hf/llama-2-7b-hf")
    assert main([*shlex.split(TO_HF), "--params-dtype", "bf16"]) == 0
    Path("again").mkdir()
    Path("again/config.json").write_bytes((original / "config.json").read_bytes())
    convert(Path("out"), Path("again"), to="hf")
    assert equal(Path("again/mg2hg"), original / "mg2hg")


@pytest.mark.parametrize("kind", ["own", "rank files", "peft"])
def test_an_adapter_of_any_kind_and_layout_merges_to_the_same_bits(place: Path, kind: str) -> None:
    own, base = place / "ckpt/llama-2-7b-lora", place / "model_weights/llama-2-7b-legacy"
    given = {"own": own, "rank files": place / "ranks", "peft": place / "peft"}[kind]
    if kind == "rank files":
        convert(base, given, to="adapter-ranks", lora_load=str(own), target_tensor_parallel_size=1,
                target_pipeline_parallel_size=4, use_mcore_models=True)  # fmt: skip
        for file in given.glob("iter_*/*/model_optim_rng.pt"):  # as ModelLink would have left them
            document = torch.load(file, weights_only=False)
            del document["modellink_lora"]
            torch.save(document, file)
    elif kind == "peft":
        convert(place / "model_from_hf/llama-2-7b-hf", given, to="peft", lora_load=str(own))
    words = f"--load-model-type mg --save-model-type hf --load-dir {base} --save-dir out --lora-load {given}"
    assert main([*words.split(), "--lora-alpha", "32"]) == 0
    assert equal(place / "out/mg2hg", place / "expected/mg2hg")
