"""A converted or merged folder loads again: whatever lies beside the weights goes along, and nothing else.

Seen in public as ymcui/Chinese-LLaMA-Alpaca-2 #461: merged folders lacked files and could not be loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink_lora.checkpoint.companions import companions
from tests.helpers.conversion import convert
from tests.helpers.tiny import tiny_model

KEPT = {
    "tokenization_own.py": "raise SystemExit('this must not run')", "qwen.tiktoken": "IQ== 0\n", "tekken.json": "{}",
    "LICENSE": "Use it well.", "NOTICE.txt": "n", "additional_chat_templates/tools.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages }}", "preprocessor_config.json": "{}", "vocab.other": "v",
}  # fmt: skip
LEFT = (
    "README.md", "pytorch_model.bin", "consolidated.00.pth", "original/params.json", "model.gguf", "rust_model.ot.onnx",
    ".gitattributes", ".cache/x", "adapter_config.json", "flax_model.msgpack", "checkpoint-500/config.json",
    "model.safetensors.index.json.tmp", "model.safetensors.index.fp16.json", "rust_model.ot",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("llama", tmp_path_factory.mktemp("companions") / "m", tokenizer=True)
    for name, text in {**KEPT, **dict.fromkeys(LEFT, "x")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_everything_but_weights_goes_to_megatron_and_back(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").unlink(missing_ok=True)
    convert(model, tmp_path / "mg", to="mg", use_mcore_models=True)
    convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    for folder in (tmp_path / "mg/hf", tmp_path / "hf/mg2hg"):
        for name, text in KEPT.items():
            assert (folder / name).read_text() == text, name
        assert (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file()
        assert [name for name in LEFT if (folder / name).exists()] == []


def test_a_snapshot_of_a_download_cache_is_copied_by_content(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n/snapshots/1", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "tokenizer.json", "qwen.tiktoken", "model.safetensors"):
        (blobs / name[:5]).write_bytes((model / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / name[:5])
    convert(snapshot, tmp_path / "mg", to="mg", use_mcore_models=True)
    kept = tmp_path / "mg/hf/qwen.tiktoken"
    assert kept.read_text() == KEPT["qwen.tiktoken"] and not kept.is_symlink()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "m/notes.txt").symlink_to(tmp_path / "private.txt")
    (tmp_path / "m/loop.txt").symlink_to("loop.txt")
    (tmp_path / "m/a.txt").write_text("a")
    assert companions(tmp_path / "m") == ["a.txt"]


def test_a_tokenizer_that_is_linked_from_another_folder_is_copied(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "m/tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert companions(tmp_path / "m") == ["tokenizer.json"]


def test_a_subfolder_that_is_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "private").mkdir()
    for name in ("key.txt", "tokenizer.json"):
        (tmp_path / "private" / name).write_text("secret")
    (tmp_path / "m/additional_chat_templates").symlink_to(tmp_path / "private")
    assert companions(tmp_path / "m") == []
