"""Fine-tune a model, with LoRA when --lora-target-modules is given; `--help` lists the flags."""

import sys

from modellink_lora.cli.main import run

if __name__ == "__main__":
    from modellink_lora.cli.train import main

    sys.exit(run(main))
