"""The `modellink-lora` command: picks the job, and turns what users can mend into one line and an exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

from modellink_lora import __version__
from modellink_lora.cli.ending import record_error, watch_launcher
from modellink_lora.config.errors import as_user_error, printable

JOBS = {
    "preprocess": "turn conversations into token files",
    "doctor": "look at devices, versions, links and room here, and check a training script before it runs",
    "plan": "list the layouts of a model that fit on so many devices, and the command of the fastest",
    "train": "fine-tune with LoRA",
    "verify": "check gradients and layouts on your own model and devices",
    "convert": "translate, reshard and merge checkpoints",
    "report": "write the report of a training run again from its folder",
    "infer": "answer prompts, chat, or serve an API or a web page, with the adapter unmerged",
    "evaluate": "judge base and tuned model on mmlu and other benchmarks",
    "lm-eval": "run lm-eval's tasks on base or tuned model, e.g. lm-eval --load BASE -- --tasks arc_easy",
    "compare": "compare the answers of base, unmerged adapter and merged models on the same prompts",
    "logits": "write the logits of prompts, from a base with or without its adapter",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return run(lambda: print(_listing(), flush=True))
    if words[0] == "--version":
        return run(lambda: print(f"modellink_lora {__version__}", flush=True))
    if words[0] not in JOBS:
        print(f"modellink-lora: error: no job {words[0]!r}; choose {', '.join(JOBS)}", file=sys.stderr)
        return 2
    # imported by name only now: one job must not wait for, or need, the libraries of another
    return run(lambda: import_module(f"modellink_lora.cli.{words[0].replace('-', '_')}").main(words[1:]))


# All processes of a run usually fail for the same reason. The launcher stops the others once one has ended: those that
# are not the first wait that long before they speak, so that the reason is read once, and an error of theirs alone too.
# On a busy machine the first needs a few seconds to end.
_PATIENCE_SECONDS = 10.0


def run(job: Callable[[], int | None]) -> int:
    """The exit status of `job`: 1 after one line for an error of the user, 130 after Ctrl-C.

    Errors of processes that have joined each other do not come here: cli/processes.py ends those.
    """
    watch_launcher()
    try:
        return job() or 0
    except KeyboardInterrupt:
        print(f"{_rank_prefix()}stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be printed, at the end of Python either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # 128 + SIGPIPE, as of a program that does not catch it
    except Exception as error:
        mendable = as_user_error(error)
        if mendable is None:
            record_error(f"{_rank_prefix()}{type(error).__name__}: {error}", error)
            raise
        line = f"{_rank_prefix()}error: {printable(str(mendable))}"
        record_error(line)
        if _rank_prefix():
            time.sleep(_PATIENCE_SECONDS)
        print(line, file=sys.stderr)
        return 1


def _rank_prefix() -> str:
    """Names the process when it is not the first, whose lines are the ones people read."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _listing() -> str:
    width = max(map(len, JOBS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in JOBS.items()]
    return "\n".join(
        [
            f"modellink-lora {__version__}: LoRA fine-tuning on Megatron-style parallelism",
            "",
            "usage: modellink-lora JOB [--flag value ...]",
            "",
            *lines,
            "",
            "modellink-lora JOB --help shows the flags of a job.",
            "Several processes: torchrun --nproc-per-node N -m modellink_lora train ...",
        ]
    )
