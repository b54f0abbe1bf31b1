"""A loaded tokenizer has the end-of-sequence token of its template, and never a token the model does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from tests.helpers.shared import shared
from tests.helpers.tiny_tokenizer import LLAMA3, make_tokenizer


def edit_config(folder: Path, **changes: str | None) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), LLAMA3)


@pytest.mark.parametrize(
    ("prompt_type", "eos"),
    [(None, "</s>"), ("llama2", "</s>"), ("qwen", "<|im_end|>"), ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")],
)
def test_the_template_decides_the_end_of_sequence_token(folder: Path, prompt_type: str | None, eos: str) -> None:
    tokenizer = load_tokenizer(folder, prompt_type=prompt_type)
    assert tokenizer.eos_token == eos
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == eos
    assert len(tokenizer.encode(eos, add_special_tokens=False)) == 1


@pytest.mark.parametrize(("prompt_type", "token"), [("llama3", "<|eot_id|>"), ("qwen", "<|im_end|>")])
def test_a_stop_word_outside_the_vocabulary_is_an_error_that_names_it(
    tmp_path: Path, prompt_type: str, token: str
) -> None:
    make_tokenizer(tmp_path, special=())
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path, prompt_type=prompt_type)
    assert token in str(error.value) and prompt_type in str(error.value)


def test_every_stop_word_must_be_known_not_only_the_first(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, special=("<|im_end|>",))
    load_tokenizer(tmp_path, prompt_type="qwen")
    with pytest.raises(UserError, match=r"no token <\|im_start\|>"):
        load_tokenizer(tmp_path, prompt_type="chatml")


def test_a_stop_word_that_was_ordinary_text_becomes_one_piece_without_a_new_id(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    edit_config(tmp_path, extra_special_tokens=None, additional_special_tokens=None)
    tokenizer = load_tokenizer(tmp_path, prompt_type="chatml")
    assert len(tokenizer) == len(load_tokenizer(tmp_path))
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)


def test_a_missing_pad_token_is_the_end_of_sequence_token(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    edit_config(tmp_path, pad_token=None)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_a_missing_end_of_sequence_token_needs_its_substitute_in_the_vocabulary(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    edit_config(tmp_path, eos_token=None)
    with pytest.raises(UserError, match=r"no token <\|endoftext\|>"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, prompt_type="qwen").eos_token == "<|im_end|>"


def test_fingerprints_agree_for_one_vocabulary_whatever_the_template(folder: Path, tmp_path: Path) -> None:
    prints = {tokenizer_fingerprint(load_tokenizer(folder, prompt_type=name)) for name in (None, "llama2", "chatml")}
    assert len(prints) == 1
    # the same tokens with two ids exchanged
    make_tokenizer(tmp_path, (LLAMA3[1], LLAMA3[0], LLAMA3[2]))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) not in prints


def test_a_missing_folder_or_one_without_tokenizer_is_never_looked_up_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*nothing is downloaded"):
        load_tokenizer("meta-llama/Llama-2-7b-hf")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_one_line_for_the_user(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_sentencepiece_folder_loads_and_gets_a_pad_token() -> None:
    tokenizer = load_tokenizer(shared("models/tokenizers/mistral-v1-32k"), prompt_type="llama2")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (32000, 1, 2, 2)
