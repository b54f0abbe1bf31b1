"""Hugging Face model folders: streaming tensors in and out. What the tensors mean is the family's affair."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from modellink_lora.checkpoint.dtypes import dtype_name
from modellink_lora.checkpoint.store import replacing_folder
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.family import Family
from modellink_lora.models.shapes import full_shape

INDEX = "model.safetensors.index.json"
# Everything a model folder needs besides its weights, where it has it.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_DERIVED = re.compile(r"(^|\.)rotary_(pos_)?emb\.inv_freq$|\.masked_bias$")  # buffers that follow from the config


class _File(Protocol):
    def names(self) -> list[str]: ...
    def read(self, name: str) -> Tensor: ...


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
        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a bad file
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read safely ({reason}); save the model as safetensors") from None

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class HfFolder:
    """The config and the tensors of one Hugging Face model folder; tensors are read one at a time."""

    def __init__(self, path: Path, *, flag: str = "--load-dir") -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{flag} {path}: no such folder")
        self.config = read_config_json(self.path, flag=flag)
        self._files = self._open_files(flag)
        self._where: dict[str, _File] = {}
        for file in self._files.values():
            self._where |= {name: file for name in file.names() if not _DERIVED.search(name)}

    def _open_files(self, flag: str) -> dict[str, _File]:
        for single, reader in (("model.safetensors", _Safetensors), ("pytorch_model.bin", _Bin)):
            index = self.path / f"{single}.index.json"
            if index.is_file():
                weight_map = _read_json(index).get("weight_map", {})
                names = sorted(set(weight_map.values()))
                if missing := [name for name in names if not (self.path / name).is_file()]:
                    raise UserError(f"{index} names {', '.join(missing)}, which the folder lacks: download it again")
                files: dict[str, _File] = {name: reader(self.path / name) for name in names}
                for name, held in {name: set(file.names()) for name, file in files.items()}.items():
                    if lost := [key for key, holder in weight_map.items() if holder == name and key not in held]:
                        raise UserError(f"{self.path / name} lacks {lost[0]}, which {index.name} says it holds")
                return files
            if (self.path / single).is_file():
                return {single: reader(self.path / single)}
        raise UserError(f"{flag} {self.path}: holds no model.safetensors or pytorch_model.bin")

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

    file: _File
    stored: str

    def names(self) -> list[str]:
        return [self.stored]

    def read(self, name: str) -> Tensor:
        return self.file.read(self.stored)


class HfModel:
    """A Hugging Face folder seen as full Megatron tensors.

    Opening it checks that every tensor of the family is there and that nothing is left over.
    """

    def __init__(self, path: Path, *, flag: str = "--load-dir") -> None:
        self.folder = HfFolder(path, flag=flag)
        self.family: Family = family_of(str(self.folder.config.get("model_type")))
        config = self.family.read_config(self.folder.config)
        self.folder.complete(
            self.family.optional_prefix, (part for spec in self.family.tensors(config) for part in spec.hf)
        )
        self._check_names(config)
        dtype = self.folder.read(next(self.family.tensors(config)).hf[0]).dtype
        self.config = dataclasses.replace(config, params_dtype=dtype_name(dtype, where=str(self.folder.path)))

    def _check_names(self, config: ModelConfig) -> None:
        expected = {part for spec in self.family.tensors(config) for part in spec.hf}
        present = set(self.folder.names())
        head = next(row.hf for row in self.family.rows if row.name == "output_layer.weight")
        if not config.untie_embeddings_and_output_weights and head in present:
            present.remove(head)
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

    def names(self) -> list[str]:
        return [spec.name for spec in self.family.tensors(self.config)]

    def read(self, name: str) -> Tensor:
        """The full Megatron tensor of global name `name`."""
        spec = self.family.tensor(name, self.config)
        parts = [self.folder.read(part) for part in spec.hf]
        try:
            full = spec.layout.fuse(parts)
        except RuntimeError:
            full = torch.empty(0)
        if tuple(full.shape) != (expected := full_shape(name, self.config)):
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in zip(spec.hf, parts, strict=True))
            raise UserError(
                f"{self.folder.path}: {shapes} do not make the {expected} that config.json implies for {name}"
            )
        return full


def read_config_json(folder: Path, *, flag: str) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when it is missing or not JSON."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {folder}: holds no config.json, so it is not a Hugging Face model folder")
    return _read_json(folder / "config.json")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy config and tokenizer files of a model folder; names of those found."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def write_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    expected: Iterable[str],
    config: Mapping[str, Any],
    companions: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model folder of sharded safetensors with an index, holding one shard in memory; in place at the end only.

    Args:
        tensors: every tensor once, in any order.
        expected: names that must all have been written when the iterable ends.
        config: what config.json is to say.
        companions: folder whose tokenizer and generation files are copied.
    """
    remaining = set(expected)
    with replacing_folder(folder) as temporary:
        if companions is not None:
            copy_companions(companions, temporary)
        _write_json(temporary / "config.json", dict(config))
        shard: dict[str, Tensor] = {}
        shards: list[list[str]] = []
        total = 0

        def flush() -> None:
            if shard:
                shards.append(list(shard))
                save_file(shard, temporary / _shard_name(len(shards), 0), metadata={"format": "pt"})
                shard.clear()

        for name, tensor in tqdm(tensors, total=len(remaining), desc=f"writing {folder.name}", unit="tensor"):
            assert name in remaining, f"{name} is not expected or was written twice"
            remaining.remove(name)
            if shard and sum(map(_bytes, shard.values())) + _bytes(tensor) > max_shard_bytes:
                flush()
            shard[name] = tensor.clone(memory_format=torch.contiguous_format)  # own storage: no aliases in one file
            total += _bytes(tensor)
        flush()
        assert not remaining, f"never written: {_some(sorted(remaining))}"
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            final = _shard_name(number, len(shards))
            (temporary / _shard_name(number, 0)).rename(temporary / final)
            weight_map |= dict.fromkeys(names, final)
        _write_json(
            temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object")
    return document


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
