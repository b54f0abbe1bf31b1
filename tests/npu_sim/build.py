"""Gets torch_npu's wheel and compiles the simulated CANN libraries, once, into a cache folder outside the repository.

The wheel never enters the environment that runs the tests: once it is installed, a plain `import torch` loads it and
fails where CANN is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TORCH_NPU = "2.13.0"  # runs with the torch release of the same number
SOURCES = Path(__file__).parent / "cann"
# What torch_npu links; one library serves under all six names.
LIBRARIES = ("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
COMBINED = "libnpu_sim_cann.so"


class Unavailable(Exception):
    """The simulator cannot be had on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Build:
    site: Path  # holds the package torch_npu
    libraries: Path  # holds libascendcl.so and the others
    null: Path  # holds libopapi.so, whose operators do nothing


@functools.cache
def prepare() -> Build:
    """Both parts, made on the first call and found in the cache afterwards. Raises Unavailable."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    if torch != TORCH_NPU:
        raise Unavailable(f"the simulator is written for torch {TORCH_NPU}, here is {torch}")
    missing = [name for name in ("yaml", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"torch_npu needs {' and '.join(missing)}")
    cache = Path(os.environ.get("NPU_SIM_CACHE") or Path.home() / ".cache" / "modellink_lora" / "npu_sim")
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / "lock"):
        site = _site(cache)
        libraries = _libraries(cache, site)
        return Build(site, libraries, _null_operators(libraries, site))


def _site(cache: Path) -> Path:
    site = cache / f"torch_npu-{TORCH_NPU}-cp{sys.version_info.major}{sys.version_info.minor}"
    if site.is_dir():
        return site
    with _becoming(site) as folder, tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        _fetch(
            [
                *pip,
                "download",
                "--retries=1",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                wheels,
                f"torch-npu=={TORCH_NPU}",
            ]
        )
        _fetch([*pip, "install", "--no-deps", "--target", str(folder), *map(str, Path(wheels).glob("*.whl"))])
    return site


def _libraries(cache: Path, site: Path) -> Path:
    files = sorted(SOURCES.iterdir())
    contents = [file.name.encode() + file.read_bytes() for file in (Path(__file__), *files)]  # this file: the flags
    digest = hashlib.sha256(b"".join(contents))
    folder = cache / f"cann-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    if shutil.which("g++") is None:
        raise Unavailable("no C++ compiler: g++ is not on PATH")
    include = site / "torch_npu" / "include"
    with _becoming(folder) as temporary:
        command: list[str | Path] = (
            ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{COMBINED}", "-o", temporary / COMBINED]
            + [f"-I{include / 'third_party/acl/inc'}", f"-I{include}"]
            + [file for file in files if file.suffix == ".cpp"]
            + ["-lpthread"]
        )
        # an error here is one of ours and must fail the tests, not skip them
        subprocess.run([str(word) for word in command], check=True, timeout=600)
        for name in LIBRARIES:
            (temporary / f"{name}.so").symlink_to(COMBINED)
    return folder


def _null_operators(libraries: Path, site: Path) -> Path:
    """libopapi.so, out of which torch_npu takes each operator by name: here they note that they were launched.

    torch_npu asks `aclnnXGetWorkspaceSize(...)` for the operator's memory, which it has set to 0 before, then calls
    `aclnnX`. What it passes goes through functions that make an object: one address stands for all of them.
    """
    folder = libraries / "null"
    if folder.is_dir():
        return folder
    binary = (site / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    names = {match.decode() for match in re.findall(rb"\0(aclnn[A-Z]\w*)(?=\0)", binary)}
    names = {name.removesuffix("GetWorkspaceSize") for name in names}
    kinds = ("Tensor", "Scalar", "IntArray", "BoolArray", "FloatArray", "TensorList", "ScalarList")
    lines = ['#include "trace.h"', 'extern "C" {', "static int object;"]
    lines += [f"void *aclCreate{kind}() {{ return &object; }}" for kind in kinds]
    lines += [f"int aclDestroy{kind}() {{ return 0; }}" for kind in (*kinds, "AclOpExecutor")]
    for name in sorted(names):
        lines.append(f"int {name}GetWorkspaceSize() {{ return 0; }}")
        lines.append(f'int {name}() {{ npu_sim_note("{name}"); return 0; }}')
    with _becoming(folder) as temporary:
        source = temporary / "operators.cpp"
        source.write_text("\n".join([*lines, "}"]))
        command = ["g++", "-shared", "-fPIC", f"-I{SOURCES}", "-o", temporary / "libopapi.so", source]
        command += [f"-L{libraries}", f"-l:{COMBINED}"]
        subprocess.run([str(word) for word in command], check=True, timeout=600)
    return folder


def _fetch(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not get torch-npu {TORCH_NPU} in 10 minutes") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise Unavailable(f"torch-npu {TORCH_NPU} cannot be had: {lines[-1]}")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Test processes that start together build one after the other."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _becoming(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block succeeds."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    print(prepare())
