"""The benchmarks by name."""

from __future__ import annotations

from modellink_lora.config.evaluate import TASK_NAMES
from modellink_lora.evaluation.tasks import agieval, bbh, boolq, ceval, cmmlu, gsm8k, human_eval, mmlu

TASKS = {module.TASK.name: module.TASK for module in (mmlu, cmmlu, ceval, boolq, gsm8k, bbh, agieval, human_eval)}
assert tuple(TASKS) == TASK_NAMES
