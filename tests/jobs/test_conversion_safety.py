"""A conversion that fails leaves one line and nothing under the final name; one that succeeds never holds a model."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.rank_files import FILE, open_rank_files
from modellink_lora.cli.convert import main
from modellink_lora.cli.main import run
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests/helpers/conversion_program.py"
# 223 MB in bf16, of which the largest tensor has 33 MB
LARGE = Dimensions(layers=6, heads=8, groups=4, head_dim=128, hidden=1024, ffn=2816, vocab=16000, dtype=torch.bfloat16)
LARGEST = 16000 * 1024 * 2


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model(tmp_path_factory.mktemp("large") / "hf", LARGE)


def started(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    return subprocess.Popen([sys.executable, str(PROGRAM), *map(str, words)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def bytes_held(*words: object) -> int:
    process = started(*words)
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = re.search(r"^anonymous (\d+)$", out, re.MULTILINE)
    assert found
    return int(found.group(1))


def test_memory_does_not_grow_with_the_model(large: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", large, r=16)
    limit = 2 * LARGEST + 64 * 2**20
    to_mg = ("--load-model-type", "hf", "--load-dir", large, "--save-model-type", "mg", "--save-dir", tmp_path / "mg",
             "--target-tensor-parallel-size", 2, "--lora-load", adapter)  # fmt: skip
    to_hf = ("--load-model-type", "mg", "--load-dir", tmp_path / "mg", "--save-model-type", "hf", "--save-dir",
             tmp_path / "out", "--workers", 2)  # fmt: skip
    assert bytes_held(*to_mg) <= limit
    assert bytes_held(*to_hf) <= limit


@pytest.mark.parametrize("to, begun, left", [
    ("mg", ".iter_*.tmp/mp_rank_00", ["hf", "iter_0000001", "latest_checkpointed_iteration.txt"]),
    ("hf", ".mg2hg.*.tmp/*.safetensors", ["mg2hf", "mg2hg"]),
])  # fmt: skip
def test_a_killed_conversion_leaves_nothing_and_the_same_command_then_succeeds(
    large: Path, tmp_path: Path, to: str, begun: str, left: list[str]
) -> None:
    save = tmp_path / "out"
    words = ("--load-model-type", "hf", "--load-dir", large, "--save-model-type", to, "--save-dir", save)
    process = started(*words)
    while process.poll() is None and not list(save.glob(begun)):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert list(save.glob(".*.tmp")), "killed before it wrote anything"
    assert not [path.name for path in save.iterdir() if not path.name.startswith(".")]
    assert main([str(word) for word in words]) == 0
    assert sorted(path.name for path in save.iterdir()) == left
    if to == "mg":
        assert open_rank_files(save).config.hidden_size == LARGE.hidden
    else:
        assert torch.equal(hf_tensors(save / "mg2hf")["model.norm.weight"], hf_tensors(large)["model.norm.weight"])


class Evil:
    """Pickles as a call of os.mkdir."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def _edited(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "iter_0000001/mp_rank_01" / FILE
        document = torch.load(path, weights_only=False)
        change(document, root)
        torch.save(document, path)

    return spoil


def _truncate(root: Path) -> None:
    path = root / "iter_0000001/mp_rank_01" / FILE
    path.write_bytes(path.read_bytes()[:-500])


def _wrong_tp(root: Path) -> None:
    for rank in ("00", "01"):
        path = root / f"iter_0000001/mp_rank_{rank}" / FILE
        document = torch.load(path, weights_only=False)
        document["args"] = argparse.Namespace(**{**vars(document["args"]), "tensor_model_parallel_size": 4})
        torch.save(document, path)


# fmt: off
SPOILED: list[tuple[str, Callable[[Path], None], str]] = [
    ("a rank file is missing", lambda root: shutil.rmtree(root / "iter_0000001/mp_rank_00"),
     r"mp_rank_00/model_optim_rng\.pt is missing"),
    ("args say another TP", _wrong_tp, r"args say tensor_model_parallel_size 4, the rank folders make it 2"),
    ("a file was cut short", _truncate, r"mp_rank_01/model_optim_rng\.pt: damaged, cut short"),
    ("a pickle would run something", _edited(lambda d, root: d.update(evil=Evil(str(root / "executed")))),
     r"contains (posix|nt)\.mkdir, which weights do not need"),
    ("a tensor has another shape",
     _edited(lambda d, _: d["model"].update({"decoder.final_layernorm.weight": torch.zeros(3)})),
     r"decoder\.final_layernorm\.weight has shape \(3,\)"),
]
# fmt: on


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint at TP 2 (`mg`), its model (`hf`), an adapter of another base (`other`)."""
    root = tmp_path_factory.mktemp("good")
    convert(made_model(root / "hf", Dimensions()), root / "mg", to="mg", target_tensor_parallel_size=2,
            use_mcore_models=True)  # fmt: skip
    random_adapter(root / "other", made_model(root / "hf2", Dimensions(), seed=1))
    return root


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line on standard error of a conversion that fails; the progress bar may stand before it."""
    capsys.readouterr()
    assert run(lambda: main([str(word) for word in words])) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    line = err.rstrip("\n").rsplit("\n", 1)[-1]
    assert line.startswith("error: "), err
    return line


def reshard(load: Path, save: Path) -> tuple[object, ...]:
    return ("--load-model-type", "mg", "--save-model-type", "mg", "--load-dir", load, "--save-dir", save)


@pytest.mark.parametrize("case", SPOILED, ids=lambda case: case[0])
def test_a_damaged_source_is_one_line(
    case: tuple[str, Callable[[Path], None], str], good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, spoil, words = case
    shutil.copytree(good / "mg", tmp_path / "mg")
    spoil(tmp_path / "mg")
    assert re.search(words, refused(capsys, *reshard(tmp_path / "mg", tmp_path / "out")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "mg/executed").exists()


def test_an_adapter_of_another_base_is_one_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *reshard(good / "mg", tmp_path / "out"), "--lora-load", good / "other")
    assert "trained on another base" in line and not (tmp_path / "out").exists()


def test_a_result_that_is_there_is_not_replaced_unasked(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = reshard(good / "mg", tmp_path / "out")
    assert main([str(word) for word in words]) == 0
    before = (tmp_path / "out/iter_0000001/mp_rank_00" / FILE).stat().st_mtime_ns
    assert "exists: choose another --save-dir, or replace it by --overwrite" in refused(capsys, *words)
    assert (tmp_path / "out/iter_0000001/mp_rank_00" / FILE).stat().st_mtime_ns == before
    assert main([*(str(word) for word in words), "--overwrite", "--verify"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "hf",
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]


def test_too_little_space_is_said_before_anything_is_written(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore
    line = refused(capsys, *reshard(good / "mg", tmp_path / "out"))
    assert re.search(r"[\d.]+ kB are needed and 1 kB are free on the disk of --save-dir .*out: free some space", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["mg", "hf"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    good: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.pwrite, []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    words = (
        "--load-model-type",
        "hf",
        "--load-dir",
        good / "hf",
        "--save-model-type",
        to,
        "--save-dir",
        tmp_path / "x",
    )
    line = refused(capsys, *words)
    assert "No space left on device while writing; nothing is left of the result" in line
    assert not (tmp_path / "x").exists()


def test_a_byte_that_changed_on_the_disk_is_found(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from modellink_lora.convert import verify

    def damage(folder: Path) -> None:
        path = folder / "mp_rank_00" / FILE
        data = bytearray(path.read_bytes())
        layer = torch.load(path, weights_only=False)["model"]["decoder.final_layernorm.weight"]
        at = bytes(data).find(layer.numpy().tobytes())
        data[at] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(verify, "_forget", damage)
    line = refused(capsys, *reshard(good / "mg", tmp_path / "out"), "--verify")
    assert re.search(r"mp_rank_00/model_optim_rng.pt: damaged: \S+ has not the CRC-32", line)
    assert not (tmp_path / "out").exists(), "a result that was found wrong got its name"


def test_pickles_of_this_test_are_really_dangerous(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(str(tmp_path / "executed"))))
    assert (tmp_path / "executed").exists()
