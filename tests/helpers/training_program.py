"""`posttrain_gpt.py` for tests that kill it: a quicker heartbeat, and the exit status of each process in a file.

Words: a folder for the files `status.RANK`, then the flags of a training job. PATIENCE in the environment: how long a
process may be silent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from modellink_lora.cli.main import run


def job() -> int:
    from modellink_lora.cli import processes, train
    from modellink_lora.parallel.liveness import Timing

    patience = float(os.environ.get("PATIENCE", Timing.patience))
    processes.Timing = lambda: Timing(beat=0.5, patience=patience, alarmed=3.0)  # type: ignore[misc,assignment]
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    status = run(job)
    (Path(sys.argv[1]) / f"status.{os.environ.get('RANK', '0')}").write_text(str(status))
    sys.exit(status)
