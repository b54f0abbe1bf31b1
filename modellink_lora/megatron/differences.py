"""Every difference between the versions of megatron-core that this package meets. No other file compares versions.

The names are of the newest version; where an older one lacks something, the function here says what stands in for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch.distributed import ProcessGroup

from modellink_lora.megatron.versions import release

# Fields of TransformerConfig and the version that brought them. What stands in for them before:
#   use_te_activation_func  `complete` puts the activation into the built MLPs
#   moe_shared_expert_gate  `mixture_spec` gives it to the shared expert itself
_NEWER_FIELDS = {"use_te_activation_func": (0, 15), "moe_shared_expert_gate": (0, 16)}


def config_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` of TransformerConfig without the fields that this version does not have."""
    return {name: value for name, value in settings.items() if release() >= _NEWER_FIELDS.get(name, (0, 0))}


def set_chunks(chunks: int) -> None:
    """Tell how many chunks a pipeline stage has. Since 0.16 all who need it are told when they are called."""
    if release() < (0, 16):
        parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)


def process_groups() -> list[ProcessGroup]:
    """The groups that parallel_state made for this process, itself a member or not. Before 0.15 it kept no list."""
    if release() < (0, 15):
        named = [value for value in vars(parallel_state).values() if isinstance(value, ProcessGroup)]
        return [group for group in dict.fromkeys(named) if group is not dist.group.WORLD]
    groups = parallel_state._global_process_group_list or ()
    return [group for group in groups if group is not None]  # None is the group of all processes


def schedule(stages: int, chunks: int) -> Callable[..., Any]:
    """The function that runs micro-batches through `stages` of `chunks`; before 0.16 it looks for both itself."""
    if release() < (0, 16):
        return get_forward_backward_func()
    return get_forward_backward_func(stages, chunks if chunks > 1 else None)


def mlp_parts(linear_fc1: Any, activation: ModuleSpec, linear_fc2: Any) -> MLPSubmodules:
    """What an MLP is made of. Before 0.15 the activation is not among it: `complete` adds it."""
    if release() < (0, 15):
        return MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    return MLPSubmodules(linear_fc1=linear_fc1, activation_func=activation, linear_fc2=linear_fc2)


def mixture_spec(experts: ModuleSpec, parts: MLPSubmodules, router: type, *, shared_gate: bool) -> ModuleSpec:
    """A mixture of experts with a shared one, where the model has one.

    Before 0.16 the gate of the shared expert is an argument of its own, and the router is megatron-core's: `complete`
    replaces it.
    """
    if release() < (0, 16):
        shared = ModuleSpec(module=SharedExpertMLP, params={"gate": shared_gate}, submodules=parts)
        return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts, shared))
    shared = ModuleSpec(module=SharedExpertMLP, submodules=parts)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts, shared, router))


def complete(model: torch.nn.Module, activation: ModuleSpec, router: type[torch.nn.Module]) -> None:
    """Put into a built model what its specification could not say; nothing in newer versions."""
    for module in list(model.modules()):
        if release() < (0, 15) and isinstance(module, MLP):
            # its forward would halve the input of a gated activation itself, keeping a copy of each half
            module.config = copy.copy(module.config)
            module.config.gated_linear_unit = False
            module.activation_func = build_module(activation, config=module.config)
        if release() < (0, 16) and isinstance(module, MoELayer):
            module.router.__class__ = router  # which adds no state
