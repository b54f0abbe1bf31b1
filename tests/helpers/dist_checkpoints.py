"""Writes torch_dist checkpoints with megatron-core's own dist_checkpointing, as Megatron-LM and Megatron-Bridge do.

Functions to be called on every rank by `tests.helpers.spawn.run`.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def save_base_here(
    hf: str, root: str, *, parallel: dict[str, Any], metadata: dict[str, Any] | None = None, args: bool = True
) -> None:
    """The model of the Hugging Face folder `hf` as Megatron-LM saves it, with an optimizer state beside it.

    Args:
        metadata: of megatron-core's sharding, e.g. {"singleton_local_shards": True}.
    """
    state: dict[str, Any] = {}
    model, config = _model(hf, parallel)
    for n, chunk in enumerate(model):
        state[f"model{n}"] = chunk.sharded_state_dict(metadata=metadata)
    state |= {"checkpoint_version": 3.0, "iteration": 12}
    if args:
        state["args"] = arguments(config, parallel)
    _save(state, Path(root))


def arguments(config: Any, parallel: dict[str, Any]) -> argparse.Namespace:
    """What Megatron-LM's parser leaves; it spells some names in its own way."""
    values = dataclasses.asdict(config)
    for ours in ("hf_model_type", "norm_epsilon", "sliding_window", "vocab_size", "params_dtype"):
        del values[ours]
    values |= {"layernorm_epsilon": config.norm_epsilon, "vocab_size": None, "params_dtype": torch.float32}
    return argparse.Namespace(**values, **parallel, use_rotary_position_embeddings=True, add_bias_linear=False)


def save_adapter_here(
    hf: str, root: str, *, parallel: dict[str, Any], factors: dict[str, Tensor], alpha: float, stacked: bool = True
) -> None:
    """An adapter as Megatron-Bridge saves it: its modules are megatron-core's parallel linears.

    Args:
        factors: `<module>.adapter[.<part>].linear_in.weight` [r, in] and `linear_out` [out, r], of layers.
        stacked: layers along a first axis, as for models whose layers are all alike.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    from modellink_lora.checkpoint.hf import HfModel
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.models.build import transformer_config
    from modellink_lora.parallel.context import make_context
    from modellink_lora.parallel.random import seed_everything
    from modellink_lora.training.setup import partition_of

    config = HfModel(Path(hf)).config
    context = make_context(ParallelConfig(**parallel), torch.device("cpu"))
    seed_everything(1, context, get_device("cpu"))
    partition = partition_of(context.config, config.num_layers)
    megatron = transformer_config(config, context, partition, "fp32", {})
    state: dict[str, Any] = {"iteration": 12, "checkpoint_version": 3.0}
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for name, full in factors.items():
        layer, (head, _, rest) = int(name.split(".")[2]), name.partition(f".{name.split('.')[2]}.")
        if layer not in partition.layers(context.pp_rank):
            continue
        rows, columns = full.shape
        # the first of a linear that is cut by rows is cut by columns; every other is cut by rows
        is_row = ".linear_in." in name and (".linear_proj." in name or ".linear_fc2." in name)
        kind = RowParallelLinear if is_row else ColumnParallelLinear
        more: dict[str, Any] = {"input_is_parallel": True, "skip_bias_add": True} if is_row else {"gather_output": True}
        linear = kind(columns, rows, config=megatron, init_method=torch.nn.init.zeros_, bias=False, **more)
        t, rank = context.tp_size, context.tp_rank
        pieces = full.chunk(t, dim=1 if is_row else 0)
        if ".linear_fc1.adapter.linear_out." in name:  # gate and up, each cut for itself
            pieces = tuple(torch.cat(pair) for pair in zip(*(half.chunk(t) for half in full.chunk(2)), strict=True))
        with torch.no_grad():
            linear.weight.copy_(pieces[rank])
        prefix = f"{head}.{rest}" if stacked else name
        offsets = ((0, layer, config.num_layers),) if stacked else ()
        sharded = linear.sharded_state_dict(prefix.removesuffix("weight"), offsets, metadata)
        if ".linear_fc1." in name and ".linear_out." in name:
            sharded[prefix] = apply_swiglu_sharded_factory(sharded[prefix], offsets)
        state |= {f"{layer} {key}": value for key, value in sharded.items()}
    _save(state, Path(root))
    if not torch.distributed.get_rank():
        text = f"model:\n  _target_: x.Y\n  tensor_model_parallel_size: {context.tp_size}\npeft:\n  alpha: {alpha}\n"
        (Path(root) / "iter_0000012/run_config.yaml").write_text(text)
    torch.distributed.barrier()


def _model(hf: str, parallel: dict[str, Any]) -> tuple[list[Any], Any]:
    """megatron-core's own GPTModel with the weights of `hf`: (chunks of this rank, ModelConfig)"""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from modellink_lora.checkpoint.hf import HfModel
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.models.build import transformer_config
    from modellink_lora.models.layouts import Vocab
    from modellink_lora.parallel.context import make_context
    from modellink_lora.parallel.random import seed_everything
    from modellink_lora.training.setup import partition_of

    source = HfModel(Path(hf))
    context = make_context(ParallelConfig(**parallel), torch.device("cpu"))
    seed_everything(1, context, get_device("cpu"))
    rows = -(-source.config.vocab_size // context.tp_size) * context.tp_size
    config = dataclasses.replace(source.config, padded_vocab_size=rows)
    partition = partition_of(context.config, config.num_layers)
    megatron = transformer_config(config, context, partition, "fp32", {"use_te_activation_func": False})
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    chunks = []
    for n in range(partition.chunks):
        chunk = GPTModel(
            megatron, spec, vocab_size=rows, max_sequence_length=config.max_position_embeddings,
            pre_process=context.is_first_stage and n == 0,
            post_process=context.is_last_stage and n == partition.chunks - 1,
            share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
            position_embedding_type="rope", vp_stage=n if partition.chunks > 1 else None,
        )  # fmt: skip
        for local, parameter in chunk.named_parameters():
            name = partition.to_global(local, context.pp_rank, n)
            tied = name == "output_layer.weight" and not config.untie_embeddings_and_output_weights
            name = "embedding.word_embeddings.weight" if tied else name
            layout = source.family.tensor(name, config).layout
            full = source.read(name)
            full = layout.fuse([full]) if isinstance(layout, Vocab) else full
            with torch.no_grad():
                parameter.copy_(layout.shard(full, context.tp_rank, context.tp_size))
        chunks.append(chunk)
    return chunks, config


def _save(state: dict[str, Any], root: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    folder = root / "iter_0000012"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text("12")
    dist.barrier()
    # the writer starts processes of its own, which those of a test pool may not
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    # it waits for a device, and sends a word through one, whatever the tensors are on
    with mock.patch("torch.cuda.synchronize"), mock.patch("torch.cuda.current_device", lambda: "cpu"):
        dist_checkpointing.save(state, str(folder))
    dist.barrier()
