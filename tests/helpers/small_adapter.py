"""A small adapter of this program with the state of its training, and what loading and resuming it give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from modellink_lora.adapters.targets import adapted_linears
from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta, open_own, write_adapter
from modellink_lora.checkpoint.adapter_check import factor_shapes
from modellink_lora.checkpoint.store import write_tracker
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.training.agreement import Terms
from modellink_lora.training.optimizer import state_tensors
from modellink_lora.training.state import Parts, Progress, Snapshot, resume

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, vocab_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=4,
    ffn_hidden_size=12, normalization="RMSNorm", swiglu=True, max_position_embeddings=16,
    position_embedding_type="rope", untie_embeddings_and_output_weights=True, hf_model_type="llama",
)  # fmt: skip
LORA = LoraConfig(2, 4.0, 0.0, ("linear_qkv", "linear_fc2"), rank_pattern={"linear_fc2": 3})
DATA = {"samples": 8, "seed": 1}
SETTINGS = {"batch_size": 4, "clip_grad": 1.0, "lora_dropout": 0.0}
SCHEDULE = {"max_lr": 1e-3, "num_steps": 12, "lr_decay_style": "cosine", "lr_decay_steps": 40, "lr_warmup_steps": 0,
            "wd_incr_steps": 40}  # fmt: skip


def factors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in factor_shapes(MODEL, LORA).items()}


def meta(**changes: Any) -> AdapterMeta:
    return AdapterMeta(**{"lora": LORA, "model": MODEL, "base_fingerprint": "0" * 32, "iteration": 3, **changes})


def write_small(root: Path, **changes: Any) -> Path:
    """Write the adapter alone below `root`; the folder of its iteration."""
    folder = root / "iter_0000003"
    write_adapter(folder, factors(), meta(**changes))
    write_tracker(root, 3)
    return folder


def write_checkpoint(root: Path) -> Path:
    """The same with the state of its training."""
    folder, tensors = root / "iter_0000003", factors()
    folder.mkdir(parents=True)
    state = {f"{name}.{kind}": tensor.abs() + add for name, tensor in tensors.items()
             for kind, add in (("master", 0.0), ("exp_avg", 1.0), ("exp_avg_sq", 2.0))}  # fmt: skip
    training = {**vars(Progress(3, 12, 3, data=DATA, settings=SETTINGS)), "scheduler": SCHEDULE, "loss_scale": {},
                "layout": {"tensor": 1, "pipeline": 1, "data": 1, "sequence_parallel": False}}  # fmt: skip
    Snapshot(meta(), tensors, state, training).write(folder)
    write_tracker(root, 3)
    return folder


def resumed(adapter: Adapter) -> tuple[Progress, dict[str, Any], dict[str, Tensor]]:
    """(progress, schedule, every tensor of the optimizer's state) after resuming from `adapter`."""
    parts = _parts(SCHEDULE, data_parallel=1)
    progress, _ = resume(adapter, parts, load_optimizer=True, terms=lambda *_: Terms(DATA, SETTINGS))
    state = {f"{name}.{kind}": t for name, kind, t in state_tensors(parts.optimizer, parts.parameters)}
    return progress, parts.scheduler.state, state


def resume_lines(
    adapter: Adapter, *, data_parallel: int, settings: Mapping[str, Any] = MappingProxyType({}),
    schedule: Mapping[str, Any] = MappingProxyType({}), load_optimizer: bool = True,
) -> list[str]:  # fmt: skip
    """What resuming from `adapter` tells where `settings` and `schedule` differ by these."""
    terms = Terms(DATA, {**SETTINGS, **settings})
    parts = _parts({**SCHEDULE, **schedule}, data_parallel=data_parallel)
    _, told = resume(adapter, parts, load_optimizer=load_optimizer, terms=lambda *_: terms)
    return told


def _parts(schedule: Mapping[str, Any], *, data_parallel: int) -> Parts:
    linears = adapted_linears(family_of("llama"), MODEL, LORA)
    layers: Any = {
        x.name: SimpleNamespace(
            lora_A=torch.nn.Parameter(torch.zeros(x.r, x.in_features)),
            lora_B=torch.nn.Parameter(torch.zeros(x.out_features, x.r)),
        )
        for x in linears
    }
    trained = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    inner = SimpleNamespace(optimizer=torch.optim.AdamW(trained), grad_scaler=None)
    scheduler = SimpleNamespace(state=dict(schedule), state_dict=lambda: dict(schedule), **schedule)
    scheduler.load_state_dict = scheduler.state.update
    context: Any = SimpleNamespace(tp_rank=0, tp_size=1, pp_size=1, dp_size=data_parallel, sequence_parallel=False)
    return Parts(layers, linears, SimpleNamespace(chained_optimizers=[inner]), scheduler, context)


def open_small(folder: Path) -> Adapter:
    return open_own(folder)
