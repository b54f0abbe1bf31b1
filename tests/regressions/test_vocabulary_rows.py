"""A vocabulary of other sizes in config.json, embedding and head is refused, unless rows are to be cut off or added.

Seen in public as huggingface/transformers #16638 and alibaba/Pai-Megatron-Patch #338.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.config.diff import DiffConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.diff import diff
from tests.helpers.conversion import convert, hf_tensors
from tests.helpers.made_model import Dimensions, made_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZE = Dimensions(vocab=131)


def said(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def cut(folder: Path, name: str, rows: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, folder / "model.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "fewer tokens": (lambda f: said(f, vocab_size=128), rf"{EMBEDDING} \(131, .*\) has 131 rows.* vocab_size 128"),
    "more tokens": (lambda f: said(f, vocab_size=140), rf"{EMBEDDING} .*has 131 rows .* vocab_size 140"),
    "a short head": (lambda f: cut(f, HEAD, 128), rf"{HEAD} .*has 128 rows .* vocab_size 131"),
    "a short embedding": (lambda f: cut(f, EMBEDDING, 1), rf"{EMBEDDING} .*has 1 rows .* vocab_size 131"),
}


@pytest.mark.parametrize("to", ["hf", "mg", "meta"])
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_differ_are_refused_with_shapes_and_file(fault: str, to: str, tmp_path: Path) -> None:
    plant, words = FAULTS[fault]
    plant(made_model(tmp_path / "hf", SIZE))
    with pytest.raises(UserError, match=words) as error:
        convert(tmp_path / "hf", tmp_path / "out", to=to)
    assert str(tmp_path / "hf") in str(error.value) and "--resize-vocab" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_is_compared_too(tmp_path: Path) -> None:
    said(made_model(tmp_path / "hf", Dimensions(vocab=131, tied=True)), vocab_size=130)
    with pytest.raises(UserError, match=r"has 131 rows and config.json says vocab_size 130"):
        convert(tmp_path / "hf", tmp_path / "out", to="hf")


@pytest.mark.parametrize("to", ["hf", "mg"])
@pytest.mark.parametrize("size, what", [(128, "the last 3 are cut off"), (140, "9 are added, each the mean")])
def test_resize_vocab_cuts_or_adds_rows_and_says_so(size: int, what: str, to: str, tmp_path: Path) -> None:
    source = hf_tensors(made_model(tmp_path / "hf", SIZE))
    said(tmp_path / "hf", vocab_size=size)
    told = convert(tmp_path / "hf", tmp_path / "out", to=to, resize_vocab=True, verify=True)
    assert told.count(what) == 2 and f"had 131 rows and gets {size}" in told and "verified" in told
    if to == "mg":
        convert(tmp_path / "out", tmp_path / "back", to="hf")
    result = hf_tensors(tmp_path / ("out" if to == "hf" else "back") / "mg2hg")
    for name in (EMBEDDING, HEAD):
        old = source[name]
        mean = old.double().mean(0, keepdim=True).to(old.dtype)
        expected = torch.cat([old, mean.expand(max(0, size - 131), -1)])[:size]
        assert torch.equal(result[name], expected)
    rest = source.keys() - {EMBEDDING, HEAD}
    assert result.keys() == source.keys() and all(torch.equal(result[name], source[name]) for name in rest)


def test_a_head_alone_is_resized(tmp_path: Path) -> None:
    cut(made_model(tmp_path / "hf", SIZE), HEAD, 128)
    told = convert(tmp_path / "hf", tmp_path / "out", to="hf", resize_vocab=True)
    assert f"{HEAD} had 128 rows and gets 131" in told and f"{EMBEDDING} had" not in told
    assert hf_tensors(tmp_path / "out/mg2hg")[HEAD].shape[0] == 131


def test_rank_files_whose_args_disagree_with_the_rows_are_refused(tmp_path: Path) -> None:
    made_model(tmp_path / "hf", SIZE)
    convert(tmp_path / "hf", tmp_path / "mg", to="mg", target_tensor_parallel_size=2)
    for path in (tmp_path / "mg").glob("iter_*/mp_rank_*/*.pt"):
        document = torch.load(path, weights_only=False)
        document["args"].padded_vocab_size = 264
        torch.save(document, path)
    with pytest.raises(UserError, match=r"padded_vocab_size 264, the embedding .* has 132 rows"):
        convert(tmp_path / "mg", tmp_path / "out", to="hf")


@pytest.mark.parametrize("size", [128, 132])
def test_a_config_json_beside_rank_files_that_says_another_vocabulary_is_refused(size: int, tmp_path: Path) -> None:
    made_model(tmp_path / "hf", SIZE)
    convert(tmp_path / "hf", tmp_path / "mg", to="mg", target_tensor_parallel_size=2)
    said(tmp_path / "mg/hf", vocab_size=size)
    with pytest.raises(UserError, match=rf"says vocab_size {size}, the checkpoint 131, of 132 rows with padding"):
        convert(tmp_path / "mg", tmp_path / "out", to="hf")


def test_padding_of_rank_files_is_left_out_and_said(tmp_path: Path) -> None:
    source = made_model(tmp_path / "hf", SIZE)
    convert(source, tmp_path / "mg", to="mg", target_tensor_parallel_size=2)
    told = convert(tmp_path / "mg", tmp_path / "out", to="hf")
    assert "1 rows behind the 131 of the vocabulary are padding: left out" in told
    assert torch.equal(hf_tensors(tmp_path / "out/mg2hg")[HEAD], hf_tensors(source)[HEAD])


def test_diff_sees_rows_that_only_one_model_has(tmp_path: Path) -> None:
    made_model(tmp_path / "a", SIZE)
    said(made_model(tmp_path / "b", SIZE), vocab_size=128)
    convert(tmp_path / "b", tmp_path / "cut", to="hf", resize_vocab=True)
    lines: list[str] = []
    assert diff(tmp_path / "a", tmp_path / "cut/mg2hg", DiffConfig(), say=lines.append) == 2
    assert any("embedding.word_embeddings.weight: shape [131, " in line for line in lines)
    with pytest.raises(UserError, match=r"has 131 rows and config.json says vocab_size 128"):
        diff(tmp_path / "a", tmp_path / "b", DiffConfig(), say=lines.append)


@pytest.mark.parametrize("name", ["gate", "up", "both"])
def test_other_parts_that_only_add_up_to_the_right_rows_are_refused(name: str, tmp_path: Path) -> None:
    """Gate and up become one tensor: two rows that moved from one to the other do not show in its shape."""
    tensors = load_file(made_model(tmp_path / "hf", SIZE) / "model.safetensors")
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    if name in ("gate", "both"):
        tensors[gate] = tensors[gate][:10].clone()
    if name in ("up", "both"):
        tensors[up] = torch.cat([tensors[up], tensors[up][:2]])
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"mlp.gate_proj.weight \(1[02], 8\), .*do not make the \(24, 8\)"):
        convert(tmp_path / "hf", tmp_path / "out", to="hf")
