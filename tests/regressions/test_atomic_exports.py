"""Exports of several files are replaced together: killed or out of space at any step, the old set is there or the new.

Found by placing kills: between the two renames of an export over an older one, new tensors stood beside the old alpha
and were loaded without a word, and on a full disk the tensors alone were left.

Seen in public as petuum/adaptdl#81: a process killed between two files of one checkpoint leaves a mix of old and new.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint import store
from modellink_lora.checkpoint.adapter import Adapter, write_adapter
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.lora_rank_writer import write_lora_rank_files
from modellink_lora.checkpoint.peft import write_peft
from modellink_lora.checkpoint.store import replacing_file, replacing_folder, replacing_set, write_tracker
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.adapters import export_adapter
from modellink_lora.convert.execute import told_when_full
from modellink_lora.parallel.partition import Partition
from tests.helpers.small_adapter import LORA, MODEL, write_small

TOUCHING = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")
OTHERS = ("README.md", "notes/one.txt", ".hidden")  # the user's, beside what is exported


def killed_at(count: int, work: Callable[[], None]) -> bool:
    """Do `work` in a process that is killed before it touches the disk for the `count`-th time; False: it was not."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in TOUCHING:
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def export(adapter: Adapter, to: Path, kind: str) -> None:
    if kind == "peft":
        write_peft(to, adapter, base_model=None)
    elif kind == "adapter":
        write_adapter(to / "iter_0000003", {name: adapter.stored(name) for name in adapter.shapes}, adapter.meta)
        write_tracker(to, 3)
    else:
        write_lora_rank_files(to, adapter, tp=2, partition=Partition((2,)), spelling="mcore")


def content(folder: Path) -> tuple[float, float]:
    """(alpha, a value of the tensors): which of two adapters a folder holds."""
    adapter = open_adapter(folder, base=lambda: MODEL)
    return adapter.meta.lora.alpha, float(adapter.read("decoder.layers.0.mlp.linear_fc2.lora_B")[0, 0])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Adapter, Adapter]:
    """Adapters that differ in alpha and in tensors."""
    old = open_adapter(write_small(tmp_path / "old"))
    lora = dataclasses.replace(LORA, alpha=8.0)
    write_adapter(
        tmp_path / "new/iter_0000003", {name: -old.stored(name) for name in old.shapes},
        dataclasses.replace(old.meta, lora=lora),
    )  # fmt: skip
    return old, open_adapter(tmp_path / "new/iter_0000003")


@pytest.mark.parametrize("movable", [True, False], ids=["exchanged", "one by one"])
@pytest.mark.parametrize("kind", ["peft", "adapter", "adapter-ranks"])
def test_killed_at_any_step_an_export_leaves_the_old_adapter_or_the_new(
    kind: str, movable: bool, two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "to_disk", lambda path: None)  # of a kill, unlike a power cut, no bytes are lost
    if not movable:
        monkeypatch.setattr(store, "_is_movable", lambda root: False)
        monkeypatch.setattr(store, "exchange", lambda one, other: False)
    old, new = two
    export(old, tmp_path / "first", kind)
    place = tmp_path / "first" if kind == "peft" else tmp_path / "first/iter_0000003"
    mine = OTHERS if kind != "adapter-ranks" else ()  # rank files are a folder of their own
    for name in mine:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(name)
    states = [content(tmp_path / "first")]
    export(new, tmp_path / "last", kind)
    states.append(content(tmp_path / "last"))
    assert states[0][0] != states[1][0] and states[0][1] == -states[1][1]
    found = []
    for count in range(1, 1000):
        root = tmp_path / f"{count}"
        shutil.copytree(tmp_path / "first", root)
        killed = killed_at(count, lambda root=root: export(new, root, kind))  # type: ignore[misc]
        here = root if kind == "peft" else root / "iter_0000003"
        assert all((here / name).read_text() == name for name in mine if movable)
        try:
            found.append(content(root))
        except UserError as error:  # where a folder cannot be exchanged there is a moment without either
            assert not movable and "\n" not in str(error)
        export_next(root, kind)
        found.append(content(root))
        assert all((here / name).read_text() == name for name in mine)
        left = [path.name for path in (*root.rglob(".*"), *tmp_path.glob(f".{count}.*")) if path.name != ".hidden"]
        assert not left, f"left by a kill before touch {count}: {left}"
        shutil.rmtree(root)
        if not killed:
            break
    assert count > 10 and set(found) == set(states), found
    assert found == sorted(found, key=states.index), "once new, it stays new"


def export_next(root: Path, kind: str) -> None:
    """A next writer of the same names that fails before it has written anything."""
    targets: list[Any] = [replacing_set(root, "adapter_config.json", instead_of=("adapter_model.*",))]
    if kind == "adapter":
        targets = [replacing_set(root / "iter_0000003", "adapter.json", instead_of=("adapter.*",))]
    elif kind == "adapter-ranks":
        targets = [replacing_folder(root / "iter_0000003")]
    targets.append(replacing_file(root / "latest_checkpointed_iteration.txt"))
    for target in targets:
        with pytest.raises(KeyboardInterrupt), target:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["peft", "adapter", "adapter-ranks", "peft, cut by --svd-rank"])
def test_a_full_disk_at_any_file_leaves_what_was_there(
    kind: str, two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two
    target, rank = kind.partition(",")[0], 1 if "svd" in kind else None

    def send(adapter: Adapter) -> None:
        convert = ConvertConfig(lora_load=str(adapter.folder), save_dir=str(tmp_path / "x"), save_model_type=target,
                                overwrite=True, svd_rank=rank)  # fmt: skip
        with told_when_full(tmp_path / "x"):
            export_adapter(convert, adapter, lambda line: None)

    def snapshot() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}

    send(old)
    (tmp_path / "x/README.md").write_text("mine")
    before, real = snapshot(), store.to_disk
    for allowed in range(100):
        calls = 0

        def full(path: Path, allowed: int = allowed) -> None:
            nonlocal calls
            calls += 1
            if calls > allowed and path.is_file():  # write-back errors are told by fsync
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path)

        monkeypatch.setattr(store, "to_disk", full)
        try:
            send(new)
        except UserError as error:
            assert "No space left on device while writing; nothing is left of the result" in str(error)
        else:
            break
        finally:
            monkeypatch.setattr(store, "to_disk", real)
        names = {str(path.relative_to(tmp_path)) for path in (tmp_path / "x").rglob("*") if path.is_file()}
        if snapshot() != before:  # all was whole but the tracker, which names the same iteration
            assert target != "peft" and names == before.keys() and allowed > 1
    assert allowed > 1 and snapshot() != before and (tmp_path / "x/README.md").read_text() == "mine"
    assert not list(tmp_path.rglob(".*"))


def test_the_state_of_another_run_does_not_stay_beside_an_exported_adapter(
    two: tuple[Adapter, Adapter], tmp_path: Path
) -> None:
    folder = tmp_path / "x/iter_0000003"
    (folder / "mp_rank_00").mkdir(parents=True)
    for name in (
        "optimizer.safetensors",
        "training.json",
        "mp_rank_00/model_optim_rng.pt",
        "README.md",
        "adapter.json",
    ):
        (folder / name).write_text("old")
    export(two[1], tmp_path / "x", "adapter")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for name in (f".x.{dead}.tmp", f".x.{os.getppid()}.tmp", f".y.{dead}.tmp", f".x.y.{dead}.tmp", ".x.note"):
        (tmp_path / name).write_text("")
    with replacing_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    stay = [f".x.{os.getppid()}.tmp", ".x.note", f".x.y.{dead}.tmp", f".y.{dead}.tmp", "x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    (tmp_path / f".folder.{dead}.old").mkdir()
    (tmp_path / f".folder.{dead}.old/whole").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "folder"):
        assert (tmp_path / "folder/whole").read_text() == "old", "put back before anything is written"
        raise KeyboardInterrupt
    assert (tmp_path / "folder/whole").read_text() == "old" and not (tmp_path / f".folder.{dead}.old").exists()


def test_a_set_is_written_into_the_folder_one_stands_in_and_through_a_link(
    two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(two[0], tmp_path / "link", "peft")
    (tmp_path / "real").chmod(0o750)
    export(two[1], tmp_path / "link", "peft")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real")[0] == 8.0
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750
    monkeypatch.chdir(tmp_path / "real")
    export(two[0], Path("."), "peft")
    assert content(Path("."))[0] == 4.0 and os.getcwd() == str(tmp_path / "real")


def test_the_base_of_a_peft_export_is_named_or_said_to_be_unknown(two: tuple[Adapter, Adapter], tmp_path: Path) -> None:
    import json

    said: list[str] = []

    def named(**fields: Any) -> Any:
        said.clear()
        convert = ConvertConfig(lora_load=str(two[0].folder), save_dir=str(tmp_path / "x"), save_model_type="peft",
                                overwrite=True, **fields)  # fmt: skip
        export_adapter(convert, two[0], said.append)
        return json.loads((tmp_path / "x/adapter_config.json").read_text())["base_model_name_or_path"]

    def hint() -> bool:
        return any("base_model_name_or_path stays null" in x and "--base-model-name-or-path" in x for x in said)

    assert named() is None and hint()
    assert named(base_model_name_or_path="a/b") == "a/b" and not hint()
    (tmp_path / "mg/hf").mkdir(parents=True)
    config = {"model_type": "llama"}
    (tmp_path / "mg/hf/config.json").write_text(json.dumps(config))
    assert named(load_dir=str(tmp_path / "mg"), load_model_type="mg") is None and hint()
    (tmp_path / "mg/hf/config.json").write_text(json.dumps({**config, "_name_or_path": "c/d"}))
    assert named(load_dir=str(tmp_path / "mg"), load_model_type="mg") == "c/d" and not hint()
    assert named(load_dir=str(tmp_path / "mg/hf"), load_model_type="hf") == str(tmp_path / "mg/hf")
    assert torch.equal(open_adapter(tmp_path / "x", base=lambda: MODEL).read("decoder.layers.0.mlp.linear_fc2.lora_B"),
                       two[0].read("decoder.layers.0.mlp.linear_fc2.lora_B"))  # fmt: skip
