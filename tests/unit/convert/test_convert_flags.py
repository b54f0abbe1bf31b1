"""convert_ckpt.py's flags: the older spelling means what it meant, and what cannot be done is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.cli.convert import main
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from tests.helpers.tiny import tiny_model

PLACES = {"load_dir": "a", "save_dir": "b"}


@pytest.mark.parametrize("fields, meaning", [
    ({"load_model_type": "hf", "save_model_type": "mg"}, ("hf", "mg")),
    ({"loader": "llama2_hf", "saver": "megatron"}, ("hf", "mg")),
    ({"loader": "megatron", "saver": "megatron", "save_model_type": "save_huggingface_llama"}, ("mg", "hf")),
    ({"loader": "megatron", "saver": "megatron"}, ("mg", "mg")),
    ({"load_model_type": "mg", "save_model_type": "megatron"}, ("mg", "mg")),
    ({"load_model_type": "hf"}, ("hf", "mg")),
])  # fmt: skip
def test_both_generations_of_flags(fields: dict[str, str], meaning: tuple[str, str]) -> None:
    config = ConvertConfig(**PLACES, **fields)
    assert (config.source, config.target) == meaning


@pytest.mark.parametrize("fields, words", [
    ({"load_model_type": "mg"}, "--save-model-type is missing"),
    ({"load_model_type": "mg", "loader": "llama2_hf", "save_model_type": "mg"}, "--loader llama2_hf contradicts"),
    ({"save_model_type": "peft"}, "name it with --lora-load"),
    ({"save_model_type": "hf", "target_tensor_parallel_size": 2}, "--target-tensor-parallel-size is for"),
    ({"save_model_type": "meta", "num_layer_list": "1,1"}, "--num-layer-list is for --save-model-type mg or"),
    ({"save_model_type": "meta", "verify_logits": "1,2"}, "--verify-logits compares a merged model"),
    ({"save_model_type": "gguf-adapter"}, "name it with --lora-load"),
    ({"save_model_type": "mg", "target_tensor_parallel_size": 0}, "must be at least 1"),
    ({"save_model_type": "mg", "load_from_legacy": True, "save_to_legacy": True}, "change nothing"),
])  # fmt: skip
def test_combinations_without_a_meaning(fields: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ConvertConfig(**PLACES, **fields)


def test_the_spelling_of_the_result() -> None:
    def spelling(source: str | None, **fields: bool) -> str:
        return ConvertConfig(**PLACES, save_model_type="mg", **fields).spelling(source)

    assert (
        spelling(None)
        == spelling("legacy")
        == spelling("mcore", use_mcore_models=True, save_to_legacy=True)
        == "legacy"
    )
    assert spelling("mcore") == spelling("legacy", use_mcore_models=True, load_from_legacy=True) == "mcore"


def test_the_older_spelling_keeps_the_sources_layout(tmp_path: Path) -> None:
    hf = tiny_model("llama", tmp_path / "hf")
    common = ["--model-type", "GPT", "--loader"]
    main([*common, "llama2_hf", "--saver", "megatron", "--load-dir", str(hf), "--save-dir", str(tmp_path / "a"),
          "--tokenizer-model", "t.model", "--w-pack", "False", "--target-tensor-parallel-size", "2",
          "--target-pipeline-parallel-size", "2"])  # fmt: skip
    main([*common, "megatron", "--saver", "megatron", "--load-dir", str(tmp_path / "a"), "--save-dir",
          str(tmp_path / "b")])  # fmt: skip
    files = open_rank_files(tmp_path / "b")
    assert (files.tp, files.partition.counts) == (2, (1, 1))


@pytest.mark.parametrize("flag, words", [
    (["--target-expert-parallel-size", "2"], "mixture-of-experts"),
    (["--moe-grouped-gemm"], "mixture-of-experts"),
])  # fmt: skip
def test_what_this_version_cannot_do_is_refused(
    flag: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--load-model-type", "hf", "--load-dir", "a", "--save-dir", "b", *flag])
    assert end.value.code == 2 and words in capsys.readouterr().err
