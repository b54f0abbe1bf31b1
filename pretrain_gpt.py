"""Train on plain text; with --is-instruction-dataset the same as posttrain_gpt.py."""

import sys

from modellink_lora.cli.main import run


def job() -> int:
    from modellink_lora.cli.train import main  # seconds of imports, in which the launcher is watched already

    return main(pretrain=True)


if __name__ == "__main__":
    sys.exit(run(job))
