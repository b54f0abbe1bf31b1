"""Versions of Python, of the libraries, and of what lies under the device; whether they belong together."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from packaging.requirements import Requirement

from modellink_lora import __version__
from modellink_lora.device import DEVICES, facts
from modellink_lora.diagnosis.finding import Finding

LIBRARIES = ("torch", "megatron-core", "transformers", "numpy", "safetensors")
# used, or got along with, where they are there
OPTIONAL = ("torch-npu", "peft", "transformer-engine", "apex", "triton", "mindspeed", "lm-eval")
TOPIC = "versions"


def versions(kind: str) -> dict[str, str]:
    """Every version that matters on a device of `kind`, by name."""
    found = {"modellink_lora": __version__, "Python": platform.python_version()}
    found |= {name: version for name in (*LIBRARIES, *OPTIONAL) if (version := _installed(name))}
    return {**found, **facts.versions(kind)}


def device_findings(chosen: str) -> list[Finding]:
    """The chosen kind of device, and why others are not."""
    result = []
    for kind, cls in DEVICES.items():
        if kind == chosen:
            device = cls()
            number = f"{facts.count(kind)} x " if kind != "cpu" else ""
            result.append(Finding("device", f"{kind} (chosen)", number + device.describe()))
        elif cls.available():
            result.append(Finding("device", kind, "available, not chosen", "info"))
        else:
            result.append(Finding("device", kind, f"not available: {cls.why_unavailable()}", "info"))
    return result


def version_findings(kind: str) -> list[Finding]:
    """One line for each version, and one for each pair that does not belong together."""
    found = versions(kind)
    wanted = _wanted()
    result = []
    for name in LIBRARIES:
        if name not in found:
            result.append(Finding(TOPIC, name, "not installed", "problem", f"pip install '{wanted.get(name, name)}'"))
    for name, version in found.items():
        requirement = wanted.get(name)
        if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
            result.append(Finding(
                TOPIC, name, f"{version}; this program needs {requirement.specifier}", "problem",
                f"pip install '{requirement}'",
            ))  # fmt: skip
        elif name == "gloo" and version != "available":
            result.append(Finding(TOPIC, name, version, "problem", "install a build of torch with gloo"))
        else:
            result.append(Finding(TOPIC, name, version))
    return result + pairing_findings(found)


def pairing_findings(found: dict[str, str]) -> list[Finding]:
    """torch_npu beside torch and CANN."""
    release = found.get("torch_npu") or found.get("torch-npu")
    if release is None:
        return []
    result = []
    if not facts.fits_torch_npu(release, found["torch"]):
        result.append(Finding(
            TOPIC, "torch_npu with torch", f"{release} was built for another torch than {found['torch']}",
            "problem", f"pip install torch=={release.split('.post')[0].split('rc')[0]}",
        ))  # fmt: skip
    cann, documented = found.get("CANN, and HCCL in it"), facts.documented_cann(release)
    if cann is None:
        return result
    if documented is None:
        result.append(Finding(
            TOPIC, "torch_npu with CANN", f"{release} with CANN {cann}: not a pair known here", "warning",
            "compare them with the table in torch_npu's README",
        ))  # fmt: skip
    elif not cann.startswith(documented):
        result.append(Finding(
            TOPIC, "torch_npu with CANN", f"{release} is documented for CANN {documented}, here is {cann}",
            "warning", f"if operators fail, install CANN {documented} or the torch-npu of CANN {cann}",
        ))  # fmt: skip
    else:
        result.append(Finding(TOPIC, "torch_npu with CANN", "a documented pair"))
    return result


def _installed(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)  # with the build, e.g. +cu128
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted() -> dict[str, Requirement]:
    """What this package's metadata ask for; nothing where it runs from its sources without being installed."""
    try:
        lines = importlib.metadata.requires("modellink_lora") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {r.name: r for r in requirements if r.marker is None}
