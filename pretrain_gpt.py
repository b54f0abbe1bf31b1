"""Train on plain text; with --is-instruction-dataset the same as posttrain_gpt.py."""

import sys

from modellink_lora.cli.main import run

if __name__ == "__main__":
    from modellink_lora.cli.train import main

    sys.exit(run(lambda: main(pretrain=True)))
