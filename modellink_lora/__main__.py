"""`python -m modellink_lora JOB ...`, the form that torchrun can start."""

import sys

from modellink_lora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
