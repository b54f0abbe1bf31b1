"""Translate, reshard and merge checkpoints; `--help` lists the flags."""

import sys

from modellink_lora.cli.main import run

if __name__ == "__main__":
    from modellink_lora.cli.convert import main

    sys.exit(run(main))
