"""Answer prompts with a base model and its adapter, chat, or serve them; `--help` lists the flags."""

import sys

from modellink_lora.cli.main import run


def job() -> int:
    from modellink_lora.cli.infer import main  # seconds of imports, in which the launcher is watched already

    return main()


if __name__ == "__main__":
    sys.exit(run(job))
