"""A job of two or more processes that does nothing but one collective after the other, for tests of how jobs end.

Words: what rank 1 does after ten of them (nothing, fail, bug), and the folder that rank 0 writes its progress to.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from modellink_lora.cli.main import run

BEAT, PATIENCE, ALARMED = 0.2, 3.0, 1.5


def job(what: str, folder: Path) -> int:
    import torch
    import torch.distributed as dist

    from modellink_lora.cli.launch import Launch
    from modellink_lora.cli.processes import joined
    from modellink_lora.cli.signals import stopping
    from modellink_lora.config.errors import UserError
    from modellink_lora.parallel.liveness import Timing

    launch = Launch.from_environment()
    timing = Timing(beat=BEAT, patience=PATIENCE, alarmed=ALARMED)
    with (
        stopping(launch, folder, seconds=4.0) as stop,
        joined(launch, device="cpu", timeout_minutes=1, stop=stop, timing=timing),
    ):
        step = 0
        while True:
            dist.all_reduce(torch.ones(()))
            step += 1
            time.sleep(0.02)
            if what != "loading":
                stop()
            if launch.is_first:
                (folder / "step").write_text(str(step))
            if step == 10 and launch.rank == 1 and what == "fail":
                raise UserError("--seed 7: an unlucky number;\n choose another")
            if step == 10 and launch.rank == 1 and what == "bug":
                raise KeyError("lost")
            if step == 50 and what == "finish":
                break
        if launch.rank == 1:
            time.sleep(6)  # the first must wait for the others: it may hold the store of the heartbeat
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: job(sys.argv[1], Path(sys.argv[2]))))
