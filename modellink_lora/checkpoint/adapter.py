"""An adapter as full LoRA tensors by global name, and this program's own file format for it.

`iter_NNNNNNN/adapter.safetensors` holds `<global module>.lora_A` [r, in] and `.lora_B` [out, r] as if trained on one
process; `adapter.json` holds what they mean. docs/formats.md describes every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modellink_lora.checkpoint.blocks import PeftOrigin, ratios, scaled_b
from modellink_lora.checkpoint.checksums import check_document, check_file, with_checksums
from modellink_lora.checkpoint.store import replacing_set
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.document import read_document, to_json, typed
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.family import TensorSpec
from modellink_lora.models.layouts import Layout

FORMAT = 1
TENSORS, META = "adapter.safetensors", "adapter.json"
# what belongs to one checkpoint and must not stay beside a new adapter
_OF_A_CHECKPOINT = (TENSORS, "optimizer.safetensors", "training.json", "mp_rank_*")


@dataclass(frozen=True)
class _Document:
    """`adapter.json` as it is read."""

    format: int
    lora: dict[str, Any]
    model: dict[str, Any]
    base_fingerprint: str | None
    iteration: int
    prompt_type: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    peft: PeftOrigin | None = None
    crc32: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class AdapterMeta:
    """What `adapter.json` says."""

    lora: LoraConfig  # targets in mcore names
    model: ModelConfig  # of the base
    base_fingerprint: str | None  # None: the base was random, or the adapter comes from elsewhere
    iteration: int
    prompt_type: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    peft: PeftOrigin | None = None  # of an adapter converted from PEFT, until it is trained on

    def to_json(self) -> dict[str, Any]:
        """The document of `adapter.json`."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, document: Any, *, where: str) -> AdapterMeta:
        """The inverse of `to_json`; UserError for a document of another kind, with `where` and the key."""
        read = typed(document, _Document, where=where, closed=True)
        if read.format != FORMAT:
            raise UserError(f"{where}: format {read.format} is not {FORMAT}: it was written by another version of this "
                            "program")  # fmt: skip
        if read.iteration < 0:
            raise UserError(f"{where}: iteration {read.iteration} is below 0")
        lora = typed(read.lora, LoraConfig, where=f"{where}: lora", closed=True)
        model = typed(read.model, ModelConfig, where=f"{where}: model", closed=True)
        return cls(lora, model, read.base_fingerprint, read.iteration, read.prompt_type, read.versions, read.peft)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. `read` streams one full tensor."""

    folder: Path
    meta: AdapterMeta
    shapes: Mapping[str, tuple[int, ...]]
    origin: str | None = None  # the program that wrote it; None: this one
    notes: tuple[str, ...] = ()  # what the user should know about how it was read
    reader: Callable[[str], Tensor] | None = None  # of an adapter from elsewhere; gives what `stored` gives
    replaced: frozenset[str] = frozenset()  # tensors of the base that it holds anew as a whole; `stored` gives them
    warnings: tuple[str, ...] = ()  # what is wrong with it, although it can be read

    @property
    def modules(self) -> list[str]:
        """Global names of the adapted linears, e.g. `decoder.layers.0.mlp.linear_fc1`."""
        return [name.removesuffix(".lora_A") for name in self.shapes if name.endswith(".lora_A")]

    def read(self, name: str) -> Tensor:
        """A factor as it is computed with: W' = W + scaling * B A."""
        module, _, factor = name.rpartition(".")
        factors = self.ratios(module) if factor == "lora_B" else []
        return scaled_b(self.stored(name), self.layout(module), factors) if factors else self.stored(name)

    def stored(self, name: str) -> Tensor:
        """A factor as it is kept. Of an adapter from PEFT, projections in lora_B have each their own scaling."""
        if self.reader is not None:
            return self.reader(name)
        with safe_open(self.folder / TENSORS, framework="pt") as file:
            return file.get_tensor(name)

    def ratios(self, module: str) -> list[float]:
        """By what `stored` and `read` differ, for each projection of `module`; empty where they do not."""
        if self.meta.peft is None:
            return []
        found = ratios(module, self.meta.peft.blocks[module], self.meta.lora)
        return [] if all(factor == 1.0 for factor in found) else found

    def layout(self, module: str) -> Layout:
        """Layout of the weight of `module`, which is also that of the rows of lora_B."""
        return self._spec(module).layout

    def projections(self, module: str) -> list[str]:
        """Hugging Face modules that `module` consists of."""
        return [name.removesuffix(".weight") for name in self._spec(module).hf]

    def _spec(self, module: str) -> TensorSpec:
        return family_of(self.meta.model.hf_model_type).tensor(f"{module}.weight", self.meta.model)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], meta: AdapterMeta) -> None:
    """Write both files into `folder` together, in place of a checkpoint that is there.

    Args:
        tensors: as `Adapter.stored` gives them, if `meta.peft` is there; whole ones of `Adapter.replaced` too.
    """
    with replacing_set(folder, META, instead_of=_OF_A_CHECKPOINT) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        document = with_checksums(meta.to_json(), {TENSORS: temporary / TENSORS})
        (temporary / META).write_text(to_json(document, indent=2, ensure_ascii=True) + "\n")


def open_own(folder: Path, *, flag: str = "--lora-load") -> Adapter:
    """The adapter in `folder`. Raises UserError when its files are missing or damaged."""
    for name in (META, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"{flag} {folder}: holds no {name}, so it is not an adapter of this program")
    document = read_document(folder / META, dict[str, Any])
    meta = AdapterMeta.from_json(document, where=str(folder / META))
    check_file(folder / TENSORS, check_document(document, where=folder / META))
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{folder / TENSORS}: damaged or cut short ({error})") from None
    whole = frozenset(name for name in shapes if not name.endswith((".lora_A", ".lora_B")))
    return Adapter(folder, meta, {n: s for n, s in shapes.items() if n not in whole}, replaced=whole)


def check_flags(adapter: Adapter, given: Mapping[str, Any], *, flag: str = "--lora-load") -> None:
    """Raise UserError when a hyper-parameter the user typed (LoraConfig field names) contradicts the adapter's own."""
    for name, value in given.items():
        stored = getattr(adapter.meta.lora, name)
        same = set(stored) == set(value) if name == "target_modules" else stored == value
        if name == "dtype" and stored is None:
            continue
        if not same:
            spelling = name.replace("_", "-") if name.startswith("use") else "lora-" + name.replace("_", "-")
            raise UserError(
                f"--{spelling} {_show(value)} contradicts the adapter {flag} {adapter.folder}, "
                f"which was trained with {_show(stored)}: remove the flag"
            )


def check_resumable(adapter: Adapter) -> None:
    """Raise UserError when `adapter` comes from a program whose optimizer state is not read."""
    if adapter.origin:
        raise UserError(
            f"--lora-load {adapter.folder} is an adapter of {adapter.origin}, whose optimizer state is not read, so "
            "that run cannot be resumed; give --finetune to start a new run from its weights"
        )


def _show(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def base_fingerprint(config: ModelConfig, read: Callable[[str], Tensor]) -> str:
    """Identity of a base model: its dimensions and a hash of sampled rows of full tensors.

    Rows are hashed as bf16 and below `vocab_size`, so that layout, spelling, padding and a change of dtype keep it.

    Args:
        read: global Megatron name -> full tensor.
    """
    layers = sorted({0, config.num_layers // 2, config.num_layers - 1})
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    mlps = ["mlp"]
    if config.num_experts:
        mlps = [f"mlp.experts.local_experts.{expert}" for expert in sorted({0, config.num_experts - 1})]
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        names += [f"{prefix}self_attention.{linear}.weight" for linear in ("linear_qkv", "linear_proj")]
        names += [f"{prefix}{mlp}.{linear}.weight" for mlp in mlps for linear in ("linear_fc1", "linear_fc2")]
    digest = hashlib.sha256()
    dims = (config.num_layers, config.hidden_size, *config.mlp_sizes, config.num_attention_heads,
            config.num_query_groups, config.kv_channels, config.vocab_size)  # fmt: skip
    digest.update(repr(dims).encode())
    for name in names:
        tensor = read(name)
        rows = min(tensor.shape[0], config.vocab_size) if name.startswith("embedding") else tensor.shape[0]
        picked = torch.linspace(0, rows - 1, min(rows, 16), dtype=torch.float64).long()
        digest.update(name.encode())
        digest.update(tensor[picked].to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
