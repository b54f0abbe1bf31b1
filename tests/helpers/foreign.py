"""A tiny base with one random adapter, in this program's format and in ModelLink's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden import modellink_adapter
from tests.helpers.conversion import random_adapter
from tests.helpers.tiny import tiny_model
from tests.helpers.training import hf_to_megatron

# source layouts of rank files: every kind of cut, and stages of different depth
SOURCES: dict[str, dict[str, Any]] = {
    "tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2-pp2": {"tp": 2, "pp": 2}, "pp2-vpp2": {"pp": 2, "vpp": 2},
    "tp2-pp2-vpp2": {"tp": 2, "pp": 2, "vpp": 2}, "uneven": {"pp": 2, "layers_of_stages": [3, 1]},
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """Hugging Face model `hf`, the same as checkpoint `mg`, and an adapter of rank 4 and alpha 16 for it in `own`."""

    hf: Path
    mg: Path
    own: Path
    base: dict[str, Tensor]
    adapter: dict[str, Tensor]

    def modellink(self, root: Path, **layout: Any) -> Path:
        """Write base and adapter below `root` as ModelLink does."""
        return modellink_adapter.write(root, self.base, self.adapter, heads=4, groups=2, alpha=16, **layout)

    def modellink_base(self, root: Path, **layout: Any) -> Path:
        """Write the base alone below `root` as ModelLink does."""
        return modellink_adapter.write(root, self.base, {}, heads=4, groups=2, **layout)


def make_foreign(folder: Path, *, layers: int = 4, tied: bool = False) -> Foreign:
    """Make all of it in `folder`."""
    from modellink_lora.checkpoint.adapter_kinds import open_adapter
    from modellink_lora.checkpoint.rank_files import open_rank_files

    hf = tiny_model("llama", folder / "hf", layers=layers, tied=tied)
    mg = hf_to_megatron(hf, folder / "mg", tp=2)  # its vocabulary of 260 rows divides
    files = open_rank_files(mg)
    base = {name: files.read(name) for name in files.names()}
    adapter = open_adapter(random_adapter(folder / "own", hf, alpha=16.0))
    return Foreign(hf, mg, folder / "own", base, {name: adapter.read(name) for name in adapter.shapes})


def damage(root: Path, change: Any, rank: str = "mp_rank_*") -> None:
    """Change the documents of the rank files that match."""
    for file in sorted(root.glob(f"iter_*/{rank}/model_optim_rng.pt")):
        document = torch.load(file, weights_only=False)
        change(document)
        torch.save(document, file)
