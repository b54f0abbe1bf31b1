"""A model family as data: its Hugging Face names, the layout of each tensor, and how its config.json is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import check_keys
from modellink_lora.models.layouts import QKV, Layout, Vocab

_LAYER, _EXPERT = re.compile(r"(?<=decoder\.layers\.)\d+"), re.compile(r"(?<=\.local_experts\.)\d+")
_BRACES = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True)
class TensorRow:
    """One Megatron tensor, the Hugging Face tensors it is made of (`{q,k,v}` lists them), its layout.

    In names `*` stands for the layer and `#` for the expert.
    """

    name: str
    layout: type[Layout]
    hf: str
    when: str | None = None  # the row exists when this ModelConfig field is true


@dataclass(frozen=True)
class TensorSpec:
    """A `TensorRow` of one concrete layer of one concrete model."""

    name: str
    layout: Layout
    hf: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture under its names.

    Attributes:
        name: the `--model-type-hf` spelling; `aliases` are further ones.
        hf_model_types: `model_type`s of config.json that it reads.
        read: the ModelConfig of a config.json, of which `keys` are read besides those that every family reads.
        optional_prefix: of Hugging Face names, left out in some published checkpoints.
    """

    name: str
    hf_model_types: tuple[str, ...]
    rows: tuple[TensorRow, ...]
    read: Callable[[dict[str, Any]], ModelConfig]
    keys: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    optional_prefix: str = ""

    @property
    def spellings(self) -> tuple[str, ...]:
        """What `--model-type-hf` may say for it."""
        return tuple(dict.fromkeys((self.name, *self.aliases, *self.hf_model_types)))

    def read_config(self, document: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """The settings that a config.json says.

        Raises:
            UserError: beginning with `where`: a key is missing, of another type, or asks for what is not computed here.
        """
        check_keys(document, self.keys, where=where)
        try:
            return self.read(dict(document))
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('config.json: ')}") from None

    def tensors(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """Every tensor of a model of this family, embedding first, layer by layer, head last."""
        per_layer = [row for row in self.rows if "*" in row.name]
        present = [row for row in self.rows if row.when is None or getattr(config, row.when)]
        first = [row for row in present if row.name.startswith("embedding.")]
        yield from (_concrete(row, config, None) for row in first)
        for layer in range(config.num_layers):
            for row in present:
                if row in per_layer:
                    experts = range(config.num_experts) if "#" in row.name else (None,)
                    yield from (_concrete(row, config, layer, expert) for expert in experts)
        yield from (_concrete(row, config, None) for row in present if row not in per_layer and row not in first)

    def tensor(self, name: str, config: ModelConfig) -> TensorSpec:
        """The tensor of global Megatron name `name`; KeyError when this family has none."""
        layer, expert = _number(_LAYER, name), _number(_EXPERT, name)
        pattern = _EXPERT.sub("#", _LAYER.sub("*", name))
        if expert is not None and expert >= config.num_experts:
            raise KeyError(name)
        for row in self.rows:
            if row.name == pattern and (row.when is None or getattr(config, row.when)):
                return _concrete(row, config, layer, expert)
        raise KeyError(name)


def bind(layout: type[Layout], config: ModelConfig) -> Layout:
    """A layout of this model: the sizes it needs, taken from `config`."""
    if issubclass(layout, QKV):
        return layout(config.num_attention_heads, config.num_query_groups, config.kv_channels)
    if layout is Vocab:
        return Vocab(config.vocab_size, config.padded_vocab_size)
    return layout()


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.search(name)
    return int(match[0]) if match else None


def _concrete(row: TensorRow, config: ModelConfig, layer: int | None, expert: int | None = None) -> TensorSpec:
    def fill(text: str) -> str:
        text = text if layer is None else text.replace("*", str(layer))
        return text if expert is None else text.replace("#", str(expert))

    return TensorSpec(fill(row.name), bind(row.layout, config), tuple(fill(name) for name in _expand(row.hf)))


def _expand(template: str) -> list[str]:
    """`a.{q,k}.b` -> ["a.q.b", "a.k.b"]"""
    match = _BRACES.search(template)
    return [template] if not match else [template.replace(match.group(0), part) for part in match.group(1).split(",")]
