"""Rank files are read without running what is in them."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modellink_lora.checkpoint.unpickle import Inert, load_rank_file
from modellink_lora.config.errors import UserError


class Executes:
    """A pickle that runs a command when it is loaded the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "bad.pt"
    torch.save({"model": Executes(marker)}, file)
    with pytest.raises(UserError, match=r"bad\.pt: contains (posix|os|nt)\.system"):
        load_rank_file(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file must be dangerous for the test to mean anything"


@pytest.mark.parametrize("name", ["eval", "exec", "__import__", "open"])
def test_dangerous_builtins_are_refused(name: str, tmp_path: Path) -> None:
    import builtins

    torch.save({"model": getattr(builtins, name)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=name):
        load_rank_file(tmp_path / "x.pt")


class _Attribute:
    """Pickles as an attribute of `owner`, which is how Python 3.11.2 stores a member of an enum."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_an_attribute_of_what_is_really_there_is_refused(tmp_path: Path) -> None:
    torch.save({"model": _Attribute(dict, "__class__")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="contains getattr of '__class__'"):
        load_rank_file(tmp_path / "x.pt")


def test_what_megatron_stores_is_read(tmp_path: Path) -> None:
    document = {
        "args": argparse.Namespace(params_dtype=torch.bfloat16, num_layers=2, paths={"a", "b"}),
        "model": {"w": torch.arange(6.0).reshape(2, 3).bfloat16(), "p": torch.nn.Parameter(torch.ones(2))},
        "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state()}],
        "iteration": np.int64(500),
        "loss": np.float64(1.5),
    }
    torch.save(document, tmp_path / "good.pt")
    found = load_rank_file(tmp_path / "good.pt")
    assert found["args"] == document["args"]
    assert torch.equal(found["model"]["w"], document["model"]["w"])
    assert (found["iteration"], found["loss"]) == (500, 1.5)
    assert isinstance(found["rng_state"][0]["np_rng_state"][1], Inert), "arrays are not needed, and not built"


def test_members_of_absent_libraries_are_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("modellink.enums")
    module.Kind = type("Kind", (), {"__module__": "modellink.enums"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modellink", types.ModuleType("modellink"))
    monkeypatch.setitem(sys.modules, "modellink.enums", module)
    torch.save({"args": argparse.Namespace(kind=module.Kind(), member=_Attribute(module.Kind, "a"))}, tmp_path / "x.pt")
    monkeypatch.undo()
    args = load_rank_file(tmp_path / "x.pt")["args"]
    assert isinstance(args.kind, Inert) and isinstance(args.member, Inert)


class _NpuTensor:
    """Pickles as torch_npu pickles a tensor of an Ascend device."""

    def __init__(self, tensor: torch.Tensor, rebuild: Any) -> None:
        self.tensor, self.rebuild = tensor, rebuild

    def __reduce__(self) -> tuple[Any, ...]:
        t = self.tensor
        storage = torch.storage.TypedStorage(wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True)
        return self.rebuild, (storage, 0, tuple(t.shape), t.stride(), False, {}, (2,))


def test_tensors_of_ascend_devices_are_read_without_torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_npu.utils.storage"
    module = types.ModuleType(name)

    def _rebuild_npu_tensor(*args: Any) -> None:
        raise AssertionError

    _rebuild_npu_tensor.__module__, _rebuild_npu_tensor.__qualname__ = name, "_rebuild_npu_tensor"
    module._rebuild_npu_tensor = _rebuild_npu_tensor  # type: ignore[attr-defined]
    for part in ("torch_npu", "torch_npu.utils"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    weight = torch.randn(3, 4)
    torch.save({"model": {"w": _NpuTensor(weight, _rebuild_npu_tensor)}}, tmp_path / "x.pt")
    monkeypatch.undo()
    assert torch.equal(load_rank_file(tmp_path / "x.pt")["model"]["w"], weight)


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_file_cut_short_is_a_message(tmp_path: Path, keep: int) -> None:
    torch.save({"model": {"w": torch.zeros(100)}}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.pt: damaged, cut short"):
        load_rank_file(tmp_path / "x.pt")


def test_a_bare_pickle_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(UserError, match="damaged, cut short or not a checkpoint"):
        load_rank_file(tmp_path / "x.pt")
