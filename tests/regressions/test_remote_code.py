"""Python files of a model's publisher run when --trust-remote-code says so, and nothing asks on the terminal.

Seen in public as microsoft/ltp-megatron-lm #23: tokenizers of publishers' own code could not be allowed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.tokenizer import load_tokenizer
from tests.helpers.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> tuple[Path, Path]:
    """(folder whose tokenizer is a class of its own, file that its code writes)"""
    folder, marker = tmp_path / f"tok{tmp_path.name[-8:]}", tmp_path / "ran"
    folder.mkdir()
    tiny_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_code_does_not_run_unasked(tokenizer: tuple[Path, Path]) -> None:
    folder, marker = tokenizer
    with pytest.raises(
        UserError, match=r"is Python code of its publisher \(tokenization_own\.py\).*--trust-remote-code"
    ):
        load_tokenizer(folder)
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(
    tokenizer: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tokenizer
    loaded = load_tokenizer(folder, trust_remote_code=True)
    assert marker.exists() and type(loaded).__name__ == "OwnTokenizer"
    assert loaded("abc", add_special_tokens=False)["input_ids"] == [97, 98, 99]


def preprocess_with_yes(folder: Path, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "d.json").write_text('[{"instruction": "q", "input": "", "output": "a"}]')
    command = [
        sys.executable, "preprocess_data.py", "--input", tmp_path / "d.json", "--output-prefix", tmp_path / "o",
        "--tokenizer-name-or-path", folder, "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "empty",
        *words,
    ]  # fmt: skip
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    return subprocess.run(command, env=environment, cwd=ROOT, input="y\n" * 100, capture_output=True, text=True)


def test_yes_on_standard_input_changes_nothing(tokenizer: tuple[Path, Path], tmp_path: Path) -> None:
    folder, marker = tokenizer
    refused = preprocess_with_yes(folder, tmp_path)
    assert refused.returncode == 1 and not marker.exists()
    assert refused.stderr.count("\n") == 1 and "--trust-remote-code" in refused.stderr


@pytest.mark.slow
def test_trusted_code_runs_in_worker_processes_too(tokenizer: tuple[Path, Path], tmp_path: Path) -> None:
    folder, marker = tokenizer
    trusted = preprocess_with_yes(folder, tmp_path, "--trust-remote-code", "--workers", "2")
    assert trusted.returncode == 0, trusted.stderr
    assert marker.exists() and (tmp_path / "o_packed.json").exists()


def test_a_class_that_nobody_knows_is_named(tokenizer: tuple[Path, Path]) -> None:
    folder, _ = tokenizer
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    settings["tokenizer_class"] = "NobodysTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded: tokenizer_class NobodysTokenizer"):
        load_tokenizer(folder)


def test_the_reason_of_code_that_fails_is_its_own(
    tokenizer: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, _ = tokenizer
    late = "    def __init__(self, **k):\n        raise AttributeError('no attribute sp_model')\n"
    (folder / "tokenization_own.py").write_text(CODE.format(marker=str(tmp_path / "ran")).replace("    pass\n", late))
    with pytest.raises(UserError, match=r"cannot be loaded: .*no attribute sp_model"):
        load_tokenizer(folder, trust_remote_code=True)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("named", ["LlamaTokenizer", None])
def test_ids_of_a_sentencepiece_file_are_its_own_or_refused(tmp_path: Path, family: str, named: str | None) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("Human: what is it?\nIt is the city of Paris.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    try:
        found = load_tokenizer(tmp_path).encode("what is Paris", add_special_tokens=False)
    except UserError as error:
        assert "gives other ids than the file itself" in str(error)
    else:
        assert found == own.encode("what is Paris")


def test_every_load_by_transformers_says_whether_code_is_trusted() -> None:
    sources = [s for f in ("modellink_lora", "examples", "benchmarks") for s in sorted((ROOT / f).rglob("*.py"))]
    for source, node in ((s, n) for s in sources for n in ast.walk(ast.parse(s.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                assert "trust_remote_code" in [keyword.arg for keyword in node.keywords], f"{source}:{node.lineno}"
