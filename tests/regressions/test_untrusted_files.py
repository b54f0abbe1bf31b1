"""Files that are not what their name says: nothing in them runs, nothing of this process changes, one line says why.

Seen in public as pytorch/pytorch #143326: torch.load handed archives to torch.jit.load. Others were found by fuzzing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import random
import tarfile
import time
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modellink_lora.checkpoint.archive import examine
from modellink_lora.checkpoint.hf import HfFolder
from modellink_lora.checkpoint.meta_reader import load_tensors
from modellink_lora.checkpoint.unpickle import Inert, load_common_state, load_rank_file
from modellink_lora.config.errors import UserError
from tests.helpers.tiny import tiny_model


class _Payload(torch.nn.Module):
    """Writes a file while TorchScript loads it."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker
        self.x = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return (self.x, self.marker, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.x = state[0]
        self.marker = state[1]
        self.training = state[2]
        self.x = torch.from_file(self.marker, shared=True, size=8, dtype=torch.uint8).fill_(65).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(archive, the file that it writes when it is loaded)"""
    folder = tmp_path_factory.mktemp("script")
    marker, archive = folder / "ran", folder / "script.pt"
    torch.jit.script(_Payload(str(marker))).save(str(archive))
    torch.jit.load(str(archive))
    assert marker.exists(), "the file must be dangerous for the tests to mean anything"
    marker.unlink()
    return archive, marker


@pytest.mark.parametrize(
    "read", [load_rank_file, load_tensors, lambda path: load_common_state(path.read_bytes(), path)]
)
def test_a_torchscript_archive_does_not_run(read: Callable[[Path], Any], torchscript: tuple[Path, Path]) -> None:
    archive, marker = torchscript
    with pytest.raises(UserError, match=r"script\.pt: is a TorchScript archive"):
        read(archive)
    assert not marker.exists()


def test_a_torchscript_archive_called_pytorch_model_bin_does_not_run(
    tmp_path: Path, torchscript: tuple[Path, Path]
) -> None:
    archive, marker = torchscript
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(archive.read_bytes())
    with pytest.raises(UserError, match="TorchScript"):
        HfFolder(tmp_path)
    assert not marker.exists()


def saved(path: Path, document: Any = None) -> Path:
    torch.save({"w": torch.arange(6.0)} if document is None else document, path)
    return path


def rewritten(path: Path, target: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], kind: int = 0) -> Path:
    """The archive `path` with other records."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", kind) as new:
        for name, data in change({name: old.read(name) for name in old.namelist()}).items():
            new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: {**r, "good/code/__torch__.py": b"x"}, "TorchScript"),
        (lambda r: {**r, "good/constants.pkl": b"x"}, "TorchScript"),
        (lambda r: {**r, "good/run.sh": b"x"}, "holds 'good/run.sh'"),
        (lambda r: {**r, "good/data/../../x": b"x"}, "refused unread"),
        (lambda r: {**r, "other/data/9": b"x"}, "several top folders"),
        (lambda r: {"x": b""}, "refused unread"),
    ],
)
def test_an_archive_with_other_records_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_rank_file(rewritten(saved(tmp_path / "good.pt"), tmp_path / "x.pt", change))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt")
    with pytest.raises(UserError, match="is compressed"):
        load_rank_file(rewritten(good, tmp_path / "x.pt", lambda r: r, zipfile.ZIP_DEFLATED))


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt")
    with zipfile.ZipFile(good, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("good/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(UserError, match=r"holds 'good/data.pkl' twice"):
        load_rank_file(good)


def test_a_second_directory_after_the_archive_is_refused(tmp_path: Path) -> None:
    """Python's reader and torch's look for the directory in different places."""
    good = saved(tmp_path / "good.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(good + saved(tmp_path / "other.pt", {"other": torch.zeros(3)}).read_bytes())
    with pytest.raises(UserError):
        load_rank_file(tmp_path / "x.pt")


def test_a_tar_archive_that_begins_like_an_old_file_is_refused(tmp_path: Path) -> None:
    """torch tries its oldest format, a tar archive that it unpacks into a folder, on every file that is no zip."""
    saved_old = io.BytesIO()
    torch.save({}, saved_old, _use_new_zipfile_serialization=False)
    head = tarfile.TarInfo("placeholder")
    with tarfile.open(tmp_path / "x.pt", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(head)
    data = bytearray((tmp_path / "x.pt").read_bytes())
    start = saved_old.getvalue()[:15]
    data[:15] = start
    checksum = 256 + sum(data[:148]) + sum(data[156:512])
    data[148:156] = f"{checksum:06o}\0 ".encode()
    (tmp_path / "x.pt").write_bytes(data)
    assert tarfile.is_tarfile(tmp_path / "x.pt")
    for source in (tmp_path / "x.pt", bytes(data)):
        with pytest.raises(UserError, match="begins like a file of"):
            examine(source)


def bare(code: bytes, path: Path) -> Path:
    """A file of torch.save whose pickle is `code`."""
    return rewritten(
        saved(path.with_name("plain.pt")), path, lambda r: {**r, "plain/data.pkl": b"\x80\x02" + code + b"."}
    )


GLOBALS = {
    "Namespace": b"cargparse\nNamespace\n",
    "defaultdict": b"ccollections\ndefaultdict\n",
    "OrderedDict": b"ccollections\nOrderedDict\n",
    "_rebuild_tensor_v2": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "Size": b"ctorch\nSize\n",
    "float32": b"ctorch\nfloat32\n",
    "Inert": b"cmegatron.core\nAnything\n",
    "dtype": b"cnumpy\ndtype\n",
}


@pytest.mark.parametrize("name", GLOBALS)
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aI1\ns", b"N}X\x01\x00\x00\x00aI1\ns\x86"])
def test_a_pickle_cannot_change_what_the_process_shares(name: str, state: bytes, tmp_path: Path) -> None:
    """BUILD on a class or function sets attributes of the one that everybody uses."""
    with pytest.raises(UserError, match="which weights do not need"):
        load_rank_file(bare(GLOBALS[name] + state + b"b", tmp_path / "x.pt"))
    for shared in (argparse.Namespace, Inert, torch._utils._rebuild_tensor_v2, torch.float32):
        assert not hasattr(shared, "a")


@pytest.mark.parametrize(
    "code",
    [
        b"c__builtin__\nbytes\n(I1000000000000\ntR",  # a terabyte of zeros
        b"c__builtin__\nbytearray\nI1000000000000\n\x85R",
        b"(I1000000000000\ni__builtin__\nbytes\n",
        b"cnumpy\ndtype\n(X\x01\x00\x00\x00OI0\nI1\ntR",  # a dtype of Python objects
        b"\x8a\xff" + b"\x7f" * 255,  # a long of 255 bytes, cut short by the dot behind it
        b"X\xff\xff\xff\x7fabc",
        b"\x82\x01",  # an extension code
    ],
)
def test_pickles_that_ask_for_the_impossible_are_one_line(code: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_rank_file(bare(code, tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)


def pair(code: bytes, times: int) -> bytes:
    """`times` tuples around `code`, each of twice the one before."""
    return code + b"2\x86" * times


SCALAR = (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00i8\x85Rc_codecs"
          b"\nencode\nX\x08\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00X\x06\x00\x00\x00latin1\x86R\x86R")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"}" + pair(b")", 40) + b"K\x01s", "has a tuple for a key"),  # its hash takes a year
        (b"}" + b")" + b"\x85" * 200_000 + b"K\x01s", "has a tuple for a key"),  # its hash ends the process
        (b"}(" + pair(b")", 40) + b"K\x01u", "has a tuple for a key"),
        (b"(" + pair(b")", 40) + b"K\x01d", "has a tuple for a key"),
        (b"\x8f(" + pair(b")", 40) + b"\x90", "has a tuple for a key"),
        (b"(" + pair(b")", 40) + b"\x91", "has a tuple for a key"),
        (b"c__builtin__\nset\n]" + pair(b")", 40) + b"a\x85R", "has a tuple for a key"),
        (b"c__builtin__\ndict\n](" + pair(b")", 40) + b"K\x01ta\x85R", "has a tuple for a key"),
        (b"ccollections\ndefaultdict\nN](" + pair(b")", 40) + b"K\x01ta\x86R", "has a tuple for a key"),
        (b"ccollections\nOrderedDict\n](" + pair(b")", 40) + b"K\x01ta\x85R", "has a tuple for a key"),
        (b"c__builtin__\nstr\n" + pair(b")", 40) + b"\x85R", "makes text of a tuple"),
        (b"cnumpy\ndtype\n" + pair(b")", 40) + b"\x85R", "makes text of a tuple"),
        (
            b"(" + pair(b")", 40) + b"cmegatron.core\nX\nX\x01\x00\x00\x000NNtQ",
            "tuple for a key|something else than storages",
        ),
        (b"c__builtin__\nbytes\n" + SCALAR + b"\x85R", "makes bytes of a int64"),  # 20 GiB
        (b"c__builtin__\nlist\n" + SCALAR + b"\x85R", "makes a container of a int64"),
        (b"}X\x01\x00\x00\x00a" + pair(b")", 40) + b"s", "describes more than 4000000 objects"),
        (b"}X\x01\x00\x00\x00a" + b")" + b"\x85" * 200 + b"s", "nested more than 100 deep"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_small_pickle_cannot_take_all_time_or_memory(code: bytes, said: str, tmp_path: Path) -> None:
    """What is stored once and used many times is as large as it claims when it is hashed, printed or walked through."""
    with pytest.raises(UserError, match=said):
        load_rank_file(bare(code, tmp_path / "x.pt"))


def test_many_names_that_are_there_twice_are_found_at_once(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt")
    with zipfile.ZipFile(good, "a") as archive:
        for number in range(20_000):
            info = zipfile.ZipInfo(f"good/data/{number // 2 + 10}")
            with pytest.warns(UserWarning) if number % 2 else contextlib.nullcontext():
                archive.writestr(info, b"")
    began = time.process_time()
    with pytest.raises(UserError, match="twice"):
        examine(good)
    assert time.process_time() - began < 3


def test_an_old_file_whose_tensors_are_larger_than_itself_is_refused(tmp_path: Path) -> None:
    """Memory for each would be taken before the first is read."""
    old = tmp_path / "old.bin"
    torch.save({"w": torch.arange(1000.0)}, old, _use_new_zipfile_serialization=False)
    assert torch.equal(load_rank_file(old)["w"], torch.arange(1000.0))
    data = old.read_bytes()
    claim = data.replace(b"M\xe8\x03N", b"J\xff\xff\xff\x7fN", 1)  # the number of elements
    assert claim != data
    old.write_bytes(claim)
    with pytest.raises(UserError, match="more bytes than the file"):
        load_rank_file(old)


def test_scaling_states_of_transformer_engine_are_read_past(tmp_path: Path) -> None:
    """Its modules keep them in a BytesIO."""
    found = load_rank_file(saved(tmp_path / "x.pt", {"w": torch.ones(2), "_extra_state": io.BytesIO(b"abc")}))
    assert torch.equal(found["w"], torch.ones(2))


def test_containers_and_keys_that_checkpoints_have_are_read(tmp_path: Path) -> None:
    document = {
        1: "a", (torch.float32, torch.bfloat16): {0}, "set": {1, "b"}, "frozen": frozenset({2}), None: (1, 2),
        "ordered": OrderedDict(a=1), "default": defaultdict(list, {"x": [1]}), "scalar": np.float64(1.5),
        "args": argparse.Namespace(a=[1], b=b"\xff", kind=int), "state": random.Random(1).getstate(), "empty": b"",
    }  # fmt: skip
    path = saved(tmp_path / "x.pt", document)
    assert load_rank_file(path) == document
    torch.save(document, path, pickle_protocol=4)
    assert load_rank_file(path) == document


def test_a_tensor_of_more_bytes_than_its_record_is_refused(tmp_path: Path) -> None:
    """Mapped from disk, it would show what lies behind the record."""
    good = saved(tmp_path / "good.pt")
    lie = rewritten(good, tmp_path / "x.pt", lambda r: {**r, "good/data/0": r["good/data/0"][:8]})
    with pytest.raises(UserError, match=r"a tensor of 24 bytes is said to be in data/0, which has 8"):
        load_rank_file(lie)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_the_format_before_torch_1_6_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """huggingface/transformers still loads them, and the Hub holds thousands."""
    folder = tiny_model("llama", tmp_path / "m", dtype=dtype)
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = HfFolder(folder)
    assert sorted(found.names()) == sorted(tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def test_a_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"contains torch\.nn\.modules\.linear\.Linear"):
        load_tensors(tmp_path / "pytorch_model.bin")
