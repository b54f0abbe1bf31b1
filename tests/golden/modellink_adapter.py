"""Writes checkpoints key by key as ModelLink's training saved them in November 2024, with LoRA or without.

A second implementation of the format, on purpose: it imports nothing of the program under test, only torch and numpy.
With LoRA, an mcore run saves everything (base tensors as `.base_layer.`, and the factors); a legacy run saves the
factors, the embedding and the output layer. Without an adapter both save the whole model. Letters: t tensor parallel
size, p pipeline stages, v virtual stages of each.

    python tests/golden/modellink_adapter.py --base base.pt --adapter adapter.pt --heads 4 --groups 2 --tp 2 --out DIR

`base.pt` and `adapter.pt` are dictionaries of full tensors: `decoder.layers.0.self_attention.linear_qkv.weight` and so
on, qkv in groups and fc1 as [gate; up]; `decoder.layers.0.self_attention.linear_qkv.lora_A` and so on.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy
import torch
from torch import Tensor

LEGACY = {
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
    "input_layernorm": "input_norm",
    "pre_mlp_layernorm": "post_attention_norm",
}
COLUMN = ("self_attention.linear_qkv", "mlp.linear_fc1")
ROW = ("self_attention.linear_proj", "mlp.linear_fc2")


def write(
    root: Path, base: dict[str, Tensor], adapter: dict[str, Tensor], *, heads: int, groups: int, tp: int = 1,
    pp: int = 1, vpp: int = 1, legacy: bool = False, alpha: int = 16, iteration: int = 500, positions: int = 128,
    rotary_base: float = 10000.0, epsilon: float = 1e-6, layers_of_stages: list[int] | None = None, npu: bool = False,
) -> Path:  # fmt: skip
    """Write the checkpoint and its tracker below `root`; returns `root`.

    Args:
        npu: store tensors as torch_npu does those of an Ascend device.
    """
    layers = 1 + max(int(name.split(".")[2]) for name in base if name.startswith("decoder.layers."))
    runs = layers_of_stages or [layers // (pp * vpp)] * (pp * vpp)  # layers of run v * pp + p
    assert sum(runs) == layers and len(runs) == pp * vpp
    tied = "output_layer.weight" not in base
    args = arguments(base, adapter, layers, heads, groups, tp, pp, vpp, legacy, alpha, iteration, positions)
    args.rotary_base, args.norm_epsilon = rotary_base, epsilon
    folder = root / f"iter_{iteration:07d}"
    for t in range(tp):
        for p in range(pp):
            models = []
            for v in range(vpp):
                run = v * pp + p
                start = sum(runs[:run])
                first, last = run == 0, run == len(runs) - 1
                model = stage(base, adapter, start, start + runs[run], t, tp, legacy=legacy, first=first, last=last)
                if last and tied and pp > 1:
                    head = cut("embedding.word_embeddings.weight", base["embedding.word_embeddings.weight"], t, tp)
                    model.update(
                        {"word_embeddings_for_head": {"weight": head}} if legacy else {"output_layer.weight": head}
                    )
                models.append(model)
            document = {
                "args": args, "checkpoint_version": 3.0, "iteration": iteration,
                "num_floating_point_operations_so_far": 0,
                **({"model": models[0]} if vpp == 1 else {f"model{v}": model for v, model in enumerate(models)}),
                **training_state(),
            }  # fmt: skip
            path = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")) / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            (save_npu if npu else torch.save)(document, path)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


def stage(
    base: dict[str, Tensor], adapter: dict[str, Tensor], start: int, stop: int, t: int, tp: int, *,
    legacy: bool, first: bool, last: bool,
) -> dict:  # fmt: skip
    """`model` of one run of layers, its layers numbered from 0."""
    state: dict[str, Tensor | None] = {}  # mcore keys
    for name, tensor in base.items():
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            if not start <= int(number) < stop:
                continue
            module, _, kind = rest.rpartition(".")
            local = f"decoder.layers.{int(number) - start}.{module}"
            adapted = f"decoder.layers.{number}.{module}.lora_A" in adapter
            if module in COLUMN + ROW:
                inner = f"{local}.base_layer" if adapted else local
                state[f"{inner}.{kind}"] = cut(name, tensor, t, tp)
                state[f"{inner}._extra_state"] = None
            else:
                state[f"{local}.{kind}"] = cut(name, tensor, t, tp)
        elif (first and name.startswith("embedding.")) or (last and not name.startswith("embedding.")):
            state[name] = cut(name, tensor, t, tp)
    for name, tensor in adapter.items():
        _, _, number, rest = name.split(".", 3)
        if start <= int(number) < stop:
            module, _, factor = rest.rpartition(".")
            local = f"decoder.layers.{int(number) - start}.{module}.{factor}.default"
            state[f"{local}.weight"] = cut(name, tensor, t, tp)
            if (module in COLUMN and factor == "lora_B") or (module in ROW and factor == "lora_A"):
                state[f"{local}._extra_state"] = None
    return nested(state, whole=not adapter) if legacy else state


def cut(name: str, tensor: Tensor, t: int, tp: int) -> Tensor:
    """Rank t's share, as a tensor of its own."""
    rest = name.split(".", 3)[3] if name.startswith("decoder.layers.") else name
    module, _, kind = rest.rpartition(".")
    part = tensor
    if module == "mlp.linear_fc1" and kind in ("weight", "lora_B"):
        half = tensor.shape[0] // 2
        rows = half // tp
        part = torch.cat([tensor[t * rows : (t + 1) * rows], tensor[half + t * rows : half + (t + 1) * rows]])
    elif (module in COLUMN and kind in ("weight", "bias", "lora_B")) or "word_embeddings" in name or "output" in name:
        rows = tensor.shape[0] // tp
        part = tensor[t * rows : (t + 1) * rows]
    elif module in ROW and kind in ("weight", "lora_A"):
        columns = tensor.shape[1] // tp
        part = tensor[:, t * columns : (t + 1) * columns]
    return part.clone(memory_format=torch.contiguous_format)


def nested(state: dict[str, Tensor | None], *, whole: bool) -> dict:
    """The legacy form. With LoRA, of the layers only what has `lora` in its key; embedding and output layer whole."""
    encoder = {}
    model: dict = {"language_model": {"encoder": encoder}}
    for name, tensor in state.items():
        if name == "embedding.word_embeddings.weight":
            model["language_model"]["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif name == "output_layer.weight":
            model["language_model"]["output_layer"] = {"weight": tensor}
        elif whole or "lora" in name:
            key = name.removeprefix("decoder.").replace("final_layernorm", "final_norm")
            for mcore, legacy in LEGACY.items():
                key = key.replace(mcore, legacy)
            encoder[key] = tensor
    return model


def arguments(
    base: dict[str, Tensor], adapter: dict[str, Tensor], layers: int, heads: int, groups: int, tp: int, pp: int,
    vpp: int, legacy: bool, alpha: int, iteration: int, positions: int,
) -> argparse.Namespace:  # fmt: skip
    """The training arguments that matter to a reader, with the values that Megatron's parser gives them."""
    embedding = base["embedding.word_embeddings.weight"]
    first = "decoder.layers.0."
    wide = base[first + "self_attention.linear_proj.weight"].shape[1]
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in adapter}
    short = {mcore.split(".")[-1]: old.split(".")[-1] for mcore, old in LEGACY.items()}
    dtype = embedding.dtype
    return argparse.Namespace(
        num_layers=layers, encoder_num_layers=layers, hidden_size=embedding.shape[1],
        ffn_hidden_size=base[first + "mlp.linear_fc2.weight"].shape[1], num_attention_heads=heads,
        num_query_groups=groups if groups != heads else 1, group_query_attention=groups != heads,
        kv_channels=wide // heads, max_position_embeddings=positions, seq_length=positions, vocab_size=None,
        padded_vocab_size=embedding.shape[0], make_vocab_size_divisible_by=1, normalization="RMSNorm", swiglu=True,
        position_embedding_type="rope", use_rotary_position_embeddings=True, rotary_percent=1.0, rope_scaling_type=None,
        untie_embeddings_and_output_weights="output_layer.weight" in base, add_bias_linear=False, add_dense_bias=False,
        add_qkv_bias=first + "self_attention.linear_qkv.bias" in base, attention_dropout=0.0, hidden_dropout=0.0,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=layers // (pp * vpp) if vpp > 1 else None, num_layer_list=None,
        use_mcore_models=not legacy, params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        lora_r=next(iter(adapter.values())).shape[0] if adapter else 16, lora_alpha=alpha, lora_load=None,
        lora_fusion=bool(adapter),
        lora_target_modules=[old if legacy else new for new, old in short.items() if new in modules],
        lora_modules_to_save=None, lora_register_forward_hook=["word_embeddings", "input_layernorm"],
        stage="sft", finetune=True, iteration=iteration, consumed_train_samples=32 * iteration,
        consumed_valid_samples=0, model_type=None, num_experts=None, tokenizer_type="PretrainedFromHF",
    )  # fmt: skip


def training_state() -> dict:
    """Optimizer, schedule and random states: readers of weights must pass over them."""
    return {
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}},
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 16000},
        "rng_state": [{
            "random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
            "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
        }],
    }  # fmt: skip


class _Format(enum.IntEnum):
    """A tensor's memory format on the chip, as torch_npu calls it."""

    ND = 2


_Format.__module__, _Format.__qualname__ = "torch_npu.npu._format", "Format"


class NpuTensor:
    """Pickles as torch_npu pickles a tensor of an Ascend device."""

    def __init__(self, tensor: Tensor, rebuild: Callable) -> None:
        self.tensor, self.rebuild = tensor, rebuild

    def __reduce__(self) -> tuple:
        t = self.tensor.contiguous()
        storage = torch.storage.TypedStorage(wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True)
        place = (storage, t.storage_offset(), tuple(t.shape), t.stride(), False, OrderedDict())
        return self.rebuild, (*place, (_Format.ND,))


def save_npu(document: dict, path: Path) -> None:
    """torch.save with weights tagged `npu:0`, rebuilt by a function of torch_npu, which readers may not have."""
    name = "torch_npu.utils.storage"

    def _rebuild_npu_tensor(*args: object) -> None:
        raise AssertionError("only its name is stored")

    _rebuild_npu_tensor.__module__, _rebuild_npu_tensor.__qualname__ = name, "_rebuild_npu_tensor"
    parts = ("torch_npu", "torch_npu.utils", name, "torch_npu.npu", "torch_npu.npu._format")
    modules = {part: types.ModuleType(part) for part in parts}
    modules[name]._rebuild_npu_tensor, modules[parts[-1]].Format = _rebuild_npu_tensor, _Format

    def on_device(node: object) -> object:
        if isinstance(node, dict):
            return {key: on_device(value) for key, value in node.items()}
        return NpuTensor(node, _rebuild_npu_tensor) if isinstance(node, Tensor) else node

    stored = {key: on_device(value) if key.startswith("model") else value for key, value in document.items()}
    with mock.patch.dict(sys.modules, modules), mock.patch("torch.serialization.location_tag", lambda _: "npu:0"):
        torch.save(stored, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("base", "adapter", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    for flag in ("heads", "groups"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    for flag in ("tp", "pp", "vpp"):
        parser.add_argument(f"--{flag}", type=int, default=1)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--legacy", action="store_true")
    given = vars(parser.parse_args(argv))
    loaded = [torch.load(given.pop(name), weights_only=True) for name in ("base", "adapter")]
    print(write(given.pop("out"), *loaded, **given))


if __name__ == "__main__":
    main()
