"""A folder in Meta's format read back as the Megatron tensors it was written from, checked by the writer's own tables.

A file holds no more than meta.py puts there: what it does not know (another tensor, another shape, another setting in
params.json) is refused, since nobody could say what it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.dtypes import DTYPES
from modellink_lora.checkpoint.meta import PARAMS, WEIGHTS, MetaLayout, MetaTensor, weights_file
from modellink_lora.checkpoint.unpickle import load_tensors
from modellink_lora.config.document import read_document
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import QKV, GateUp, halves

_CUT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
# settings of params.json that shapes tell better, or that only size Meta's buffers
_NOT_COMPUTED = {"vocab_size", "multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size"}


@dataclass(frozen=True)
class MetaWeights:
    """The weights of a folder as a model reads them.

    Args:
        files: of each rank, tensor by name.
    """

    root: Path
    layout: MetaLayout
    files: Sequence[Mapping[str, Tensor]]

    @cached_property
    def _made_of(self) -> dict[str, list[MetaTensor]]:
        return self.layout.by_source()

    def read(self, name: str) -> Tensor:
        """The full tensor of a global Megatron name. Raises UserError where the files contradict each other."""
        parts = self._made_of[name]
        full = self._fused(name, [self._whole(part) for part in parts])
        # the writer's way again: a norm that differs between ranks, or a head that is not the tied embedding, shows
        for part in parts:
            for rank, file in enumerate(self.files):
                if not torch.equal(torch.cat(list(part.blocks([part.pick(full, rank)], rank))), file[part.name]):
                    raise UserError(f"{self.root / weights_file(rank)}: {part.name} does not fit to the other tensors "
                                    f"that {name} is made of")  # fmt: skip
        return full

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        config = self.layout.config
        return family_of(config.hf_model_type).tensor(name, config).layout.shard(self.read(name), rank, size)

    def _whole(self, part: MetaTensor) -> Tensor:
        """A tensor of Meta's with what all ranks have of it."""
        pieces = [file[part.name] for file in self.files]
        if pieces[0].dim() == 1:  # a norm, which every rank has
            return pieces[0]
        return torch.cat(pieces, int(part.columns or part.name.endswith(_CUT_BY_COLUMNS)))

    def _fused(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        c = self.layout.config
        if name.endswith("linear_qkv.weight"):
            q, k, v = parts
            turned = halves(q, c.num_attention_heads), halves(k, c.num_query_groups), v
            return QKV(c.num_attention_heads, c.num_query_groups, c.kv_channels).fuse(turned)
        if name.endswith("linear_fc1.weight"):
            return GateUp().fuse(parts)
        return parts[0]


def open_meta(root: Path, config: ModelConfig, *, flag: str) -> MetaWeights:
    """The folder as weights of the model `config`, whose positions and tokens params.json does not tell.

    Raises:
        UserError: it is damaged, or of another model, or holds what this program does not write.
    """
    paths = sorted(root.glob(WEIGHTS))
    if not paths or not (root / PARAMS).is_file():
        raise UserError(f"{flag} {root}: holds no {weights_file(0)} with {PARAMS}; convert_ckpt.py "
                        "--save-model-type meta makes such a folder")  # fmt: skip
    if [path.name for path in paths] != [weights_file(rank) for rank in range(len(paths))]:
        raise UserError(f"{flag} {root}: holds {', '.join(path.name for path in paths)}, so files are missing")
    files = [load_tensors(path) for path in paths]
    if not all(files):
        raise UserError(f"{flag} {root}: {paths[[bool(file) for file in files].index(False)].name} holds no tensors")
    layout = MetaLayout(config, len(files), next(iter(files[0].values())).dtype)
    expected = {tensor.name: tensor for tensor in layout.tensors()}
    if odd := layout.odd():
        raise UserError(f"{flag} {root}: Meta's code does not compute what this {config.hf_model_type} model has, "
                        f"{', '.join(odd)}")  # fmt: skip
    _check_params(root, layout, flag)
    for path, file in zip(paths, files, strict=True):
        if different := sorted(expected.keys() ^ file.keys()):
            what = "unknown" if different[0] in file else "missing"
            raise UserError(f"{path}: {different[0]} is {what}; the files must hold what convert_ckpt.py "
                            "--save-model-type meta writes of this model")  # fmt: skip
        for name, tensor in file.items():
            if tuple(tensor.shape) != expected[name].shape or tensor.dtype not in DTYPES.values():
                raise UserError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}; "
                                f"{expected[name].shape} belongs to this model in {len(files)} files")  # fmt: skip
    return MetaWeights(root, layout, files)


def _check_params(root: Path, layout: MetaLayout, flag: str) -> None:
    """That Meta's code would compute with these settings what our model computes."""
    found = read_document(root / PARAMS, dict[str, Any])
    defaults = {"n_kv_heads": found.get("n_heads"), "rope_theta": 10000.0, "use_scaled_rope": False}
    wanted = {**defaults, "n_kv_heads": layout.config.num_query_groups, **layout.params()}
    for name in sorted({*found, *wanted} - _NOT_COMPUTED):
        said = found.get(name, defaults.get(name))
        if name not in wanted or said != wanted[name]:
            here = f"the model has {wanted[name]}" if name in wanted else "this program does not know what that changes"
            raise UserError(f"{flag} {root}: {PARAMS} says {name} {said}, {here}")
