"""What the launcher (torchrun, or nobody) says about this process, and the environment defaults a run needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from modellink_lora.config.errors import UserError

_DEVICE_VARIABLE = "MODELLINK_DEVICE"
_MINDSPEED_VARIABLE = "MODELLINK_MINDSPEED"
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 0
    device: str = "auto"
    mindspeed: bool = False  # whether MindSpeed is to adapt megatron-core to Ascend
    # of torchrun, which starts all processes again after a failure if asked to, and holds the store they meet at
    attempt: str = "0"
    has_store: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Launch:
        """The facts in `environment` (default os.environ). Without torchrun: one process, which needs no port."""
        environment = os.environ if environment is None else environment
        device = environment.get(_DEVICE_VARIABLE) or "auto"
        mindspeed = environment.get(_MINDSPEED_VARIABLE, "") not in ("", "0")
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return Launch(device=device, mindspeed=mindspeed)
        absent = [name for name in _TORCHRUN_VARIABLES if name not in environment]
        alone = environment.get("WORLD_SIZE") == "1" and "RANK" in environment
        if absent and not alone:
            raise UserError(
                f"{', '.join(absent)} not set while RANK or WORLD_SIZE is: start all processes with torchrun"
            )
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}: start all processes with torchrun")
        port = _number(environment, "MASTER_PORT", 0)
        if world_size > 1 and not 0 < port < 65536:
            raise UserError(f"MASTER_PORT={port} is not a port: give one of 1 to 65535, free on the first host")
        return Launch(
            rank=rank,
            world_size=world_size,
            local_rank=_number(environment, "LOCAL_RANK", rank),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE", world_size),
            master_address=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=port,
            device=device,
            mindspeed=mindspeed,
            attempt=str(_number(environment, "TORCHELASTIC_RESTART_COUNT", 0)),
            has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


# What kernels and communication libraries read from the environment, by device.
_DEFAULTS = {
    # seconds: building and loading operators at the first step takes longer than HCCL waits by itself
    "npu": {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HCCL_CONNECT_TIMEOUT": "1800",
        "HCCL_EXEC_TIMEOUT": "3600",
        # torch.distributed asks NPU tensors for it once somebody has loaded transfer_to_npu, which calls them CUDA's
        "TORCH_NPU_DEVICE_CAPABILITY": "8.0",
    },
}
# One hardware queue keeps a communication kernel in front of the product it should overlap with, on GPUs before
# Blackwell. CCLoRA overlaps them, and Transformer Engine asks for it; with frozen weights megatron-core's own linears
# wait for their collectives. Elsewhere one queue would only take overlap away.
_OVERLAPPING = {"cuda": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}
_NPU_ALLOCATOR = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_DETERMINISTIC = {"cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, "npu": {"HCCL_DETERMINISTIC": "true"}}


def set_environment_defaults(device: str, *, deterministic: bool = False, overlapping: bool = False) -> None:
    """Set these where the user has not. Call before the device is first used.

    Args:
        overlapping: collectives of tensor-parallel ranks run beside the products of the same linear.
    Raises:
        UserError: torch_npu would refuse what the user has set.
    """
    wanted = _DEFAULTS.get(device, {}) | (_DETERMINISTIC.get(device, {}) if deterministic else {})
    wanted |= _OVERLAPPING.get(device, {}) if overlapping else {}
    if device == "npu":
        given = [name for name in _NPU_ALLOCATOR if os.environ.get(name)]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)} are both set in the environment, which torch_npu refuses: unset one"
            )
        if not given:  # batches differ in length: segments that grow leave fewer gaps
            wanted = {**wanted, _NPU_ALLOCATOR[0]: "expandable_segments:True"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment is not a whole number") from None
