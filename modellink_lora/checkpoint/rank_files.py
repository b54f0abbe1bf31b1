"""Megatron rank files, `mp_rank_TT[_PPP]/model_optim_rng.pt`: any layout and spelling in, full tensors out.

The same layout that Megatron-LM and ModelLink write; `rank_writer.py` is the way back. docs/formats.md describes every
file.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint import dtypes, megatron_args
from modellink_lora.checkpoint.rank_tree import EMBEDDING, HEAD, RankTree, Shards, Spelling, open_tree, shard_shape
from modellink_lora.checkpoint.rank_tree import FILE as FILE
from modellink_lora.checkpoint.rank_tree import HF_FILES as HF_FILES
from modellink_lora.checkpoint.store import newest, read_tracker
from modellink_lora.checkpoint.stored import Stored
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of, guess_model_type
from modellink_lora.models.family import Family, TensorSpec
from modellink_lora.models.layouts import Replicated
from modellink_lora.parallel.partition import Partition


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
    def ep(self) -> int:
        return self._tree.ep

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

    @property
    def dropped(self) -> Mapping[str, str]:
        """What the files hold besides the model -> why it is not used."""
        held = {"*.lora_A, *.lora_B": "an adapter beside the base"} if self.holds_adapter else {}
        return {**self._tree.dropped, **held}

    def held(self) -> Iterator[str]:
        """Every stored tensor of the model, as `<rank folder>/<global name>`."""
        for (rank, stage), tensors in self._tree.base.items():
            yield from (f"{self._tree.file(rank, stage, name).parent.name}/{name}" for name in tensors)

    def keys(self, name: str) -> tuple[str, ...]:
        """Which of `held` make the tensor of global name `name`."""
        stage = self._tree.stage_of(name)
        return tuple(f"{self._tree.file(rank, stage, name).parent.name}/{name}" for rank in range(self.tp))

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

    def stored(self, name: str) -> Stored:
        """What `read` puts together, each shard where it lies."""
        spec, shards = self._find(name)
        return Stored(shards, spec.layout, spec.layout.gather)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that holds what every shard of this tensor has."""
        return dtypes.widest(shard.dtype for shard in self._find(name)[1])

    def copies(self, name: str, rank: int) -> Iterator[Tensor]:
        """What expert-parallel ranks above 0 hold in the place of the shard `rank` of `name`."""
        for (held_by, _, _), tensors in self._tree.copies.items():
            if held_by == rank and name in tensors:
                yield tensors[name]

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
    if _check_tied_copy(args, tree):
        reason = "the last stage's copy of the tied embedding, equal to it"
        tree = dataclasses.replace(tree, dropped={**tree.dropped, HEAD: reason})
    sizes = _measure(args, tree, model_flags)
    config = megatron_args.model_config(args, sizes, model_flags or {}, where=f"{flag} {root}")
    result = RankFiles(root, iteration, args, config, tree.base[0, 0][EMBEDDING].dtype, tree)
    _check_tensors(result)
    _check_copies(result)
    return result


def _check_tied_copy(args: argparse.Namespace, tree: RankTree) -> bool:
    """Drop the last stage's copy of a tied embedding after comparing it; decide tiedness where args are silent.

    Returns whether there was one.
    """
    shards, stages = tree.base, tree.partition.stages
    has_head = HEAD in shards[0, stages - 1]
    if not hasattr(args, "untie_embeddings_and_output_weights"):
        args.untie_embeddings_and_output_weights = has_head and not _same_head(shards, 0, stages)
    if args.untie_embeddings_and_output_weights or not has_head:
        return False
    for rank in range(tree.tp):
        if not _same_head(shards, rank, stages):
            raise UserError(
                f"{tree.folder}: args say the output layer is tied to the embedding, but the two differ on "
                f"tensor-parallel rank {rank}"
            )
        del shards[rank, stages - 1][HEAD]
    return True


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
    layer, expert = _LAYER, "mlp.experts.local_experts.0." if f"{_LAYER}mlp.router.weight" in tensors else "mlp."
    need = {
        "embedding": EMBEDDING, "qkv": layer + "self_attention.linear_qkv.weight",
        "proj": layer + "self_attention.linear_proj.weight",
        "fc1": f"{layer}{expert}linear_fc1.weight", "fc2": f"{layer}{expert}linear_fc2.weight",
    }  # fmt: skip
    if missing := [name for name in need.values() if name not in tensors]:
        raise UserError(f"{folder}: lacks {missing[0]}, so it does not hold a whole model")
    experts = (f"{_LAYER}mlp.{name}.weight" for name in ("router", "shared_experts.linear_fc2"))
    if odd := [name for name in (*need.values(), *experts) if name in tensors and tensors[name].dim() != 2]:
        raise UserError(f"{folder}: {odd[0]} has the shape {tuple(tensors[odd[0]].shape)}, expected two dimensions")
    embedding, qkv, proj, fc1, fc2 = (tuple(tensors[name].shape) for name in need.values())
    heads = getattr(args, "num_attention_heads", None)
    if type(heads) is not int or heads < 1 or proj[1] * tp % heads:
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
        **_measure_experts(args, tree, width=fc2[1] * tp),
        "swiglu": gated and not geglu,
        "geglu": gated and geglu,
        "normalization": "LayerNorm" if layer + "input_layernorm.bias" in tensors else "RMSNorm",
        **{field: where + name in tensors for field, (where, name) in _TOLD_BY.items()},
        "params_dtype": dtypes.dtype_name(tensors[EMBEDDING].dtype, where=str(folder)),
    }
    if getattr(args, "vocab_size", None) is None:
        fields["vocab_size"] = fields["padded_vocab_size"]  # ModelLink's training args leave it out
    rows = getattr(args, "padded_vocab_size", None)
    if rows is not None and rows != fields["padded_vocab_size"]:
        raise UserError(
            f"{folder}: args say padded_vocab_size {rows!r}, the embedding {list(embedding)} at TP {tp} has "
            f"{fields['padded_vocab_size']} rows: files are mixed up, or were edited"
        )
    said = getattr(args, "normalization", None)
    if said not in (None, fields["normalization"]):
        bias = "has a" if said == "RMSNorm" else "lacks its"
        raise UserError(
            f"{folder}: args say normalization {said}, but {_LAYER}input_layernorm {bias} bias: files are mixed up"
        )
    if not hasattr(args, "hf_model_type"):
        fields["hf_model_type"] = guess_model_type({**vars(args), **(flags or {}), **fields})
    return fields


def _measure_experts(args: argparse.Namespace, tree: RankTree, *, width: int) -> dict[str, Any]:
    """Sizes of the MLPs; `width` is that of one expert, or of the MLP where there are none."""
    tensors, said = tree.base[0, 0], getattr(args, "num_experts", None)
    router, shared = (tensors.get(f"{_LAYER}mlp.{name}.weight") for name in ("router", "shared_experts.linear_fc2"))
    experts = router.shape[0] if router is not None else 0
    if (0 if said is None else said) != experts:
        raise UserError(f"{tree.folder}: args say num_experts {said!r}, {_LAYER}mlp.router has {experts} rows")
    if not experts:
        sizes: dict[str, Any] = {"ffn_hidden_size": width, "moe_ffn_hidden_size": 0}
    else:
        sizes = {"moe_ffn_hidden_size": width}
    return sizes | {
        "num_experts": experts,
        "moe_shared_expert_intermediate_size": shared.shape[1] * tree.tp if shared is not None else 0,
        "moe_shared_expert_gate": f"{_LAYER}mlp.shared_expert_gate.weight" in tensors,
    }


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
                shape = tuple(shard_shape(specs[name], files.config, rank, files.tp))
            except ValueError:
                shape = ()
            if tuple(tensors[name].shape) != shape:
                raise UserError(
                    f"{where}: {name} has shape {tuple(tensors[name].shape)}, the model's dimensions make it {shape} "
                    f"at TP {files.tp}"
                )


def _check_copies(files: RankFiles) -> None:
    """What every tensor-parallel rank keeps a copy of (norms, biases behind a sum) is the same on all of them."""
    for spec in files.family.tensors(files.config):
        if type(spec.layout) is not Replicated:
            continue
        stage = files._tree.stage_of(spec.name)
        first, *others = (files._tree.base[rank, stage][spec.name] for rank in range(files.tp))
        for rank, copy in enumerate(others, 1):
            if not torch.equal(first, copy):
                raise UserError(
                    f"{files.folder}: the copies of {spec.name} on tensor-parallel ranks 0 and {rank} differ: files of "
                    "different checkpoints are mixed up, or the run that wrote them was out of step"
                )
