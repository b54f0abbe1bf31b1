"""Environment variables that change what a run does: which are set, and which of them do harm here."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from modellink_lora.diagnosis.finding import Finding, Level

TOPIC = "environment"
# Only these are read, and only these are written to a report: an environment holds passwords too.
NAMES = (
    "MODELLINK_DEVICE", "MODELLINK_MINDSPEED",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK",
    "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "CPU_AFFINITY_CONF",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE", "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES", "ASCEND_LAUNCH_BLOCKING",
    "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH", "TASK_QUEUE_ENABLE", "STREAMS_PER_DEVICE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF", "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_TRANSFER_TO_NPU", "TORCH_NPU_DEVICE_CAPABILITY", "TORCH_DISTRIBUTED_DEBUG", "TORCHDYNAMO_DISABLE",
    "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TMPDIR",
)  # fmt: skip
PREFIXES = ("NCCL_", "TORCH_NCCL_", "HCCL_")  # all that begins so belongs to the communication libraries
_HCCL_TIMEOUT = range(120, 7201)  # seconds, as documented for HCCL_CONNECT_TIMEOUT


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The listed variables that are set."""
    return {name: environment[name] for name in sorted(environment) if name in NAMES or name.startswith(PREFIXES)}


def environment_findings(
    environment: Mapping[str, str], *, device: str, processes: int, cores: int, interfaces: Collection[str]
) -> list[Finding]:
    """One line for each variable that is set.

    Args:
        device: its kind.
        processes: of this host.
        interfaces: names of the host's network interfaces.
    """
    found = relevant(environment)
    notes: dict[str, tuple[Level, str]] = {}
    for check in (_allocators, _threads, _connections, _interfaces, _slow, _timeouts):
        notes |= check(found, device, processes, cores, interfaces)
    lines = []
    for name in [*found, *(name for name in notes if name not in found)]:
        level, advice = notes.get(name, ("ok", ""))
        lines.append(Finding(TOPIC, name, found.get(name, "not set"), level, advice))
    return lines


_Notes = dict[str, tuple[Level, str]]
_Found = Mapping[str, str]


def _allocators(found: _Found, device: str, *_: object) -> _Notes:
    if "PYTORCH_ALLOC_CONF" not in found:
        return {}
    if "PYTORCH_NPU_ALLOC_CONF" in found:
        level: Level = "problem" if device == "npu" else "warning"
        return {"PYTORCH_NPU_ALLOC_CONF": (level, "PYTORCH_ALLOC_CONF is set too, torch_npu refuses both: keep one")}
    if "PYTORCH_CUDA_ALLOC_CONF" in found:
        return {"PYTORCH_CUDA_ALLOC_CONF": ("warning", "the old name of PYTORCH_ALLOC_CONF, set too: keep the new one")}
    return {}


def _threads(found: _Found, device: str, processes: int, cores: int, *_: object) -> _Notes:
    text = found.get("OMP_NUM_THREADS")
    if text is None:
        crowded = processes > 1
        return {"OMP_NUM_THREADS": ("warning", f"each of {processes} processes takes all cores: set it to "
                                    f"{max(1, cores // processes)} or less")} if crowded else {}  # fmt: skip
    if not text.isdigit() or int(text) < 1:
        return {"OMP_NUM_THREADS": ("problem", "is not a number of threads: set it to 1 or more")}
    if int(text) * processes > cores:
        return {"OMP_NUM_THREADS": ("warning", f"{processes} processes x {text} threads share {cores} cores: set it to "
                                    f"{max(1, cores // processes)}")}  # fmt: skip
    return {}


def _connections(found: _Found, device: str, *_: object) -> _Notes:
    value = found.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if device == "cpu" or value in (None, "1"):  # unset it becomes 1 where that matters (cli/launch.py)
        return {}
    return {"CUDA_DEVICE_MAX_CONNECTIONS": ("warning", "with --lora-fusion or Transformer Engine at TP above 1, "
                                            "communication no longer starts before the computation it should overlap "
                                            "with, but on Blackwell: unset it for such runs")}  # fmt: skip


def _interfaces(found: _Found, device: str, processes: int, cores: int, interfaces: Collection[str]) -> _Notes:
    """Gloo takes exact names; NCCL and HCCL beginnings of names, `=` before exact ones, `^` before those to avoid."""
    notes: _Notes = {}
    there = ", ".join(sorted(interfaces))
    for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"):
        value = found.get(variable, "")
        exact = variable.startswith(("GLOO", "TP")) or value.startswith("=")
        wanted = [part.strip() for part in value.lstrip("=").split(",") if part.strip()]
        if value.startswith("^") or not wanted:
            continue
        if not any(name == want if exact else name.startswith(want) for name in interfaces for want in wanted):
            notes[variable] = ("problem", f"this host has no such interface; it has {there}: name one, or unset it")
    return notes


def _slow(found: _Found, *_: object) -> _Notes:
    """Switches for debugging that are easily forgotten."""
    slow = {
        "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
        "ASCEND_LAUNCH_BLOCKING": "every operator is waited for",
        "NCCL_P2P_DISABLE": "GPUs of a host talk through its memory",
        "NCCL_IB_DISABLE": "hosts talk over TCP instead of InfiniBand or RoCE",
        "NCCL_SHM_DISABLE": "processes of a host talk over the network",
    }
    return {name: ("warning", f"{why}, which is slow: unset it if you are not looking for an error")
            for name, why in slow.items() if found.get(name) == "1"}  # fmt: skip


def _timeouts(found: _Found, *_: object) -> _Notes:
    text = found.get("HCCL_CONNECT_TIMEOUT")
    if text is None or (text.isdigit() and int(text) in _HCCL_TIMEOUT):
        return {}
    low, high = _HCCL_TIMEOUT[0], _HCCL_TIMEOUT[-1]
    return {"HCCL_CONNECT_TIMEOUT": ("problem", f"HCCL takes whole seconds from {low} to {high}: unset it for 1800")}
