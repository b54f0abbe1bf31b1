"""A byte that changed in a file with a checksum is noticed by whatever reads the file.

Seen in public as facebookresearch/metaseq#122 (18 damaged values in one shard, seen only as nonsense) and
vllm-project/vllm#53537 (a damaged shard whose header was whole).
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.checkpoint.torch_dist import open_torch_dist
from modellink_lora.checkpoint.unpickle import load_rank_file, load_tensors
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def rank_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    model = tiny_model("llama", folder / "hf", tokenizer=True)
    convert(model, folder / "mg", to="mg", use_mcore_models=True, target_tensor_parallel_size=2)
    return folder / "mg"


def flip(path: Path, record: str) -> None:
    """Change one bit in the middle of a record."""
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.partition("/")[2] == record)
    data = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + sum(data[entry.header_offset + n] for n in (26, 28))
    start += 256 * sum(data[entry.header_offset + n] for n in (27, 29))
    data[start + entry.file_size // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("record", ["data/0", "data/7", "data.pkl", "byteorder", "version"])
def test_one_bit_in_a_rank_file_stops_a_conversion(record: str, rank_files: Path, tmp_path: Path) -> None:
    shutil.copytree(rank_files, tmp_path / "mg")
    file = next((tmp_path / "mg").glob("*/mp_rank_01/model_optim_rng.pt"))
    flip(file, record)
    with pytest.raises(UserError, match=rf"mp_rank_01.*damaged: \S+/{record} has not the CRC-32"):
        convert(tmp_path / "mg", tmp_path / "out", to="hf", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_a_small_file_counts_or_changes_nothing(tmp_path: Path, step: int) -> None:
    """Of the padding between records, and of notes of the archive, the weights do not depend."""
    torch.save({"w": torch.arange(4.0), "b": torch.ones(2)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    silent = 0
    for place in range(0, len(data), step):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        (tmp_path / "x.pt").write_bytes(changed)
        try:
            found = load_tensors(tmp_path / "x.pt")
        except UserError:
            continue
        silent += 1
        assert torch.equal(found["w"], torch.arange(4.0)) and torch.equal(found["b"], torch.ones(2)), place
    assert 0 < silent < len(data) // step


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_rank_file(tmp_path / "x.pt")["w"], torch.arange(4.0))


def two_pieces(folder: Path, second: tuple[int, int], shape: tuple[int, ...] = (4, 2)) -> Path:
    """A torch_dist folder of one tensor [4, 2] in two pieces [2, 2], of which the second lies at `second`."""
    chunks, storage = [], {}
    for number, offsets in enumerate([(0, 0), second]):
        path = folder / f"__{number}_0.distcp"
        torch.save(torch.full((2, 2), float(number)), path)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size((2, 2))))
        storage[MetadataIndex("w", torch.Size(offsets))] = _StorageInfo(path.name, 0, path.stat().st_size)
    described = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": described}, None, storage)))
    return folder


def test_pieces_that_overlap_or_do_not_cover_are_refused(tmp_path: Path) -> None:
    """They add up to the size of the tensor, and leave a part of it to whatever was in memory."""
    read = open_torch_dist(two_pieces(tmp_path, (2, 0))).read("w")
    assert torch.equal(read, torch.tensor([0.0, 0, 1, 1]).view(4, 1).expand(4, 2))
    with pytest.raises(UserError, match=r"cover 8 of its 17592186044416 numbers"):
        open_torch_dist(two_pieces(tmp_path, (2, 0), (2**43, 2)))
    with pytest.raises(UserError, match=r"the pieces of w at \(0, 0\) and \(1, 0\) overlap"):
        open_torch_dist(two_pieces(tmp_path, (1, 0))).read("w")


@pytest.mark.parametrize("name", ["tensor_model_parallel_size", "expert_model_parallel_size", "lora_target_modules",
                                  "geglu", "num_experts", "padded_vocab_size", "untie_embeddings_and_output_weights",
                                  "use_glm_rope", "num_attention_heads"])  # fmt: skip
@pytest.mark.parametrize("value", ["x", 1.5, [1, ["a"]], {}, torch.zeros(2), torch.float16, b"x", -1, 2**70],
                         ids=lambda value: type(value).__name__)  # fmt: skip
def test_args_of_another_type_are_one_line(name: str, value: Any, rank_files: Path, tmp_path: Path) -> None:
    root = shutil.copytree(rank_files, tmp_path / "mg")
    for path in root.rglob("*.pt"):
        document = torch.load(path, weights_only=False)
        setattr(document["args"], name, value)
        torch.save(document, path)
    try:
        open_rank_files(root)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert not isinstance(value, torch.Tensor)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1, 1)])
@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc2.weight"])
def test_weights_of_other_dimensions_are_one_line(
    name: str, shape: tuple[int, ...], rank_files: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(rank_files, tmp_path / "mg")
    for path in root.rglob("*.pt"):
        document = torch.load(path, weights_only=False)
        document["model"][name] = torch.zeros(shape)
        torch.save(document, path)
    with pytest.raises(UserError, match="expected two dimensions"):
        open_rank_files(root)
