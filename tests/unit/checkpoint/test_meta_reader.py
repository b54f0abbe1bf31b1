"""What convert_ckpt.py wrote in Meta's format is read back to the bit, and what it would not write is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.meta_reader import open_meta
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert
from tests.helpers.tiny import tiny_model

SCALED = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-1": {"num_key_value_heads": 4, "intermediate_size": 256},
    "grouped": {"intermediate_size": 192},
    "tied": {"tied": True, "intermediate_size": 172},
    "llama-3.1": {"rope_parameters": SCALED, "intermediate_size": 224},
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_read_back_to_the_bit(kind: str, size: int, tmp_path: Path) -> None:
    hf = tiny_model("llama", tmp_path / "hf", **{"vocab_size": 260, **MODELS[kind]})
    convert(hf, tmp_path / "meta", to="meta", target_tensor_parallel_size=size)
    model = HfModel(hf)
    found = open_meta(tmp_path / "meta", model.config, flag="--merged-meta")
    for name in model.names():
        assert torch.equal(found.read(name), model.read(name)), name
        layout = model.family.tensor(name, model.config).layout
        if "word_embeddings" not in name and "output_layer" not in name:  # their padding is the layout's
            assert torch.equal(found.read_shard(name, 1, 2), layout.shard(model.read(name), 1, 2)), name


def spoil_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = torch.load(folder / "consolidated.01.pth", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / "consolidated.01.pth")

    return spoil


def params(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        said = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps({**said, **values}))

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown tensor": (spoil_tensors(lambda t: t.update({"rope.freqs": torch.ones(8)})), "rope.freqs is unknown"),
    "missing tensor": (spoil_tensors(lambda t: t.pop("norm.weight")), "norm.weight is missing"),
    "another shape": (spoil_tensors(lambda t: t.update({"norm.weight": torch.ones(3)})), r"is float32 \(3,\)"),
    "ranks that differ": (spoil_tensors(lambda t: t["norm.weight"].add_(1)), "norm.weight does not fit"),
    "a head that is not the embedding": (spoil_tensors(lambda t: t["output.weight"].add_(1)), "does not fit"),
    "missing file": (lambda folder: (folder / "consolidated.00.pth").unlink(), "files are missing"),
    "another epsilon": (params(norm_eps=1e-3), "params.json says norm_eps 0.001, the model has 1e-05"),
    "another theta": (params(rope_theta=5e5), "rope_theta 500000.0, the model has 10000"),
    "an unknown setting": (params(use_magic=True), "use_magic True, this program does not know"),
    "no file": (lambda folder: (folder / "params.json").unlink(), "holds no consolidated.00.pth with params.json"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_what_the_writer_would_not_write_is_refused(how: str, tmp_path: Path) -> None:
    hf = tiny_model("llama", tmp_path / "hf", tied=True, vocab_size=260, rms_norm_eps=1e-5)
    convert(hf, tmp_path / "meta", to="meta", target_tensor_parallel_size=2)
    model, (spoil, message) = HfModel(hf), SPOILED[how]
    spoil(tmp_path / "meta")
    with pytest.raises(UserError, match=message):
        found = open_meta(tmp_path / "meta", model.config, flag="--merged-meta")
        for name in model.names():
            found.read(name)


def test_a_params_file_that_says_less_is_read(tmp_path: Path) -> None:
    hf = tiny_model("llama", tmp_path / "hf", vocab_size=260, num_key_value_heads=4)
    convert(hf, tmp_path / "meta", to="meta")
    params(vocab_size=-1)(tmp_path / "meta")  # as Meta's own files have it
    assert open_meta(tmp_path / "meta", HfModel(hf).config, flag="--merged-meta").read("output_layer.weight").numel()
