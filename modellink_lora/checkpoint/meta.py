"""Folders as Meta's Llama code loads them: params.json and one consolidated.NN.pth for each model-parallel rank.

Letters: n query heads, g key/value heads, d head width, m model-parallel size.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.filling import Job, Tick, fill, ticking
from modellink_lora.checkpoint.outfile import OutFile
from modellink_lora.checkpoint.store import replacing_set
from modellink_lora.checkpoint.torch_file import put_checksums, torch_file
from modellink_lora.checkpoint.unpickle import load_tensors
from modellink_lora.config.document import to_json
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import QKV, Column, GateUp, Row, neighbours

PARAMS, TOKENIZER, WEIGHTS = "params.json", "tokenizer.model", "consolidated.*.pth"
_EMBEDDING, _NORM, _HEAD = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
# What Meta's code computes itself where params.json says use_scaled_rope; no file can change it.
_SCALED_ROPE = {"rope_scaling_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip
_LLAMA_3_VOCABULARY = 100_000  # Llama 1, 2 and Code Llama have 32 thousand tokens, Llama 3.x 128 thousand


@dataclass(frozen=True)
class MetaTensor:
    """One tensor of Meta's: what it is of which Megatron tensor."""

    name: str
    source: str  # global Megatron name
    shape: tuple[int, ...]  # on one rank
    pick: Callable[[Tensor, int], Tensor]  # (full Megatron tensor, rank) -> its rows, or columns of a linear cut so
    columns: bool = False  # of the rows picked each rank has its own columns

    def blocks(self, rows: Iterable[Tensor], rank: int) -> Iterator[Tensor]:
        """`rows`, which `pick` has chosen, as this rank's file holds them."""
        width = self.shape[-1]
        for block in rows:
            yield block[:, rank * width : (rank + 1) * width] if self.columns else block


@dataclass(frozen=True)
class MetaLayout:
    """What the files of one folder hold."""

    config: ModelConfig  # without padding of the vocabulary
    size: int  # m
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of Megatron tensors by name, else `dtype`

    def dtype_of(self, tensor: MetaTensor) -> torch.dtype:
        return self.dtypes.get(tensor.source, self.dtype)

    @property
    def is_llama_3(self) -> bool:
        """Whether it is for Llama 3's code, which cuts the embedding by tokens; that of Llama 1 and 2 by channels."""
        return self.config.rope_scaling_type is not None or self.config.vocab_size >= _LLAMA_3_VOCABULARY

    def odd(self) -> list[str]:
        """What Meta's code does not compute of this model, or has no tensor for."""
        c = self.config
        odd = c.beyond_llama()
        odd += [f"{name} {getattr(c, name)}" for name in ("normalize_head", "sliding_window") if getattr(c, name)]
        if c.kv_channels * c.num_attention_heads != c.hidden_size:
            odd.append(f"heads of width {c.kv_channels} (it divides the hidden size by the number of heads)")
        if c.query_pre_attn_scalar not in (0, c.kv_channels):
            odd.append(f"query_pre_attn_scalar {c.query_pre_attn_scalar:g}")
        if c.rope_scaling_type not in (None, "llama3"):
            odd.append(f"rope_scaling_type {c.rope_scaling_type}")
        elif c.rope_scaling_type:
            odd += [f"{name} {getattr(c, name):g} (it has {value:g})"
                    for name, value in _SCALED_ROPE.items() if getattr(c, name) != value]  # fmt: skip
        known = {tensor.source for tensor in self.tensors()}
        held = [spec.name for spec in family_of(c.hf_model_type).tensors(c)]
        return odd + [f"a tensor {name}" for name in held if name not in known][:1]

    def check(self) -> None:
        """Raise UserError when Meta's code would compute another function, or cannot cut the model so."""
        c = self.config
        if odd := self.odd():
            raise UserError(
                f"--save-model-type meta: Meta's Llama code does not compute what this {c.hf_model_type} model has, "
                f"{', '.join(odd)}: choose mg or hf"
            )
        for what, count in (
            ("attention heads", c.num_attention_heads), ("query groups", c.num_query_groups),
            ("ffn rows", c.ffn_hidden_size), ("tokens of the vocabulary", c.vocab_size),
            ("hidden channels", c.hidden_size),
        ):  # fmt: skip
            if count % self.size:
                raise UserError(
                    f"--target-tensor-parallel-size {self.size} does not divide the {count} {what} of this model, as "
                    "Meta's code asks: choose another size"
                )

    def params(self) -> dict[str, Any]:
        """params.json: only keys that the code this is for knows, since it refuses others."""
        c = self.config
        params: dict[str, Any] = {"dim": c.hidden_size, "n_layers": c.num_layers, "n_heads": c.num_attention_heads}
        if self.is_llama_3 or c.num_query_groups != c.num_attention_heads:
            params["n_kv_heads"] = c.num_query_groups
        params |= {"vocab_size": c.vocab_size, "norm_eps": c.norm_epsilon, **ffn_params(c)}
        if self.is_llama_3 or c.rotary_base != 10000:
            params["rope_theta"] = c.rotary_base
        if c.rope_scaling_type:
            params["use_scaled_rope"] = True
        return params

    def tensors(self) -> Iterator[MetaTensor]:
        """Every tensor of one rank's file, in its order."""
        c, m = self.config, self.size
        h, f = c.hidden_size, c.ffn_hidden_size // m
        q, kv, vocab = c.query_width // m, c.kv_width // m, c.vocab_size // m
        heads, groups = c.num_attention_heads, c.num_query_groups
        qkv, halves = QKV(heads, groups, c.kv_channels), GateUp()

        def rows(take: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
            return lambda full, rank: Column().shard(take(full), rank, m)

        def columns(full: Tensor, rank: int) -> Tensor:
            return Row().shard(full, rank, m)

        def whole(full: Tensor, rank: int) -> Tensor:
            return full

        def tokens(full: Tensor) -> Tensor:
            return full[: c.vocab_size]

        if self.is_llama_3:
            yield MetaTensor("tok_embeddings.weight", _EMBEDDING, (vocab, h), rows(tokens))
        else:
            yield MetaTensor(
                "tok_embeddings.weight", _EMBEDDING, (c.vocab_size, h // m), lambda full, rank: tokens(full), True
            )
        for layer in range(c.num_layers):
            ours, meta = f"decoder.layers.{layer}.", f"layers.{layer}."
            of_qkv, of_fc1 = f"{ours}self_attention.linear_qkv.weight", f"{ours}mlp.linear_fc1.weight"
            of_proj, of_fc2 = f"{ours}self_attention.linear_proj.weight", f"{ours}mlp.linear_fc2.weight"
            yield from (
                MetaTensor(f"{meta}attention.wq.weight", of_qkv, (q, h),
                           rows(lambda full: neighbours(qkv.split(full)[0], heads))),
                MetaTensor(f"{meta}attention.wk.weight", of_qkv, (kv, h),
                           rows(lambda full: neighbours(qkv.split(full)[1], groups))),
                MetaTensor(f"{meta}attention.wv.weight", of_qkv, (kv, h), rows(lambda full: qkv.split(full)[2])),
                MetaTensor(f"{meta}attention.wo.weight", of_proj, (h, q), columns),
                MetaTensor(f"{meta}feed_forward.w1.weight", of_fc1, (f, h), rows(lambda full: halves.split(full)[0])),
                MetaTensor(f"{meta}feed_forward.w2.weight", of_fc2, (h, f), columns),
                MetaTensor(f"{meta}feed_forward.w3.weight", of_fc1, (f, h), rows(lambda full: halves.split(full)[1])),
                MetaTensor(f"{meta}attention_norm.weight", f"{ours}input_layernorm.weight", (h,), whole),
                MetaTensor(f"{meta}ffn_norm.weight", f"{ours}pre_mlp_layernorm.weight", (h,), whole),
            )  # fmt: skip
        yield MetaTensor("norm.weight", _NORM, (h,), whole)
        # a tied output layer has no tensor of its own, which Meta's code wants all the same
        head = _HEAD if c.untie_embeddings_and_output_weights else _EMBEDDING
        yield MetaTensor("output.weight", head, (vocab, h), rows(tokens))

    def by_source(self) -> dict[str, list[MetaTensor]]:
        """Global Megatron name -> the tensors made of it."""
        found: dict[str, list[MetaTensor]] = {}
        for tensor in self.tensors():
            found.setdefault(tensor.source, []).append(tensor)
        return found

    def places(self) -> dict[str, tuple[str, ...]]:
        """Global Megatron name -> every place of it in the files."""
        return {
            name: tuple(f"{weights_file(rank)}/{tensor.name}" for tensor in tensors for rank in range(self.size))
            for name, tensors in self.by_source().items()
        }

    def total_bytes(self) -> int:
        return self.size * sum(torch.Size(t.shape).numel() * self.dtype_of(t).itemsize for t in self.tensors())


def ffn_params(config: ModelConfig) -> Mapping[str, Any]:
    """multiple_of, and ffn_dim_multiplier if need be, from which Meta's code gets the width of the MLP.

    With multiple_of 1 there is always a multiplier that does.
    """
    sizes = (256, 128, 64, 32, 16, 8, 4, 2, 1)
    wanted, plain = config.ffn_hidden_size, int(2 * (4 * config.hidden_size) / 3)
    for multiple in sizes:  # without a multiplier first, which Llama 1 does not know
        if multiple * -(-plain // multiple) == wanted:
            return {"multiple_of": multiple}
    for multiple in sizes:
        for digits in range(1, 17):
            multiplier = round((wanted + 1 - multiple / 2) / plain, digits)  # amid those that do
            if multiple * -(-int(multiplier * plain) // multiple) == wanted:
                return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    raise AssertionError(f"no multiplier makes {wanted} of {plain}")


def weights_file(rank: int) -> str:
    return f"consolidated.{rank:02}.pth"


def write_meta(
    root: Path,
    layout: MetaLayout,
    blocks: Callable[[MetaTensor, int], Iterable[Tensor]],
    *,
    tokenizer: Path | None = None,
    workers: int = 1,
    memory: int = 0,
    memory_of: Callable[[str], int] = lambda name: 0,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Put the files into `root` together, in place of such files that are there.

    Args:
        blocks: (tensor, rank) -> consecutive blocks of it; asked once for every place of every tensor.
        tokenizer: a tokenizer.model to copy.
        memory: bytes that workers may hold together; `memory_of` what is made of the Megatron tensor of this name.
        check: called with the folder of the files before they get their places; what it raises keeps them from that.
    """
    with replacing_set(root, PARAMS, instead_of=(WEIGHTS,)) as temporary, contextlib.ExitStack() as stack:
        files: list[OutFile] = []
        for rank in range(layout.size):
            tensors = {t.name: torch.empty(t.shape, dtype=layout.dtype_of(t)) for t in layout.tensors()}
            file = torch_file(temporary / weights_file(rank), tensors, list(tensors.items()))
            files.append(stack.enter_context(file))

        def job(source: str, tensors: list[MetaTensor]) -> Job:
            def run(tick: Tick) -> None:
                for tensor in tensors:
                    for rank, file in enumerate(files):
                        file.write(tensor.name, ticking(blocks(tensor, rank), tick))

            return Job(run, memory_of(source))

        jobs = [job(source, tensors) for source, tensors in layout.by_source().items()]
        fill(jobs, workers=workers, total=layout.total_bytes(), memory=memory, title=f"writing {root}")
        for file in files:
            put_checksums(file)
            file.finish()
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        (temporary / PARAMS).write_text(to_json(layout.params(), indent=2, ensure_ascii=True) + "\n")
        if check is not None:
            check(temporary)


def read_meta(folder: Path, layout: MetaLayout) -> Iterator[tuple[MetaTensor, int, Tensor]]:
    """(tensor, rank, its value) of files in `folder`. Raises UserError when others are there than `layout` says."""
    found = sorted(path.name for path in folder.glob(WEIGHTS))
    if found != [weights_file(rank) for rank in range(layout.size)]:
        raise UserError(f"{folder}: holds {found}, which is not what was written")
    expected = {tensor.name: tensor for tensor in layout.tensors()}
    for rank, name in enumerate(found):
        tensors = load_tensors(folder / name)
        if odd := expected.keys() ^ tensors.keys():
            raise UserError(f"{folder / name}: {min(odd)} is not where it should be")
        for key, tensor in expected.items():
            yield tensor, rank, tensors[key]
