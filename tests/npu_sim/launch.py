"""Runs a module or script in a process whose device "npu" is simulated: `python -m tests.npu_sim.launch TARGET args`.

TARGET is a module name as for `python -m`, or the path of a script. The environment of tests/helpers/npu.py is needed.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=".*ASCEND_HOME_PATH.*")  # there is no CANN to point at
warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")  # that is the purpose

import torch  # noqa: E402
import torch_npu  # type: ignore[import-not-found]  # noqa: E402, F401

from tests.npu_sim import simulator  # noqa: E402


def main() -> None:
    target, *args = sys.argv[1:]
    simulator.install()
    sys.argv = [target, *args]
    if target.endswith(".py"):
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")
    else:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    assert torch.npu.is_available(), "the simulated CANN libraries are not on LD_LIBRARY_PATH"
    main()
