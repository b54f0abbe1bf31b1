"""Two checkpoints of any formats and layouts compared tensor by tensor, as one process would see their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter import META, Adapter
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.peft import CONFIG
from modellink_lora.checkpoint.rank_files import RankFiles, as_model
from modellink_lora.checkpoint.rank_tree import open_tree
from modellink_lora.checkpoint.store import TRACKER, newest, read_tracker
from modellink_lora.config.diff import DiffConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig

_ROWS = 1 << 20  # values compared at a time, in fp64
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


@dataclass
class Side:
    """One of the two."""

    title: str
    names: list[str]
    read: Callable[[str], Tensor]
    vocab_size: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # what is compared besides tensors


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same."""

    name: str
    what: str


def diff(a: Path, b: Path, config: DiffConfig, *, say: Callable[[str], None]) -> int:
    """Say what differs. Returns how many tensors do."""
    base = (lambda: _model_config(Path(str(config.base)))) if config.base else None
    sides = [open_side(path, base) for path in (a, b)]
    for letter, side in zip("AB", sides, strict=True):
        say(f"{letter}: {side.title}")
    found, compared = compare(sides[0], sides[1], config.tolerance)
    shown = found if not config.lines else found[: config.lines]
    for difference in shown:
        say(f"  {difference.name}: {difference.what}")
    if len(shown) < len(found):
        say(f"  ... and {len(found) - len(shown)} more")
    within = f" within {config.tolerance:g}" if config.tolerance else ""
    say(f"{len(found)} of {compared} tensors differ" if found else f"equal{within}: {compared} tensors")
    return len(found)


def compare(a: Side, b: Side, tolerance: float = 0.0) -> tuple[list[Difference], int]:
    """(differences in A's order, number of tensors compared)."""
    found = []
    for name, value in a.numbers.items():
        if name in b.numbers and value != b.numbers[name]:
            found.append(Difference(name, f"{value:g} in A, {b.numbers[name]:g} in B"))
    in_b = set(b.names)
    for name in a.names:
        if name not in in_b:
            found.append(Difference(name, "only in A"))
        elif what := _tensors(name, a, b, tolerance):
            found.append(Difference(name, what))
    found += [Difference(name, "only in B") for name in b.names if name not in set(a.names)]
    return found, len(set(a.names) | in_b)


def _tensors(name: str, a: Side, b: Side, tolerance: float) -> str | None:
    """What differs between the two tensors of this name; None: nothing."""
    x, y = a.read(name), b.read(name)
    if name in _VOCABULARY:
        known = {size for size in (a.vocab_size, b.vocab_size) if size}
        if len(known) == 1:  # padding is part of a layout, not of a model
            x, y = x[: min(known)], y[: min(known)]
    if x.shape != y.shape:
        return f"shape {list(x.shape)} in A, {list(y.shape)} in B"
    types = "" if x.dtype == y.dtype else f", {x.dtype} and {y.dtype}".replace("torch.", "")
    if x.dtype == y.dtype and torch.equal(x, y):
        return None
    greatest, count = 0.0, 0
    rows = max(1, _ROWS // max(1, x[:1].numel()))
    for start in range(0, len(x), rows):
        p, q = x[start : start + rows].double(), y[start : start + rows].double()
        different = ~((p == q) | (p.isnan() & q.isnan()))
        count += int(different.sum())
        if different.any():
            gap = (p[different] - q[different]).abs()
            greatest = max(greatest, float(gap.nan_to_num(float("inf")).max()))
    if count and greatest <= tolerance:
        return None
    if not count:
        return f"the same values{types}" if types and not tolerance else None
    return f"greatest |difference| {greatest:.3g}, {count} of {x.numel()} values{types}"


def open_side(path: Path, base: Callable[[], ModelConfig] | None) -> Side:
    """The model or adapter in `path`, whatever its format.

    Raises UserError when there is neither, or it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    itself = re.fullmatch(r"iter_\d{7}|release", path.name) and not (path / TRACKER).is_file()
    if (path / CONFIG).is_file():
        return _adapter(open_adapter(path, flag="folder", base=base, replacing=True))
    if (path / "config.json").is_file() and not (path / TRACKER).is_file():
        model = HfModel(path, flag="folder")
        return Side(f"{path}, Hugging Face {model.dtype}", model.names(), model.read, model.config.vocab_size)
    folder = path if itself else newest(path, flag="folder")
    if (folder / META).is_file() and not any(folder.glob("mp_rank_*")):
        return _adapter(open_adapter(path, flag="folder", base=base, replacing=True))
    tree = open_tree(folder, flag="folder")
    if not tree.holds_layers:
        return _adapter(open_adapter(path, flag="folder", base=base, replacing=True))
    root, iteration = (path.parent, tree.iteration) if itself else (path, read_tracker(path, flag="folder"))
    side = _model(as_model(tree, root, iteration, flag="folder"))
    if not tree.holds_adapter:
        return side
    inside = _adapter(open_adapter(path, flag="folder", base=base, replacing=True))
    model_read, names = side.read, set(side.names)
    return Side(
        f"{side.title}, with an adapter", side.names + inside.names,
        lambda name: model_read(name) if name in names else inside.read(name), side.vocab_size, inside.numbers,
    )  # fmt: skip


def _model(files: RankFiles) -> Side:
    layout = f"TP {files.tp}, layers {files.partition.describe()}" + f", EP {files.ep}" * (files.ep > 1)
    title = f"{files.folder}, {files.spelling} names, {layout}, {files.dtype}"
    # a file that does not tell the vocabulary counts its padding as tokens
    known = files.config.vocab_size if isinstance(getattr(files.args, "vocab_size", None), int) else None
    return Side(title, files.names(), files.read, known)


def _adapter(adapter: Adapter) -> Side:
    lora = adapter.meta.lora
    numbers = {f"{module} scaling": lora.scaling_of(module) for module in adapter.modules}
    title = f"{adapter.folder}, adapter of rank {lora.r}, alpha {lora.alpha:g}"
    return Side(title, [*adapter.shapes, *sorted(adapter.replaced)], adapter.read, None, numbers)


def _model_config(path: Path) -> ModelConfig:
    if (path / "config.json").is_file() and not (path / TRACKER).is_file():
        return HfModel(path, flag="--base").config
    tree = open_tree(newest(path, flag="--base"), flag="--base")
    return as_model(tree, path, tree.iteration, flag="--base").config
