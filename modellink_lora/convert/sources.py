"""What a conversion reads: a Hugging Face folder, a Megatron checkpoint, an adapter, all as full Megatron tensors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from modellink_lora.adapters.targets import resolve_targets
from modellink_lora.checkpoint.adapter import Adapter, base_fingerprint, check_flags
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.hf import HfModel, read_config_json
from modellink_lora.checkpoint.megatron_args import names_its_model
from modellink_lora.checkpoint.megatron_dist import open_megatron
from modellink_lora.checkpoint.rank_files import HF_FILES, RankFiles
from modellink_lora.checkpoint.stored import Stored
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.data.templates import get_template
from modellink_lora.models.families import FAMILIES, check_name, family_of, has_its_tensors
from modellink_lora.models.family import Family, TensorSpec


class Files(Protocol):
    """Opened model files of any format, as far as an inventory needs them."""

    @property
    def dropped(self) -> Mapping[str, str]: ...
    def held(self) -> Iterator[str]: ...
    def keys(self, name: str) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Inventory:
    """Every tensor of the source, so that none is used twice or forgotten."""

    held: Counter[str]  # stored tensors of the model
    keys: Callable[[str], tuple[str, ...]]  # global name -> those of `held` that make it
    dropped: Mapping[str, str]  # other things in the files -> why they are not used

    @classmethod
    def of(cls, files: Files) -> Inventory:
        return cls(Counter(files.held()), files.keys, files.dropped)

    def check(self, names: Iterable[str]) -> None:
        """That making the tensors `names` uses every stored tensor exactly once."""
        used = Counter(key for name in names for key in self.keys(name))
        assert used == self.held, f"used and held differ: {list((used - self.held) + (self.held - used))[:3]}"


@dataclass(frozen=True)
class Source:
    """The model to convert."""

    config: ModelConfig
    family: Family
    dtype: torch.dtype
    read: Callable[[str], Tensor]  # global Megatron name -> full tensor
    files: RankFiles | None  # None: a Hugging Face folder
    notes: tuple[str, ...] = ()
    # the same tensor as its parts on disk; absent where a source knows full tensors only
    parts: Callable[[str], Stored] | None = None
    inventory: Inventory | None = None

    def stored(self, name: str) -> Stored:
        """The tensor of global name `name` as its parts, of which only what is looked at is read."""
        if self.parts is not None:
            return self.parts(name)
        return Stored([self.read(name)], self.family.tensor(name, self.config).layout, lambda parts: parts[0])

    def dtypes(self, spec: TensorSpec) -> tuple[torch.dtype, ...]:
        """Of each Hugging Face tensor that a tensor is made of; the same for all where the source has them as one."""
        if self.files is not None:
            return (self.files.dtype_of(spec.name),) * len(spec.hf)
        found = tuple(part.dtype for part in self.stored(spec.name).parts)
        return found[: len(spec.hf)]  # with --resize-vocab the made-up rows are a part as well

    def under(self, adapter: Adapter | None) -> Callable[[str], Stored]:
        """`stored` with the tensors that `adapter` replaces as a whole."""
        if adapter is None or not adapter.replaced:
            return self.stored

        def stored(name: str) -> Stored:
            if name not in adapter.replaced:
                return self.stored(name)
            layout = self.family.tensor(name, self.config).layout
            return Stored([adapter.stored(name)], layout, lambda parts: layout.fuse(parts))

        return stored

    def is_known(self, convert: ConvertConfig) -> bool:
        """Whether all settings of `config` are, from config.json or from files of this program."""
        return self.files is None or names_its_model(self.files.args) or self.companions(convert) is not None

    def companions(self, convert: ConvertConfig) -> Path | None:
        """Folder with config.json and tokenizer files of this model, if there is one."""
        assert convert.load_dir is not None
        load = Path(convert.load_dir)
        candidates = [load] if self.files is None else [load / HF_FILES, Path(convert.save_dir)]
        return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def open_source(convert: ConvertConfig) -> Source:
    """Open `--load-dir`. Raises UserError when it is damaged, incomplete or contradicts a flag."""
    assert convert.load_dir is not None
    path = Path(convert.load_dir)
    if convert.source == "hf":
        model = HfModel(path, resize_vocab=convert.resize_vocab)
        if convert.model_type_hf:
            check_name(convert.model_type_hf, model.family, where=f"{path / 'config.json'}")
        source = Source(
            model.config,
            model.family,
            model.dtype,
            model.read,
            None,
            _resized(model),
            model.stored,
            Inventory.of(model),
        )
    else:
        files = open_megatron(path, flag="--load-dir")
        source = Source(
            files.config, files.family, files.dtype, files.read, files, _spelling_notes(convert, files), files.stored,
            Inventory.of(files),
        )  # fmt: skip
        source = _with_model_files(source, source.companions(convert))
        if source.companions(convert) is None:
            source = _with_name(source, convert.model_type_hf)
        if convert.model_type_hf:
            check_name(convert.model_type_hf, source.family, where=f"--load-dir {path}")
    if convert.w_pack is not None:
        qkv = source.family.tensor("decoder.layers.0.self_attention.linear_qkv.weight", source.config).hf
        packed, said = len(qkv) == 1, convert.w_pack.lower() == "true"
        if packed != said and (said or "W_pack" in qkv[0]):
            raise UserError(
                f"--w-pack {convert.w_pack} contradicts --load-dir {path}, a {source.family.hf_model_types[0]} model, "
                f"which has q, k and v in {len(qkv)} tensor{'s' * (not packed)}: remove the flag"
            )
    _check_interleaving(convert, source)
    for name in ("add_qkv_bias", "add_dense_bias", "embed_layernorm", "post_norm"):
        if getattr(convert, name) and not getattr(source.config, name):
            raise UserError(
                f"--{name.replace('_', '-')} contradicts --load-dir {path}, a {source.family.hf_model_types[0]} model "
                "without it: remove the flag"
            )
    return source


def _resized(model: HfModel) -> tuple[str, ...]:
    """What --resize-vocab did to the rows."""
    said = {True: "the last {} are cut off", False: "{} are added, each the mean of those that were there"}
    return tuple(
        f"{name} had {before} rows and gets {after}: {said[before > after].format(abs(before - after))}"
        for name, (before, after) in model.resized.items()
    )


def _check_interleaving(convert: ConvertConfig, source: Source) -> None:
    if not convert.tells_interleaving:
        return
    assert source.files is not None
    said, where = convert.num_layers_per_virtual_pipeline_stage, source.files.partition
    if where.chunks == 1 or {*where.counts} != {said}:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {said} contradicts --load-dir {convert.load_dir}, whose stages "
            f"hold {where.describe()} layers: remove the flag"
        )


def _spelling_notes(convert: ConvertConfig, files: RankFiles) -> tuple[str, ...]:
    """Flags that say the names are of the other spelling than the tensors show; the tensors are right."""
    if convert.load_from_legacy and files.spelling == "mcore":
        raise UserError(
            f"--load-from-legacy contradicts --load-dir {files.root}, which holds mcore names: remove the flag"
        )
    if convert.use_mcore_models and files.spelling == "legacy" and not convert.load_from_legacy:
        return (f"{files.root} holds legacy names although --use-mcore-models was given; the result gets mcore names",)
    if (
        files.spelling == "mcore"
        and not (convert.use_mcore_models or convert.save_to_legacy)
        and convert.target == "mg"
    ):
        return (f"{files.root} holds mcore names, so the result does too; --save-to-legacy would change that",)
    return ()


def _with_model_files(source: Source, folder: Path | None) -> Source:
    """`source` with what only config.json knows (model type, vocabulary), after comparing what both know.

    A file that another program wrote does not name its model type and may not know its vocabulary.
    """
    if folder is None:
        return source
    document = read_config_json(folder, flag="--save-dir")
    family = family_of(str(document.get("model_type")))
    said, held = family.read_config(document, where=str(folder / "config.json")), source.config
    mlp = ["num_experts", "ffn_hidden_size"]
    if held.num_experts:  # the width of an MLP without experts is of no tensor then
        mlp[1:] = ["moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"]
    for name in (
        "num_layers", "hidden_size", *mlp, "num_attention_heads", "num_query_groups", "kv_channels",
        "untie_embeddings_and_output_weights", "add_qkv_bias", "add_dense_bias", "add_mlp_bias", "qk_layernorm",
        "normalization", "gated", "embed_layernorm", "post_norm",
    ):  # fmt: skip
        if getattr(said, name) != getattr(held, name):
            raise UserError(
                f"{folder / 'config.json'} says {name} {getattr(said, name)}, the weights have {getattr(held, name)}: "
                "it belongs to another model"
            )
    if said.vocab_size > held.padded_vocab_size:
        raise UserError(
            f"{folder / 'config.json'} says vocab_size {said.vocab_size}, the embedding has only "
            f"{held.padded_vocab_size} rows"
        )
    assert source.files is not None
    if names_its_model(source.files.args):
        if said.vocab_size != held.vocab_size:
            raise UserError(
                f"{folder / 'config.json'} says vocab_size {said.vocab_size}, the checkpoint {held.vocab_size}, of "
                f"{held.padded_vocab_size} rows with padding: it belongs to another model"
            )
        config = dataclasses.replace(held, vocab_size=said.vocab_size, hf_model_type=said.hf_model_type)
    else:  # what tensors cannot tell (positions, scales, activation) is the document's to say
        config = dataclasses.replace(
            said, padded_vocab_size=held.padded_vocab_size, params_dtype=held.params_dtype,
            make_vocab_size_divisible_by=held.make_vocab_size_divisible_by,
        )  # fmt: skip
    return dataclasses.replace(source, config=config, family=family)


def _with_name(source: Source, model_type_hf: str | None) -> Source:
    """`source` as a model of the family the user names, where its files name none and its tensors allow it."""
    assert source.files is not None
    known = model_type_hf is None or names_its_model(source.files.args)
    if known or model_type_hf in source.family.spellings:
        return source
    for family in FAMILIES:
        config = dataclasses.replace(source.config, hf_model_type=family.hf_model_types[0])
        if model_type_hf in family.spellings and has_its_tensors(config):
            return dataclasses.replace(source, config=config, family=family)
    return source


def open_merge(
    convert: ConvertConfig, lora_flags: Mapping[str, Any], base: Callable[[], ModelConfig] | None
) -> Adapter | None:
    """The adapter of `--lora-load`, checked against the LoRA flags the user typed; None without the flag.

    Args:
        base: dimensions of the model to convert, for adapters that do not tell them.
    """
    if convert.lora_load is None:
        if lora_flags:
            fields = (field for field in dataclasses.fields(LoraConfig) if field.name in lora_flags)
            names = " ".join("--" + field.metadata.get("name", field.name) for field in fields)
            raise UserError(f"{names} without --lora-load: name the adapter to merge, or remove the LoRA flags")
        return None
    given = dict(lora_flags)
    if "target_modules" in given:
        given["target_modules"] = resolve_targets(given["target_modules"])
    replacing = convert.target not in ("adapter-ranks", "gguf-adapter") and convert.verify_logits is None
    adapter = open_adapter(Path(convert.lora_load), base=base, given=given, replacing=replacing)
    check_flags(adapter, given)
    return _with_template(adapter, convert.prompt_type)


def _with_template(adapter: Adapter, prompt_type: str | None) -> Adapter:
    """`adapter` with the template that the user names for it."""
    if prompt_type is None:
        return adapter
    own, name = adapter.meta.prompt_type, get_template(prompt_type).name
    if own not in (None, name):
        raise UserError(
            f"--prompt-type {name} contradicts --lora-load {adapter.folder}, which was trained with {own}: "
            "remove the flag"
        )
    return dataclasses.replace(adapter, meta=dataclasses.replace(adapter.meta, prompt_type=name))


def check_base(source: Source, adapter: Adapter, convert: ConvertConfig) -> tuple[str, ...]:
    """Notes on an adapter whose base is unknown. Raises UserError when it was trained on another base."""
    if adapter.meta.base_fingerprint is None:
        return (f"{adapter.folder} does not say which base it was trained on; shapes fit, the rest is up to you",)
    # padding is not part of a model's identity, but a base of another program may have counted it as vocabulary
    rows = min(adapter.meta.model.vocab_size, source.config.padded_vocab_size)
    config = dataclasses.replace(source.config, vocab_size=rows)
    if base_fingerprint(config, source.read) != adapter.meta.base_fingerprint:
        raise UserError(
            f"--lora-load {convert.lora_load} was trained on another base than --load-dir {convert.load_dir}: "
            "their fingerprints differ; give the base that the adapter was trained on"
        )
    return ()
