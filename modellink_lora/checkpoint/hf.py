"""Hugging Face model folders: streaming tensors in and out. What the tensors mean is the family's affair."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink_lora.checkpoint.companions import copy_companions
from modellink_lora.checkpoint.dtypes import dtype_name
from modellink_lora.checkpoint.filling import Job, fill
from modellink_lora.checkpoint.outfile import OutFile, Slot
from modellink_lora.checkpoint.store import replacing_folder
from modellink_lora.checkpoint.stored import Stored
from modellink_lora.checkpoint.unpickle import load_tensors
from modellink_lora.checkpoint.weight_files import WeightFile, check_rivals, index_of, weight_files
from modellink_lora.config.document import read_document, to_json
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of, with_model_type
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import Layout, Vocab
from modellink_lora.models.shapes import full_shape

INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*")  # files that look like weights of the model
_DERIVED = re.compile(r"(^|\.)rotary_(pos_)?emb\.inv_freq$|\.masked_bias$")  # buffers that follow from the config


Write = Callable[[str, Iterable[Tensor]], int]  # (name, consecutive blocks of its rows) -> bytes written


class _Safetensors:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, cut short or unreadable ({error})") from None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _Bin:
    def __init__(self, path: Path) -> None:
        self._tensors = load_tensors(path)

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _opened(path: Path) -> WeightFile:
    return _Bin(path) if path.suffix == ".bin" else _Safetensors(path)


class HfFolder:
    """The config and the tensors of one Hugging Face model folder; tensors are read one at a time."""

    def __init__(self, path: Path, *, flag: str = "--load-dir") -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{flag} {path}: no such folder")
        self.config = read_config_json(self.path, flag=flag)
        self._files = self._open_files(flag)
        self._where: dict[str, WeightFile] = {}
        self.dropped: dict[str, str] = {}  # what is there and not used -> why
        for title, file in self._files.items():
            held = {name: file for name in file.names() if not _DERIVED.search(name)}
            if twice := sorted(held.keys() & self._where.keys()):
                raise UserError(f"{self.path / title} holds {twice[0]}, which another file of the model holds as well")
            self._where |= held
            derived = (name for name in file.names() if _DERIVED.search(name))
            self.dropped |= dict.fromkeys(derived, "a buffer that follows from the settings")
        others = {path.name for pattern in _WEIGHTS for path in self.path.glob(pattern)} - self._files.keys()
        check_rivals(self.path, self._where, sorted(others), opener=_opened, derived=_DERIVED)
        reason = f"the weights are read from {_some(sorted(self._files))}"
        self.dropped |= dict.fromkeys(sorted(others), reason)

    def _open_files(self, flag: str) -> dict[str, WeightFile]:
        names, weight_map = weight_files(self.path, flag=flag)
        files = {name: _opened(self.path / name) for name in names}
        held = {name: set(file.names()) for name, file in files.items()}
        for key, holder in weight_map.items():
            if key not in held[holder]:
                raise UserError(f"{self.path / holder} lacks {key}, which {index_of(holder)} says it holds")
        return files

    def names(self) -> list[str]:
        """Names of the stored tensors, without buffers that follow from the config."""
        return list(self._where)

    def read(self, name: str) -> Tensor:
        return self._where[name].read(name)

    def complete(self, prefix: str, names: Iterable[str]) -> None:
        """Know tensors that are stored without `prefix`, which some checkpoints leave out, by their full `names`."""
        for name in names:
            stored = name.removeprefix(prefix)
            if name not in self._where and stored in self._where:
                self._where[name] = _Renamed(self._where.pop(stored), stored)


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """A file of which one tensor is known by another name."""

    file: WeightFile
    stored: str

    def names(self) -> list[str]:
        return [self.stored]

    def read(self, name: str) -> Tensor:
        return self.file.read(self.stored)


class HfModel:
    """A Hugging Face folder seen as full Megatron tensors.

    Opening it checks that every tensor of the family is there and that nothing is left over.
    """

    def __init__(self, path: Path, *, flag: str = "--load-dir", resize_vocab: bool = False) -> None:
        """Open the folder `path`, given by `flag`.

        Args:
            resize_vocab: embedding and head get the rows that config.json says: those above are cut off, new ones are
                the mean of the others.
        """
        self._resize_vocab = resize_vocab
        self.resized: dict[str, tuple[int, int]] = {}  # tensor -> rows before and after
        self.folder = HfFolder(path, flag=flag)
        self.family: Family = family_of(str(self.folder.config.get("model_type")))
        config = self.family.read_config(self.folder.config, where=str(self.folder.path / "config.json"))
        self.folder.complete(
            self.family.optional_prefix, (part for spec in self.family.tensors(config) for part in spec.hf)
        )
        self._check_names(config)
        self.config = config
        for spec in self.family.tensors(config):
            for part, tensor in zip(spec.hf, self.stored(spec.name).parts, strict=False):
                dtype_name(tensor.dtype, where=f"{self.folder.path}: {part}")
        self.config = dataclasses.replace(config, params_dtype=dtype_name(self.dtype, where=str(self.folder.path)))

    def _check_names(self, config: ModelConfig) -> None:
        present = set(self.folder.names())
        # a config.json may ask for any number of tensors: those above what is there are not listed
        specs = itertools.islice(self.family.tensors(config), len(present) + 3)
        expected = {part for spec in specs for part in spec.hf}
        head = next(row.hf for row in self.family.rows if row.name == "output_layer.weight")
        if not config.untie_embeddings_and_output_weights and head in present:
            present.remove(head)
            self.folder.dropped[head] = "a copy of the tied embedding, equal to it"
            embedding = next(self.family.tensors(config)).hf[0]
            if not torch.equal(self.folder.read(head), self.folder.read(embedding)):
                raise UserError(
                    f"{self.folder.path}: config.json says tie_word_embeddings true, but {head} differs from "
                    f"{embedding}: set it to false if the head is meant to be separate"
                )
        where = f"{self.folder.path} ({self.family.hf_model_types[0]}, {config.num_layers} layers)"
        if missing := sorted(expected - present):
            raise UserError(f"{where} lacks {len(missing)} tensors of this model type: {_some(missing)}")
        if extra := sorted(present - expected):
            raise UserError(f"{where} holds {len(extra)} tensors that this model type does not have: {_some(extra)}")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the embedding; the other tensors of a model are normally of the same."""
        return self.folder.read(next(self.family.tensors(self.config)).hf[0]).dtype

    @property
    def dropped(self) -> Mapping[str, str]:
        """Stored tensors that the model does not need -> why."""
        return self.folder.dropped

    def held(self) -> Iterator[str]:
        """Every stored tensor of the model."""
        return (name for name in self.folder.names() if name not in self.folder.dropped)

    def keys(self, name: str) -> tuple[str, ...]:
        """Which of `held` make the tensor of global name `name`."""
        return self.family.tensor(name, self.config).hf

    def names(self) -> list[str]:
        return [spec.name for spec in self.family.tensors(self.config)]

    def read(self, name: str) -> Tensor:
        """The full Megatron tensor of global name `name`."""
        stored = self.stored(name)
        return stored.join(stored.parts)

    def stored(self, name: str) -> Stored:
        """What `read` puts together, each part where it lies."""
        spec = self.family.tensor(name, self.config)
        parts = [self.folder.read(part) for part in spec.hf]
        join = spec.layout.fuse
        if isinstance(spec.layout, Vocab):
            parts = self._with_rows(spec.hf[0], parts[0])
            join = functools.partial(_joined, spec.layout)
        found = [tuple(part.shape) for part in parts]
        if len(parts) > len(spec.hf):  # rows that were made up lie behind the others
            found = [(self.config.vocab_size, *found[0][1:])]
        expected = full_shape(name, self.config)
        try:  # each part for itself: gate and up of wrong sizes may have the right sum
            fits = found == [tuple(part.shape) for part in spec.layout.split(torch.empty(expected, device="meta"))]
        except RuntimeError:  # a size beyond any memory
            fits = False
        if not fits:
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in zip(spec.hf, parts, strict=False))
            raise UserError(
                f"{self.folder.path}: {shapes} do not make the {expected} that config.json implies for {name}"
            )
        return Stored(parts, spec.layout, join)

    def _with_rows(self, name: str, tensor: Tensor) -> list[Tensor]:
        """`tensor` with as many rows as config.json says tokens, in one part, or two where rows are made up."""
        rows = self.config.vocab_size
        if tensor.dim() != 2 or len(tensor) == rows:
            return [tensor]
        if not self._resize_vocab:
            raise UserError(
                f"{self.folder.path}: {name} {tuple(tensor.shape)} has {len(tensor)} rows and config.json says "
                f"vocab_size {rows}: correct vocab_size, or let convert_ckpt.py --resize-vocab cut or add rows"
            )
        self.resized[name] = len(tensor), rows
        if rows < len(tensor):
            return [tensor[:rows]]
        mean = tensor.double().mean(0, keepdim=True).to(tensor.dtype)
        return [tensor, mean.expand(rows - len(tensor), -1)]


def _joined(layout: Layout, parts: Sequence[Tensor]) -> Tensor:
    return layout.fuse([torch.cat(list(parts))] if len(parts) > 1 else parts)


def read_config_json(folder: Path, *, flag: str) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when it is missing or not JSON."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {folder}: holds no config.json, so it is not a Hugging Face model folder")
    return with_model_type(read_document(folder / "config.json", dict[str, Any]), where=str(folder / "config.json"))


def write_hf_folder(
    folder: Path,
    slots: Sequence[Slot],
    jobs: Callable[[Write], Sequence[Job]],
    *,
    config: Mapping[str, Any],
    companions: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    workers: int = 1,
    memory: int = 0,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a model folder of sharded safetensors with an index; the folder appears under its name when it is whole.

    Args:
        slots: every tensor, in the order of the files.
        jobs: makes the work, which hands each tensor to `Write` once, from any thread.
        config: what config.json is to say.
        companions: folder whose tokenizer and generation files are copied.
        memory: bytes that jobs at work may hold together.
        check: called with the folder before it gets its name; what it raises keeps it from that.
    """
    shards: list[list[Slot]] = [[]]
    for slot in slots:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + slot.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(slot)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    total = sum(slot.nbytes for slot in slots)
    with replacing_folder(folder) as temporary, contextlib.ExitStack() as stack:
        if companions is not None:
            copy_companions(companions, temporary)
        _write_json(temporary / "config.json", dict(config))
        files: dict[str, OutFile] = {}
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(safetensors_file(temporary / name, shard))
            files |= {slot.name: file for slot in shard}

        def write(name: str, blocks: Iterable[Tensor]) -> int:
            return files[name].write(name, blocks)

        fill(jobs(write), workers=workers, total=total, memory=memory, title=f"writing {folder.name}")
        for file in dict.fromkeys(files.values()):
            file.finish()
        weight_map = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
        _write_json(
            temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
        if check is not None:
            check(temporary)


_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def safetensors_file(path: Path, slots: Sequence[Slot]) -> OutFile:
    """A safetensors file with its header written and room for the tensors, one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, places = 0, {}
    for slot in slots:
        places[slot.name] = position
        header[slot.name] = {
            "dtype": _SAFETENSORS_DTYPES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.nbytes],
        }
        position += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return OutFile(path, slots, {name: 8 + len(text) + at for name, at in places.items()}, checksums=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(to_json(document, indent=2) + "\n", encoding="utf-8")
