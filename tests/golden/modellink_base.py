"""Writes base checkpoints key by key as ModelLink's converter, or its training, left them in November 2024.

A second implementation of the format, on purpose: it knows nothing of the program under test, and gets from Hugging
Face tensors to Megatron's row by row. modellink_adapter.py does the same for LoRA runs. Letters: t tensor parallel
size, p pipeline stages, v virtual stages of each.

    python -m tests.golden.modellink_base --hf model.pt --heads 4 --groups 2 --tp 2 --pp 2 --legacy --out DIR

`model.pt` is a dictionary of a Llama-like model's Hugging Face tensors.
"""

from __future__ import annotations

import argparse
import enum
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.golden.modellink_adapter import COLUMN, LEGACY, ROW, save_npu, training_state

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
LLAMA = {  # Hugging Face -> Megatron, below the layer; q, k and v, gate and up are joined besides
    "input_layernorm": "input_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
}
GEMMA2 = {
    **LLAMA,
    "post_attention_layernorm": "post_attn_norm",
    "pre_feedforward_layernorm": "pre_mlp_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
BLOOM = {  # its query_key_value has Megatron's order already
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": _QKV,
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": _FC1,
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_ENDS = {
    "model.embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
    "transformer.word_embeddings": "embedding.word_embeddings",
    "transformer.word_embeddings_layernorm": "embedding.word_embeddings.norm",
    "transformer.ln_f": "decoder.final_layernorm",
}


def megatron_tensors(hf: dict[str, Tensor], names: dict[str, str], *, heads: int, groups: int) -> dict[str, Tensor]:
    """Full tensors under global mcore names; the rows of q, k and v go group by group, gate comes before up."""
    full: dict[str, Tensor] = {}
    for name, tensor in hf.items():
        module, _, kind = name.rpartition(".")
        at = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", module)
        if at is None:
            full[f"{_ENDS[module]}.{kind}"] = tensor
            continue
        layer, inner = f"decoder.layers.{at[1]}.", at[2]
        if inner == "self_attn.q_proj":
            q, k, v = (hf[name.replace("q_proj", x)] for x in ("q_proj", "k_proj", "v_proj"))
            d = len(k) // groups
            rows = []
            for g in range(groups):
                rows += [q[head * d + i] for head in range(g * heads // groups, (g + 1) * heads // groups)
                         for i in range(d)]  # fmt: skip
                rows += [k[g * d + i] for i in range(d)] + [v[g * d + i] for i in range(d)]
            full[f"{layer}{_QKV}.{kind}"] = torch.stack(rows)
        elif inner == "mlp.gate_proj":
            full[f"{layer}{_FC1}.{kind}"] = torch.cat([tensor, hf[name.replace("gate_proj", "up_proj")]])
        elif inner in names:
            full[f"{layer}{names[inner]}.{kind}"] = tensor
        else:
            assert inner in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"), name
    return full


def write(
    root: Path, full: dict[str, Tensor], *, heads: int, groups: int, tp: int = 1, pp: int = 1, vpp: int = 1,
    legacy: bool = False, trained: bool = False, layer_list: Sequence[int] | None = None, multiple: int = 1,
    npu: bool = False, release: bool = False, gated: bool = True, **said: Any,
) -> Path:  # fmt: skip
    """Write the checkpoint and its tracker below `root`; returns `root`.

    Args:
        full: tensors of `megatron_tensors`, the vocabulary not padded.
        trained: as posttrain_gpt.py saved it (iteration 500, optimizer and random states, random padding rows), not
            as convert_ckpt.py did (iteration 1, padding rows like the last one, model_type an enum).
        multiple: the vocabulary is padded to a multiple of this times t.
        npu: store tensors as torch_npu does those of an Ascend device.
        gated: whether linear_fc1 is [gate; up].
        said: further args, or others than those derived from the tensors.
    """
    layers = 1 + max(int(name.split(".")[2]) for name in full if name.startswith("decoder.layers."))
    runs = list(layer_list or [layers // (pp * vpp)] * (pp * vpp))  # layers of run v * p + stage
    assert sum(runs) == layers and len(runs) == pp * vpp
    padded = {**full, **{name: pad(full[name], multiple * tp, trained) for name in (EMBEDDING, HEAD) if name in full}}
    iteration = 500 if trained else 1
    args = arguments(padded, layers, heads, groups, tp, pp, vpp, legacy, trained, layer_list, multiple, gated, said)
    folder = root / ("release" if release else f"iter_{iteration:07d}")
    for t in range(tp):
        for p in range(pp):
            models = []
            for v in range(vpp):
                run, start = v * pp + p, sum(runs[: v * pp + p])
                state = stage(padded, start, start + runs[run], t, tp, gated=gated, first=run == 0,
                              last=run == len(runs) - 1, copied=pp > 1)  # fmt: skip
                models.append(nested(state, tied=HEAD not in full) if legacy else state)
            document = {
                "args": args, "checkpoint_version": 3.0, "iteration": iteration,
                **({"model": models[0]} if vpp == 1 else {f"model{v}": model for v, model in enumerate(models)}),
                **({"num_floating_point_operations_so_far": 0, **training_state()} if trained else {}),
            }  # fmt: skip
            path = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")) / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            with mock.patch.dict(sys.modules, megatron_modules()):
                (save_npu if npu else torch.save)(document, path)
            if trained:  # the distributed optimizer keeps its state in a file of its own
                torch.save({"param_state": torch.zeros(3)}, path.with_name("distrib_optim.pt"))
    (root / "latest_checkpointed_iteration.txt").write_text("release" if release else str(iteration))
    return root


def pad(tensor: Tensor, multiple: int, random: bool) -> Tensor:
    extra = -len(tensor) % multiple
    rows = torch.rand(extra, tensor.shape[1]) if random else tensor[-1:].expand(extra, -1)
    return torch.cat([tensor, rows.to(tensor.dtype)])


def stage(
    full: dict[str, Tensor], start: int, stop: int, t: int, tp: int, *, gated: bool, first: bool, last: bool,
    copied: bool,
) -> dict[str, Tensor | None]:  # fmt: skip
    """mcore keys of one run of layers, its layers numbered from 0.

    Args:
        copied: whether the last stage keeps the embedding as its output layer where there is no other.
    """
    state: dict[str, Tensor | None] = {}
    for name, tensor in full.items():
        module, _, kind = name.rpartition(".")
        at = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)
        if at is not None:
            if start <= int(at[1]) < stop:
                local = f"decoder.layers.{int(at[1]) - start}.{at[2]}"
                state[f"{local}.{kind}"] = cut(tensor, at[2], kind, t, tp, gated)
                if at[2] in COLUMN + ROW:
                    state[f"{local}._extra_state"] = None
        elif (first and module.startswith("embedding.")) or (last and not module.startswith("embedding.")):
            state[name] = cut(tensor, module, kind, t, tp, gated)
    if last:
        if HEAD not in full and copied:
            state[HEAD] = cut(full[EMBEDDING], "output_layer", "weight", t, tp, gated)
        state["output_layer._extra_state"] = None  # also where a tied output layer holds no weight
    return state


def cut(tensor: Tensor, module: str, kind: str, t: int, tp: int, gated: bool) -> Tensor:
    """Rank t's share, as a tensor of its own."""
    if module == _FC1 and gated:
        gate, up = tensor.chunk(2)
        part = torch.cat([gate.chunk(tp)[t], up.chunk(tp)[t]])
    elif module in COLUMN or module in ("embedding.word_embeddings", "output_layer"):
        part = tensor.chunk(tp)[t]
    elif module in ROW and kind == "weight":
        part = tensor.chunk(tp, dim=1)[t]
    else:
        part = tensor
    return part.clone(memory_format=torch.contiguous_format)


def nested(state: dict[str, Tensor | None], *, tied: bool) -> dict[str, Any]:
    """The legacy form of `model`."""
    language_model: dict[str, Any] = {"encoder": {}}
    model: dict[str, Any] = {"language_model": language_model}
    for name, tensor in state.items():
        if name.startswith("embedding.word_embeddings."):
            words = language_model.setdefault("embedding", {}).setdefault("word_embeddings", {})
            words[name.removeprefix("embedding.word_embeddings.")] = tensor
        elif name.startswith("output_layer."):
            if not tied:
                language_model.setdefault("output_layer", {})[name.removeprefix("output_layer.")] = tensor
            elif tensor is not None:
                model["word_embeddings_for_head"] = {"weight": tensor}
        else:
            key = name.removeprefix("decoder.").replace("final_layernorm", "final_norm")
            for mcore, old in LEGACY.items():
                key = re.sub(rf"(?<=\d\.){re.escape(mcore)}(?=\.)", old, key)
            language_model["encoder"][key] = tensor
    return model


class _ModelType(enum.Enum):
    encoder_or_decoder = 1


_ModelType.__module__, _ModelType.__qualname__ = "megatron.core.enums", "ModelType"


def megatron_modules() -> dict[str, types.ModuleType]:
    """What pickle must find to store the enum under its real name, wherever this runs."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")}
    modules["megatron.core.enums"].ModelType = _ModelType  # type: ignore[attr-defined]
    return modules


def arguments(
    full: dict[str, Tensor], layers: int, heads: int, groups: int, tp: int, pp: int, vpp: int, legacy: bool,
    trained: bool, layer_list: Sequence[int] | None, multiple: int, gated: bool, said: dict[str, Any],
) -> argparse.Namespace:  # fmt: skip
    """The arguments that matter to a reader, with the values that Megatron's parser gives them.

    The converter reads no rope_theta and no head_dim from config.json, so `rotary_base` and `kv_channels` may be what
    they are by default.
    """
    first, dtype, h = "decoder.layers.0.", full[EMBEDDING].dtype, full[EMBEDDING].shape[1]
    values = dict(
        num_layers=layers, encoder_num_layers=layers, hidden_size=h, num_attention_heads=heads,
        ffn_hidden_size=full[f"{first}mlp.linear_fc2.weight"].shape[1], group_query_attention=groups != heads,
        num_query_groups=groups if groups != heads else 1, kv_channels=h // heads, max_position_embeddings=64,
        seq_length=64, vocab_size=None, padded_vocab_size=len(full[EMBEDDING]), make_vocab_size_divisible_by=multiple,
        normalization="LayerNorm" if f"{first}input_layernorm.bias" in full else "RMSNorm", norm_epsilon=1e-5,
        swiglu=gated, geglu=False, position_embedding_type="rope", use_rotary_position_embeddings=True,
        rotary_base=None, rotary_percent=1.0, rope_scaling_type=None, rope_scaling_factor=1.0,
        untie_embeddings_and_output_weights=HEAD in full, add_bias_linear=f"{first}mlp.linear_fc1.bias" in full,
        add_qkv_bias=f"{first}{_QKV}.bias" in full, add_dense_bias=f"{first}self_attention.linear_proj.bias" in full,
        attention_dropout=0.1, hidden_dropout=0.1, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None, expert_model_parallel_size=1, num_experts=None,
        num_layers_per_virtual_pipeline_stage=layers // (pp * vpp) if vpp > 1 else None,
        num_layer_list=",".join(map(str, layer_list)) if layer_list else None, use_mcore_models=not legacy,
        params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, transformer_impl="local",
        model_type=None if trained else _ModelType.encoder_or_decoder, consumed_valid_samples=0,
        tokenizer_type="PretrainedFromHF" if trained else "Llama2Tokenizer", data_path=["./data"] if trained else None,
        iteration=500 if trained else 1, consumed_train_samples=16000 if trained else 0, finetune=trained,
        stage="sft" if trained else None, lora_target_modules=[], lora_r=16, lora_alpha=32, lora_load=None,
    )  # fmt: skip
    return argparse.Namespace(**{**values, **said})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("hf", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    for flag in ("heads", "groups"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    for flag in ("tp", "pp", "vpp", "multiple"):
        parser.add_argument(f"--{flag}", type=int, default=1)
    for flag in ("legacy", "trained", "npu", "release"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = vars(parser.parse_args(argv))
    hf = torch.load(given.pop("hf"), weights_only=True)
    full = megatron_tensors(hf, LLAMA, heads=given["heads"], groups=given["groups"])
    print(write(given.pop("out"), full, **given))


if __name__ == "__main__":
    main()
