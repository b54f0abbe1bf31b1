"""What `make` installs can be installed: with torch's CPU and CUDA builds, on each Python that the Makefile takes.

Seen in public as QwenLM/Qwen3-VL #1090: a pinned triton beside a torch that asks for another.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints-ci.txt"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.search(r"^SUPPORTED := (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()  # type: ignore[union-attr]
# what Requires-Dist of torch 2.13.0's CUDA wheel (cp313, manylinux_2_28_x86_64) names
CUDA_BUILD_REQUIRES = (
    "filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec", "cuda-toolkit",
    "cuda-bindings", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13", "triton",
)  # fmt: skip
# of the packages that read files of strangers or listen on a network: the release that mends the holes named beside it,
# on this Python
FLOORS = {"torch": "2.6", "transformers": "5.22", "jinja2": "3.1.6", "pyarrow": "14.0.1", "sentencepiece": "0.2.1",
          "protobuf": "6.33.5", "tqdm": "4.66.3", "pyyaml": "5.4", "uvicorn": "0.11.7", "starlette": "1.3.1",
          "gradio": "6.16"}  # fmt: skip


def constraints() -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def requirements() -> list[Requirement]:
    """All that the extras dev and demo install, ourselves and lm-eval, which comes as source only, left out."""
    extras = PROJECT["optional-dependencies"]
    names = ("dev", "demo", *re.findall(r"[a-z]+", re.search(r"\[(.+)\]", extras["dev"][0]).group(1)))  # type: ignore[union-attr]
    found = [Requirement(line) for line in (*PROJECT["dependencies"], *(x for name in names for x in extras[name]))]
    here = [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate()]
    return [requirement for requirement in here if requirement.name not in ("modellink_lora", "lm-eval")]


def test_nothing_that_torch_requires_is_pinned_beside_it() -> None:
    here = [Requirement(line).name for line in importlib.metadata.requires("torch") or []]
    names = {canonicalize_name(name) for name in (*here, *CUDA_BUILD_REQUIRES)} - {"pyyaml"}
    assert not names & constraints().keys()


def test_every_pin_is_one_of_a_version_that_the_package_takes() -> None:
    pins = constraints()
    for requirement in requirements():
        pin = pins.get(canonicalize_name(requirement.name))
        for specifier in pin.specifier if pin else ():
            assert requirement.specifier.contains(specifier.version), f"{pin} is not {requirement}"


def test_libraries_that_read_files_of_strangers_have_a_floor() -> None:
    found = {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements()}
    for name, mended in FLOORS.items():
        floors = [Version(specifier.version) for specifier in found[name] if specifier.operator == ">="]
        assert floors and floors[0] >= Version(mended), f"{name}{found[name]} lets in releases before {mended}"


def test_setup_py_says_what_pyproject_says() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    from modellink_lora import __version__

    assert done.stdout.split()[-2:] == [PROJECT["name"], __version__]


def test_make_names_the_python_it_wants(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile", ".venv/bin/python", f"PYTHON={old}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and f"{old} is Python 3.9, the tests run on 3.11 3.12 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_environment_that_was_not_completed_is_removed(tmp_path: Path) -> None:
    """Debian's python3 without python3-venv fails after it has made .venv/bin/python."""
    half = tmp_path / "python3"
    half.write_text(
        '#!/bin/sh\n[ "$1" = -m ] || { echo 3.12; exit 0; }\nmkdir -p .venv/bin; touch .venv/bin/python; exit 1\n'
    )
    half.chmod(0o755)
    make = ["make", "-f", ROOT / "Makefile", ".venv/bin/python", f"PYTHON={half}"]
    assert subprocess.run(make, cwd=tmp_path, capture_output=True).returncode == 2
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("build", ["configured", "PyPI's"])
@pytest.mark.parametrize("python", PYTHONS)
def test_everything_resolves(python: str, build: str, tmp_path: Path) -> None:
    """`configured` is the torch that pip finds here, a CPU build where one is offered; PyPI's is built for CUDA."""
    environment = dict(os.environ)
    if build != "configured":
        environment = {k: v for k, v in environment.items() if not k.startswith("PIP_") or k == "PIP_CERT"}
        environment["PIP_CONFIG_FILE"] = os.devnull
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:",
        f"--python-version={python}", f"--target={tmp_path}", f"--report={tmp_path}/report.json", "-c", CONSTRAINTS,
        "torch==2.13.0", *map(str, requirements()),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "ConnectionError" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("no package index is reached from here")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        p["metadata"]["name"]: p["metadata"] for p in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    assert found["torch"]["version"].startswith("2.13.0") and "triton" in found
    if build != "configured":
        assert any(line.startswith("triton==") for line in found["torch"]["requires_dist"]), "that is no CUDA build"
