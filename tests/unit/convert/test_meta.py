"""Meta's format: its own forward gives transformers' logits, and every tensor is the Hugging Face one to the bit."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint import meta, store
from modellink_lora.checkpoint.meta import ffn_params
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model
from tests.helpers.meta_llama import as_hugging_face, ffn_width, gathered, logits, params_of
from tests.helpers.shared import shared
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[3]
IDS = [1, 7, 250, 42, 42, 3, 199, 8, 101, 5]
SCALED = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
# name -> (settings of the model, dimension along which the embedding is cut)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama-1": ({"num_key_value_heads": 4, "intermediate_size": 256}, 1),
    "grouped": ({"intermediate_size": 192}, 1),
    "tied": ({"tied": True, "intermediate_size": 172}, 1),
    "llama-3.1": ({"rope_parameters": SCALED, "intermediate_size": 224}, 0),
}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    same = found.keys() == expected.keys()
    return same and all(x.dtype == found[n].dtype and torch.equal(x, found[n]) for n, x in expected.items())


def expected_logits(hf: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_metas_forward_gives_transformers_logits(kind: str, size: int, tmp_path: Path) -> None:
    settings, embedding = MODELS[kind]
    hf = tiny_model("llama", tmp_path / "hf", **{"vocab_size": 260, **settings}, std=0.2)
    out = tmp_path / "meta"
    convert(hf, out, to="meta", target_tensor_parallel_size=size)
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"consolidated.{rank:02}.pth" for rank in range(size)), "params.json"]  # fmt: skip
    found, expected = logits(gathered(out, embedding=embedding), params_of(out), IDS), expected_logits(hf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_merging_is_that_of_the_hugging_face_result(tmp_path: Path) -> None:
    hf = made_model(tmp_path / "hf", Dimensions(layers=4, hidden=16, head_dim=4, vocab=24, dtype=torch.bfloat16))
    adapter = random_adapter(tmp_path / "adapter", hf)
    convert(hf, tmp_path / "mg", to="mg", target_tensor_parallel_size=2, target_pipeline_parallel_size=2,
            num_layers_per_virtual_pipeline_stage=1)  # fmt: skip
    convert(hf, tmp_path / "merged", to="hf", lora_load=str(adapter))
    expected = hf_tensors(tmp_path / "merged/mg2hg")
    assert not any(torch.equal(expected[n], x) for n, x in hf_tensors(hf).items() if n.endswith("_proj.weight"))
    for source in ("hf", "mg"):
        for size in (1, 2):
            out = tmp_path / f"{source}-{size}"
            said = convert(tmp_path / source, out, to="meta", lora_load=str(adapter), target_tensor_parallel_size=size,
                           workers=3, verify=True)  # fmt: skip
            assert f"{size * 39} tensors read back are the same bytes" in said
            assert equal(as_hugging_face(gathered(out), params_of(out)), expected)
            assert json.loads((out / "merge_report.json").read_text())["weights"].keys() == json.loads(
                (tmp_path / "merged/merge_report.json").read_text())["weights"].keys()  # fmt: skip


def test_a_dtype_asked_for_is_written(tmp_path: Path) -> None:
    hf = made_model(tmp_path / "hf", Dimensions(hidden=16, vocab=24))
    convert(hf, tmp_path / "out", to="meta", params_dtype="fp16", target_tensor_parallel_size=2)
    expected = {name: tensor.half() for name, tensor in hf_tensors(hf).items()}
    assert equal(as_hugging_face(gathered(tmp_path / "out"), params_of(tmp_path / "out")), expected)


@pytest.mark.parametrize("model", ["real", "generated"])
def test_the_command_on_a_whole_model(model: str, tmp_path: Path) -> None:
    hf = shared("models/stories260K-hf") if model == "real" else tiny_model(
        "llama", tmp_path / "hf", tied=True, vocab_size=260)  # fmt: skip
    if model == "generated":
        (hf / "tokenizer.model").write_bytes(b"pieces")
    words = f"--load-model-type hf --load-dir {hf} --save-model-type meta --save-dir out".split()
    words += ["--target-tensor-parallel-size", "2", "--verify"]
    done = subprocess.run([sys.executable, ROOT / "convert_ckpt.py", *words], cwd=tmp_path, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("tied to the embedding", "cuts the embedding by columns", "verified: "):
        assert text in done.stdout
    out = tmp_path / "out"
    assert (out / "tokenizer.model").read_bytes() == (hf / "tokenizer.model").read_bytes()
    weights, params = gathered(out), params_of(out)
    source = hf_tensors(hf)
    source["lm_head.weight"] = source["model.embed_tokens.weight"]
    assert equal(as_hugging_face(weights, params), source)
    torch.testing.assert_close(logits(weights, params, IDS), expected_logits(hf), rtol=1e-4, atol=1e-4)


def test_a_file_is_what_torch_saves(tmp_path: Path) -> None:
    hf = made_model(tmp_path / "hf", Dimensions(hidden=16))
    convert(hf, tmp_path / "out", to="meta")
    path = tmp_path / "out/consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    plain, mapped = (torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True))
    assert equal(plain, mapped) and type(plain["norm.weight"]) is torch.Tensor


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = Dimensions(layers=6, heads=8, groups=4, head_dim=128, hidden=1024, ffn=2816, vocab=16000,
                      dtype=torch.bfloat16)  # fmt: skip  # 207 MB, of which the largest tensor has 33 MB
    hf = made_model(tmp_path / "hf", size)
    words = ["--load-model-type", "hf", "--load-dir", hf, "--save-model-type", "meta", "--save-dir", tmp_path / "out",
             "--target-tensor-parallel-size", "2", "--lora-load", random_adapter(tmp_path / "a", hf)]  # fmt: skip
    done = subprocess.run([sys.executable, ROOT / "tests/helpers/conversion_program.py", *words], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    held = re.search(r"^anonymous (\d+)$", done.stdout, re.MULTILINE)
    assert held and int(held.group(1)) <= 2 * 16000 * 1024 * 2 + 64 * 2**20, done.stderr


def test_a_result_is_replaced_as_a_whole_and_only_when_told(tmp_path: Path) -> None:
    hf, out = made_model(tmp_path / "hf", Dimensions(hidden=16, vocab=24)), tmp_path / "out"
    convert(hf, out, to="meta", dry_run=True)
    assert not out.exists()
    convert(hf, out, to="meta", target_tensor_parallel_size=2)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"params\.json exists: .* replace it by --overwrite"):
        convert(hf, out, to="meta")
    convert(hf, out, to="meta", overwrite=True)
    assert {path.name for path in out.iterdir()} == {"consolidated.00.pth", "notes.txt", "params.json"}
    assert equal(as_hugging_face(gathered(out), params_of(out)), hf_tensors(hf))


def test_a_failure_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, out = made_model(tmp_path / "hf", Dimensions(hidden=16, vocab=24)), tmp_path / "out"
    convert(hf, out, to="meta")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    one = meta.weights_file

    # a wrong byte on the disk, found before the files get their names
    def spoiled(folder: Path, layout: meta.MetaLayout) -> Any:
        for tensor, rank, value in read(folder, layout):
            yield tensor, rank, value + (tensor.name == "norm.weight")

    read = meta.read_meta
    monkeypatch.setattr("modellink_lora.convert.verify.read_meta", spoiled)
    with pytest.raises(UserError, match=f"norm.weight of {one(0)} read back differs"):
        convert(made_model(tmp_path / "other", Dimensions(hidden=16, vocab=24), seed=1), out, to="meta",
                overwrite=True, verify=True)  # fmt: skip
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_replacement_that_is_interrupted_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, out = made_model(tmp_path / "hf", Dimensions(hidden=16, vocab=24)), tmp_path / "out"
    convert(hf, out, to="meta", target_tensor_parallel_size=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    move, moved = os.replace, []

    def first_only(source: Path, target: Path) -> None:
        if len(moved) == 1:
            moved.append(None)
            raise KeyboardInterrupt
        moved.append(target.name)
        move(source, target)

    monkeypatch.setattr(store, "_is_movable", lambda root: False)  # such as a mount point
    monkeypatch.setattr(os, "replace", first_only)
    with pytest.raises(KeyboardInterrupt):
        convert(hf, out, to="meta", target_tensor_parallel_size=2, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("hidden, ffn, expected", [
    (4096, 11008, {"multiple_of": 256}),  # Llama 7B
    (8192, 22016, {"multiple_of": 256}),  # Llama 65B
    (4096, 14336, {"multiple_of": 256, "ffn_dim_multiplier": 1.3}),  # Llama 3 8B, whose file says 1024 and 1.3
    (576, 1536, {"multiple_of": 256}),
    (64, 172, {"multiple_of": 4}),
])  # fmt: skip
def test_the_width_of_the_mlp_as_meta_writes_it(hidden: int, ffn: int, expected: dict[str, float]) -> None:
    assert ffn_params(config(hidden, ffn)) == expected


def test_any_width_of_the_mlp_follows_from_params_json() -> None:
    choose = random.Random(1)
    widths = [(8192, 28672), (64, 1), (64, 7), (1, 1000003)]
    widths += [(choose.randrange(1, 20000), choose.randrange(1, 100000)) for _ in range(500)]
    for hidden, ffn in widths:
        params = json.loads(json.dumps({"dim": hidden, **ffn_params(config(hidden, ffn))}))
        assert ffn_width(params) == ffn


def config(hidden: int, ffn: int) -> ModelConfig:
    return ModelConfig(num_layers=1, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=1, vocab_size=8,
                       kv_channels=2, max_position_embeddings=8, position_embedding_type="rope", swiglu=True,
                       normalization="RMSNorm")  # fmt: skip


def test_keys_that_an_older_code_does_not_know_are_left_out(tmp_path: Path) -> None:
    for kind, (settings, _) in MODELS.items():
        convert(tiny_model("llama", tmp_path / kind, **settings), tmp_path / f"{kind}-out", to="meta")
    always = {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
    keys = {kind: params_of(tmp_path / f"{kind}-out").keys() for kind in MODELS}
    assert keys["llama-1"] == always and keys["grouped"] == always | {"n_kv_heads"}
    assert keys["llama-3.1"] >= always | {"n_kv_heads", "rope_theta", "use_scaled_rope"}


@pytest.mark.parametrize("family, settings, fields, words", [
    ("llama", {}, {"target_tensor_parallel_size": 3}, "does not divide the 4 attention heads"),
    ("llama", {}, {"target_tensor_parallel_size": 2}, "does not divide the 259 tokens of the vocabulary"),
    ("llama", {}, {"target_pipeline_parallel_size": 2}, "is for --save-model-type mg or adapter-ranks, not meta"),
    ("llama", {"head_dim": 32}, {}, "heads of width 32"),
    ("llama", {"attention_bias": True}, {}, "add_dense_bias True"),
    ("llama", {"rope_parameters": {**SCALED, "factor": 32.0}}, {}, r"rope_scaling_factor 32 \(it has 8\)"),
    ("mistral", {"sliding_window": 64}, {}, "sliding_window 64"),
    ("qwen2", {}, {}, "a tensor decoder.layers.0.self_attention.linear_qkv.bias"),
    ("qwen3", {"head_dim": 16}, {}, "a tensor decoder.layers.0.self_attention.q_layernorm.weight"),
    ("gemma", {}, {}, "add_rmsnorm_offset True"),
])  # fmt: skip
def test_what_metas_code_does_not_compute_is_refused(
    family: str, settings: dict[str, Any], fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    hf = tiny_model(family, tmp_path / "hf", **settings)
    with pytest.raises(UserError, match=words) as refused:
        convert(hf, tmp_path / "out", to="meta", **fields)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
