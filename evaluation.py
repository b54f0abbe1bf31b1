"""Judge a model, base and tuned in one run, on mmlu and other benchmarks; `--help` lists the flags."""

import sys

from modellink_lora.cli.main import run


def job() -> int:
    from modellink_lora.cli.evaluate import main  # imports of a second, in which the launcher is watched already

    return main()


if __name__ == "__main__":
    sys.exit(run(job))
