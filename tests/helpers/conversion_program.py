"""A conversion in a process of its own, for tests that kill it or watch its memory.

    python conversion_program.py [convert_ckpt.py's flags]

Prints `anonymous BYTES`: the most anonymous memory beyond what the imports took.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
from pathlib import Path


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def main() -> None:
    from modellink_lora.cli.convert import main as convert

    importlib.import_module("modellink_lora.convert.execute")  # what the job imports late
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert(sys.argv[1:])
    finally:
        done.set()
        watcher.join()
    print(f"anonymous {most[0] - before}")


if __name__ == "__main__":
    main()
