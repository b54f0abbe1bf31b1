"""Checkpoint files with changed bytes: refused in one line, or the tensors are what they were.

Files of the format before torch 1.6 have no checksums: of them, names, shapes and dtypes are compared.

Seen in public as facebookresearch/metaseq#122: 18 damaged values in one shard were seen only as nonsense.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint

from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.megatron_dist import open_megatron
from modellink_lora.checkpoint.meta_reader import open_meta
from modellink_lora.checkpoint.rank_files import RankFiles, open_rank_files
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert
from tests.helpers.tiny import tiny_model

OLD, META = "old", "meta"
Change = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    block = data[start : start + rng.choice([1, 64, 4096])]
    return data[:start] + bytes(len(block)) + data[start + len(block) :]


def inserted(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice([1, 16, 300])) + data[start:]


def swapped(rng: random.Random, data: bytes) -> bytes:
    a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice([4, 64, 1024])
    a, b = sorted((a, b))
    if b + size > len(data) or a + size > b:
        return data[:a]
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


CHANGES: tuple[Change, ...] = (
    flip,
    flip,
    flip,
    zeroed,
    inserted,
    swapped,
    lambda rng, data: data[: rng.randrange(len(data))],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("fuzzed")
    hf = tiny_model("llama", folder / "hf", hidden_size=8, intermediate_size=16)
    convert(hf, folder / "mcore", to="mg", use_mcore_models=True, target_tensor_parallel_size=2)
    convert(hf, folder / "legacy", to="mg", save_to_legacy=True, target_pipeline_parallel_size=2)
    shutil.copytree(hf, folder / "bin")
    torch.save(load_file(hf / "model.safetensors"), folder / "bin/pytorch_model.bin")
    (folder / "bin/model.safetensors").unlink()
    shutil.copytree(folder / "bin", folder / OLD)
    tensors = load_file(hf / "model.safetensors")
    torch.save(tensors, folder / OLD / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(hf, folder / META, to="meta")
    save_dist(open_rank_files(folder / "mcore"), folder / "dist")
    return {name: folder / name for name in ("mcore", "legacy", "bin", OLD, META, "dist")}


def save_dist(model: RankFiles, folder: Path) -> None:
    """As megatron-core lays it out on one process, in the files that torch's writer makes."""
    state = {name: model.read(name) for name in model.names()}
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"args": model.args, "iteration": 1}, folder / "common.pt")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    if folder.name == META:
        (path,) = folder.rglob("params.json")
        meta = open_meta(path.parent, HfModel(folder.parent / "hf").config, flag="--load")
        return {name: meta.read(name).clone() for name in meta.layout.by_source()}
    model = HfModel(folder) if (folder / "config.json").exists() else open_megatron(folder)
    return {name: model.read(name).clone() for name in model.names()}


def run_inputs(inputs: int, folders: dict[str, Path], seed: int) -> None:
    rng = random.Random(seed)
    expected = {name: tensors_of(folder) for name, folder in folders.items()}
    files = [(name, path) for name, folder in folders.items() for path in sorted(folder.rglob("*"))
             if path.suffix in (".pt", ".bin", ".pth", ".distcp") or path.name == ".metadata"]  # fmt: skip
    refused = 0
    for number in range(inputs):
        name, path = rng.choice(files)
        good = path.read_bytes()
        change = rng.choice(CHANGES)
        path.write_bytes(change(rng, good))
        try:
            found = tensors_of(folders[name])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert found.keys() == expected[name].keys()
            for key, tensor in found.items():
                assert (tensor.shape, tensor.dtype) == (expected[name][key].shape, expected[name][key].dtype)
                assert name == OLD or torch.equal(tensor, expected[name][key]), (number, path, change, key)
        finally:
            path.write_bytes(good)
    assert refused > inputs / 2


def test_300_files(folders: dict[str, Path]) -> None:
    run_inputs(300, folders, seed=1)


@pytest.mark.slow
def test_3000_files(folders: dict[str, Path]) -> None:
    run_inputs(3000, folders, seed=2)
