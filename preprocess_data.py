"""Turn a data set into token files; `--help` lists the flags."""

import sys

from modellink_lora.cli.main import run

if __name__ == "__main__":
    from modellink_lora.cli.preprocess import main

    sys.exit(run(main))
