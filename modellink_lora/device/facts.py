"""What a kind of device says about itself beyond what training needs: versions, number, memory of each."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

_NVIDIA = Path("/proc/driver/nvidia/version")
_ASCEND = Path("/usr/local/Ascend/driver/version.info")


def versions(kind: str) -> dict[str, str]:
    """Driver, runtime and communication libraries under devices of `kind`, by name. `kind` is available."""
    found = {"gloo": "available" if dist.is_gloo_available() else "missing from this build of torch"}
    if kind == "cuda":
        found = {**_cuda(), **found}
    if kind == "npu":
        found = {**_npu(), **found}
    return found


def count(kind: str) -> int:
    """Devices that this process sees; a CPU is one, and takes any number of processes."""
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "npu":
        return int(torch.npu.device_count())  # type: ignore[attr-defined]  # exists once torch_npu is loaded
    return 1


def memory(kind: str, index: int) -> tuple[int, int]:
    """(free, all) bytes of device `index`, as the driver says: other programs' are not free. A CPU's is the host's."""
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info(index)
        return int(free), int(total)
    if kind == "npu":
        free, total = torch.npu.mem_get_info(index)  # type: ignore[attr-defined]
        return int(free), int(total)
    host = psutil.virtual_memory()
    return int(host.available), int(host.total)


def name(kind: str, index: int) -> str:
    if kind == "cuda":
        return str(torch.cuda.get_device_name(index))
    if kind == "npu":
        return str(torch.npu.get_device_name(index))  # type: ignore[attr-defined]
    return "CPU"


def fits_torch_npu(release: str, of_torch: str) -> bool:
    """Whether a release of torch_npu was built for a release of torch: `2.7.1.post4` for `2.7.1+cpu`."""
    return _numbers(release) == _numbers(of_torch)


# Releases of CANN that torch_npu's README names for its own: by the release's first numbers.
_CANN = {
    "9.1.0": ("2.12.0", "2.7.1.post8"),
    "9.0.0": ("2.10.0", "2.9.0.post2", "2.8.0.post4", "2.7.1.post4"),
    "8.5.0": ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"),
}


def documented_cann(release: str) -> str | None:
    """The release of CANN that is documented for a release of torch_npu; None where we know of none."""
    return next((cann for cann, releases in _CANN.items() if release.split("+")[0] in releases), None)


def _numbers(version: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", version.split("+")[0].split("post")[0].split("rc")[0])[:3])


def _cuda() -> dict[str, str]:
    found = {}
    if _NVIDIA.exists() and (line := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _NVIDIA.read_text())):
        found["NVIDIA driver"] = line.group()
    with contextlib.suppress(AttributeError, RuntimeError):
        number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # the newest CUDA that the driver runs, e.g. 12080
        found["CUDA of the driver"] = f"{number // 1000}.{number % 1000 // 10}"
    found["CUDA of torch"] = str(torch.version.cuda)
    with contextlib.suppress(AttributeError, RuntimeError):
        found["cuDNN"] = str(torch.backends.cudnn.version())
    with contextlib.suppress(AttributeError, RuntimeError, ImportError):
        found["NCCL"] = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version()))
    return found


def _npu() -> dict[str, str]:
    found = {"torch_npu": str(importlib.import_module("torch_npu").__version__)}
    try:
        cann = str(importlib.import_module("torch_npu.npu.utils").get_cann_version()) or "unknown"
    except (ImportError, AttributeError, OSError, RuntimeError):
        cann = "unknown"
    found["CANN, and HCCL in it"] = cann
    if _ASCEND.exists() and (line := re.search(r"(?m)^Version=(\S+)", _ASCEND.read_text())):
        found["Ascend driver"] = line.group(1)
    return found
