"""A byte that changed in a file with a checksum is noticed by whatever reads the file."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

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


def test_every_byte_of_a_small_file_counts_or_changes_nothing(tmp_path: Path) -> None:
    """Of the padding between records, and of notes of the archive, the weights do not depend."""
    torch.save({"w": torch.arange(4.0), "b": torch.ones(2)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    silent = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        (tmp_path / "x.pt").write_bytes(changed)
        try:
            found = load_tensors(tmp_path / "x.pt")
        except UserError:
            continue
        silent += 1
        assert torch.equal(found["w"], torch.arange(4.0)) and torch.equal(found["b"], torch.ones(2)), place
    assert 0 < silent < len(data)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_rank_file(tmp_path / "x.pt")["w"], torch.arange(4.0))
