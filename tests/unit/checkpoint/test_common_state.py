"""What megatron-core 0.19 stores among the tensors of a torch_dist folder, where older ones wrote common.pt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from modellink_lora.checkpoint.megatron_dist import args_of
from modellink_lora.checkpoint.torch_dist import open_torch_dist
from modellink_lora.config.errors import UserError


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def save(folder: Path, common: Any) -> Path:
    """A weight and the object, as torch's writer lays out what 0.19 gives it."""
    weight = torch.arange(6.0).view(2, 3)
    state = {"a.weight": weight, "common_state/shard_0_1": [common]}
    planner = checkpoint.DefaultSavePlanner(flatten_state_dict=False)
    checkpoint.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    return folder


def test_args_and_iteration_are_found(tmp_path: Path) -> None:
    source = open_torch_dist(save(tmp_path, {"args": argparse.Namespace(num_layers=2), "iteration": 12}))
    assert args_of(source) == (argparse.Namespace(num_layers=2), 12)
    assert list(source.entries) == ["a.weight"] and source.dropped == {}
    assert torch.equal(source.read("a.weight"), torch.arange(6.0).view(2, 3))


def test_it_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_torch_dist(save(tmp_path, {"args": Harmful()}))
    with pytest.raises(UserError, match=r"distcp: contains builtins\.print, which weights do not need"):
        source.load_common()
    assert capsys.readouterr().out == ""
