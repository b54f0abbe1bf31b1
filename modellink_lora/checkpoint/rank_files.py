"""Megatron rank files, `mp_rank_TT[_PPP]/model_optim_rng.pt`: any layout and spelling in, full tensors out, and back.

The same layout that Megatron-LM and ModelLink write, so that checkpoints travel both ways. Letters: t tensor parallel
size, p pipeline stage. docs/formats.md describes every file.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modellink_lora.checkpoint import dtypes, megatron_args
from modellink_lora.checkpoint.hf import copy_companions
from modellink_lora.checkpoint.names import to_legacy
from modellink_lora.checkpoint.rank_tree import FILE as FILE
from modellink_lora.checkpoint.rank_tree import RankTree, Shards, Spelling, open_tree, rank_file
from modellink_lora.checkpoint.store import iteration_folder, newest, read_tracker, replacing_folder, write_tracker
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of, guess_model_type
from modellink_lora.models.family import Family, TensorSpec
from modellink_lora.models.shapes import full_shape
from modellink_lora.parallel.partition import Partition

HF_FILES = "hf"  # folder below the checkpoint's root with config.json and tokenizer of the source model
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclasses.dataclass(frozen=True)
class RankFiles:
    """An opened checkpoint. Tensors stay on disk until read."""

    root: Path
    iteration: int | str
    args: argparse.Namespace
    config: ModelConfig
    dtype: torch.dtype
    _tree: RankTree

    @property
    def folder(self) -> Path:
        return self._tree.folder

    @property
    def tp(self) -> int:
        return self._tree.tp

    @property
    def partition(self) -> Partition:
        return self._tree.partition

    @property
    def spelling(self) -> Spelling:
        return self._tree.spelling

    @property
    def holds_adapter(self) -> bool:
        """Whether a LoRA adapter lies in the same files, as in ModelLink's mcore LoRA checkpoints."""
        return self._tree.holds_adapter

    @property
    def family(self) -> Family:
        return family_of(self.config.hf_model_type)

    def names(self) -> list[str]:
        """Global mcore names of the model's tensors; the last stage's copy of a tied embedding is not one."""
        return [spec.name for spec in self.family.tensors(self.config)]

    def read(self, name: str) -> Tensor:
        """The full tensor, vocabulary padded as in the file."""
        spec, shards = self._find(name)
        return spec.layout.gather(shards)

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        """Shard `rank` of `size`, whatever the checkpoint's own tensor parallel size."""
        spec, shards = self._find(name)
        return shards[rank] if size == self.tp else spec.layout.shard(spec.layout.gather(shards), rank, size)

    def _find(self, name: str) -> tuple[TensorSpec, list[Tensor]]:
        stage = self._tree.stage_of(name)
        return self.family.tensor(name, self.config), [self._tree.base[rank, stage][name] for rank in range(self.tp)]


def open_rank_files(root: Path, *, flag: str = "--load", model_flags: Mapping[str, Any] | None = None) -> RankFiles:
    """Open the newest checkpoint below `root`.

    Sizes, layout, spelling and dtype are taken from the tensors themselves, the rest from the stored args.

    Args:
        flag: the flag `root` was given by, for messages.
        model_flags: ModelConfig fields the user typed.
    Raises:
        UserError: no checkpoint, files missing, damaged or unsafe, tensors missing or left over, a flag contradicts it.
    """
    tree = open_tree(newest(root, flag=flag), flag=flag)
    return as_model(tree, root, read_tracker(root, flag=flag), flag=flag, model_flags=model_flags)


def as_model(
    tree: RankTree,
    root: Path,
    iteration: int | str,
    *,
    flag: str = "--load",
    model_flags: Mapping[str, Any] | None = None,
) -> RankFiles:
    """The base model of opened rank files; see `open_rank_files`."""
    folder = tree.folder
    if tree.args is None:
        raise UserError(f"{tree.file(0, 0)}: holds no args, so the model's dimensions are unknown")
    if tree.holds_adapter and not tree.holds_layers:
        raise UserError(
            f"{flag} {folder}: holds an adapter without the layers of its base: give the base to {flag} and this "
            "folder to --lora-load"
        )
    args = argparse.Namespace(**vars(tree.args))
    _check_tied_copy(args, tree)
    sizes = _measure(args, tree, model_flags)
    config = megatron_args.model_config(args, sizes, model_flags or {}, where=f"{flag} {root}")
    result = RankFiles(root, iteration, args, config, tree.base[0, 0][EMBEDDING].dtype, tree)
    _check_tensors(result)
    return result


def write_rank_files(
    root: Path,
    *,
    config: ModelConfig,
    tp: int,
    partition: Partition,
    spelling: Spelling,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    read_shard: Callable[[str, int, int], Tensor] | None = None,
    iteration: int | str = 1,
    hf_files: Path | None = None,
) -> Path:
    """Write a checkpoint, one rank file in memory at a time, and point the tracker at it when all is there.

    Args:
        read: global mcore name -> full tensor, vocabulary padded to `config.padded_vocab_size`.
        read_shard: (name, rank, size) -> the same tensor's shard, where that is cheaper than cutting the full one.
        hf_files: model folder whose config and tokenizer files are kept in `<root>/hf`.
    Returns:
        The folder of the iteration.
    """
    family = family_of(config.hf_model_type)
    specs = list(family.tensors(config))
    tied_copy = not config.untie_embeddings_and_output_weights and partition.stages > 1
    number = iteration if isinstance(iteration, int) else 0
    args = megatron_args.namespace(
        config, tp=tp, partition=partition, legacy=spelling == "legacy", dtype=dtype, iteration=number
    )
    target = iteration_folder(root, iteration)
    total = tp * (len(specs) + tied_copy)
    with replacing_folder(target) as temporary, tqdm(total=total, desc=f"writing {target}", unit="tensor") as bar:
        for stage in range(partition.stages):
            held = [(spec, spec.name) for spec in specs if partition.holds(spec.name, stage)]
            if tied_copy and stage == partition.stages - 1:
                held.append((family.tensor(EMBEDDING, config), HEAD))
            for rank in range(tp):
                model: dict[str, Any] = {}
                for spec, name in held:
                    if read_shard is not None:
                        shard = read_shard(spec.name, rank, tp)
                    else:
                        shard = spec.layout.shard(read(spec.name), rank, tp)
                    shard = dtypes.convert(shard, dtype, name=spec.name)
                    assert shard.shape == _shard_shape(spec, config, rank, tp), (spec.name, shard.shape)
                    # clone: a view would drag its whole storage into the file
                    shard = shard.clone(memory_format=torch.contiguous_format)
                    _put(model, partition.to_local(name, stage), shard, spelling, tied=tied_copy)
                    bar.update()
                path = rank_file(temporary, rank, stage, partition.stages)
                path.parent.mkdir()
                torch.save({"args": args, "checkpoint_version": 3.0, "iteration": number, "model": model}, path)
    if hf_files is not None and hf_files.resolve() != (root / HF_FILES).resolve():
        with replacing_folder(root / HF_FILES) as temporary:
            copy_companions(hf_files, temporary)
    write_tracker(root, iteration)
    return target


def _shard_shape(spec: TensorSpec, config: ModelConfig, rank: int, tp: int) -> torch.Size:
    """Raises ValueError when the tensor does not divide."""
    return spec.layout.shard(torch.empty(full_shape(spec.name, config), device="meta"), rank, tp).shape


def _put(model: dict[str, Any], name: str, tensor: Tensor, spelling: Spelling, *, tied: bool) -> None:
    path = (name,) if spelling == "mcore" else to_legacy(name, tied=tied)
    for key in path[:-1]:
        model = model.setdefault(key, {})
    model[path[-1]] = tensor


def _check_tied_copy(args: argparse.Namespace, tree: RankTree) -> None:
    """Drop the last stage's copy of a tied embedding after comparing it; decide tiedness where args are silent."""
    shards, stages = tree.base, tree.partition.stages
    has_head = HEAD in shards[0, stages - 1]
    if not hasattr(args, "untie_embeddings_and_output_weights"):
        args.untie_embeddings_and_output_weights = has_head and not _same_head(shards, 0, stages)
    if args.untie_embeddings_and_output_weights or not has_head:
        return
    for rank in range(tree.tp):
        if not _same_head(shards, rank, stages):
            raise UserError(
                f"{tree.folder}: args say the output layer is tied to the embedding, but the two differ on "
                f"tensor-parallel rank {rank}"
            )
        del shards[rank, stages - 1][HEAD]


def _same_head(shards: Shards, rank: int, stages: int) -> bool:
    embedding = shards[rank, 0].get(EMBEDDING)
    return embedding is not None and torch.equal(shards[rank, stages - 1][HEAD], embedding)


_LAYER = "decoder.layers.0."
_TOLD_BY = {  # ModelConfig field: the tensor that is there where it is set
    "add_qkv_bias": (_LAYER, "self_attention.linear_qkv.bias"),
    "add_dense_bias": (_LAYER, "self_attention.linear_proj.bias"),
    "add_mlp_bias": (_LAYER, "mlp.linear_fc1.bias"),
    "qk_layernorm": (_LAYER, "self_attention.q_layernorm.weight"),
    "post_norm": (_LAYER, "post_attn_norm.weight"),
    "embed_layernorm": ("", "embedding.word_embeddings.norm.weight"),
}


def _measure(args: argparse.Namespace, tree: RankTree, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """ModelConfig fields that the tensors tell by themselves. Only with a gate can they not tell which kind it is."""
    tensors, tp, folder = tree.base[0, 0], tree.tp, tree.folder
    layer = _LAYER
    need = {
        "embedding": EMBEDDING, "qkv": layer + "self_attention.linear_qkv.weight",
        "proj": layer + "self_attention.linear_proj.weight", "fc1": layer + "mlp.linear_fc1.weight",
        "fc2": layer + "mlp.linear_fc2.weight",
    }  # fmt: skip
    if missing := [name for name in need.values() if name not in tensors]:
        raise UserError(f"{folder}: lacks {missing[0]}, so it does not hold a whole model")
    embedding, qkv, proj, fc1, fc2 = (tuple(tensors[name].shape) for name in need.values())
    heads = getattr(args, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or proj[1] * tp % heads:
        raise UserError(
            f"{folder}: args.num_attention_heads {heads!r} does not divide the {proj[1] * tp} attention outputs"
        )
    head_dim = proj[1] * tp // heads
    gated, geglu = fc1[0] == 2 * fc2[1], bool(getattr(args, "geglu", False) or (flags or {}).get("geglu"))
    fields = {
        "num_layers": sum(tree.partition.counts),
        "hidden_size": embedding[1],
        "padded_vocab_size": embedding[0] * tp,
        "kv_channels": head_dim,
        "num_query_groups": (qkv[0] * tp // head_dim - heads) // 2,
        "ffn_hidden_size": fc2[1] * tp,
        "swiglu": gated and not geglu,
        "geglu": gated and geglu,
        "normalization": "LayerNorm" if layer + "input_layernorm.bias" in tensors else "RMSNorm",
        **{field: where + name in tensors for field, (where, name) in _TOLD_BY.items()},
        "params_dtype": dtypes.dtype_name(tensors[EMBEDDING].dtype, where=str(folder)),
    }
    if not isinstance(getattr(args, "vocab_size", None), int):
        fields["vocab_size"] = fields["padded_vocab_size"]  # ModelLink's training args leave it out
    said = getattr(args, "normalization", None) or fields["normalization"]
    if said != fields["normalization"]:
        bias = "has a" if said == "RMSNorm" else "lacks its"
        raise UserError(
            f"{folder}: args say normalization {said}, but {_LAYER}input_layernorm {bias} bias: files are mixed up"
        )
    if not hasattr(args, "hf_model_type"):
        fields["hf_model_type"] = guess_model_type({**vars(args), **(flags or {}), **fields})
    return fields


def _check_tensors(files: RankFiles) -> None:
    """Every tensor of the family is on its stage in the right shape, on every rank, and nothing is left over."""
    specs = {spec.name: spec for spec in files.family.tensors(files.config)}
    stages = {name: files._tree.stage_of(name) for name in specs}
    for (rank, stage), tensors in files._tree.base.items():
        where = files._tree.file(rank, stage)
        expected = {name for name in specs if stages[name] == stage}
        if missing := sorted(expected - tensors.keys()):
            raise UserError(f"{where}: lacks {len(missing)} tensors, e.g. {missing[0]}")
        if extra := sorted(tensors.keys() - expected):
            raise UserError(f"{where}: holds {len(extra)} tensors that the model does not have, e.g. {extra[0]}")
        for name in expected:
            try:
                shape = tuple(_shard_shape(specs[name], files.config, rank, files.tp))
            except ValueError:
                shape = ()
            if tuple(tensors[name].shape) != shape:
                raise UserError(
                    f"{where}: {name} has shape {tuple(tensors[name].shape)}, the model's dimensions make it {shape} "
                    f"at TP {files.tp}"
                )
