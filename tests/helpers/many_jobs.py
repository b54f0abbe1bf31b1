"""Runs many commands of this repository in the processes that torchrun has started once, one command after another.

A new process spends seconds on imports, and a fraction of one on a small model. Usage: torchrun … many_jobs.py FILE, a
JSON list of {"program", "words", "processes", "log"}. A command for one process is run by rank 0 alone. What a command
prints goes into its log; the first that fails ends all, with its log's name on standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

MAINS = {
    "preprocess_data.py": "preprocess", "convert_ckpt.py": "convert", "posttrain_gpt.py": "train",
    "inference.py": "infer", "evaluation.py": "evaluate",
}  # fmt: skip
OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def main(jobs: list[dict[str, Any]]) -> int:
    import torch.distributed as dist
    from megatron.core import parallel_state

    rank = int(os.environ["RANK"])
    place = {name: os.environ[name] for name in OF_A_LAUNCH}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, job in enumerate(jobs):
        alone = job["processes"] == 1
        if not alone or rank == 0:
            os.environ.update(place, TORCHELASTIC_RESTART_COUNT=str(number))  # else they meet at the last job's keys
            for name in OF_A_LAUNCH if alone else ():
                del os.environ[name]
            with Path(job["log"]).open("a") as log, contextlib.redirect_stdout(log):
                status = import_module(f"modellink_lora.cli.{MAINS[job['program']]}").main(job["words"])
            parallel_state.destroy_model_parallel()
            if status:
                print(f"status {status}: {job['log']}", file=sys.stderr)
                return 1
        store.set(f"done/{number}/{rank}", "")
        store.wait([f"done/{number}/0"])
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
