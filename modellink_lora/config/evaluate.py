"""What an evaluation is told besides model and layout: tasks, data, prompts, scoring, where to write."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag

TASK_NAMES = ("mmlu", "cmmlu", "ceval", "boolq", "gsm8k", "bbh", "agieval", "human_eval")
DEFAULT_FOLDER = "evaluation_results"
_TEMPERATURE, _TOP_P, _TOP_K = 0.5, 0.9, 0  # of sampling, where one of the three is given


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    task: tuple[str, ...] = flag((), f"what to evaluate on: {' '.join(TASK_NAMES)}", choices=TASK_NAMES)
    task_data_path: tuple[str, ...] = flag((), "folder of each task's test files, in the order of --task")
    num_shots: int | None = flag(
        None,
        "worked examples before each question; default 5 where the data bring them, see docs/evaluation.md",
        at_least=0,
    )
    scoring: str = flag(
        "logprob",
        "compare the choices' log-probabilities, or let the model write and read its answer",
        choices=("logprob", "generate"),
    )
    eval_language: str | None = flag(
        None, "language of mmlu's, cmmlu's and ceval's prompts; default that of the data", choices=("en", "zh")
    )
    max_eval_samples: int | None = flag(None, "only the first so many questions of each subject", at_least=1)
    evaluation_batch_size: int | None = flag(
        None, "questions computed at once; the same as --max-batch-size", at_least=1
    )
    max_new_tokens: int | None = flag(
        None,
        "most tokens of a written answer; default 128, 512 for gsm8k, bbh and human_eval",
        at_least=1,
    )
    greedy: bool = flag(False, "write answers greedily, whatever the next three flags say")
    temperature: float | None = flag(
        None,
        f"sample written answers; default greedy, {_TEMPERATURE} if --top-p or --top-k is given",
        at_least=0,
    )
    top_p: float | None = flag(None, f"sampling: share of probability kept; default {_TOP_P}", above=0, at_most=1)
    top_k: int | None = flag(None, "sampling: so many most likely tokens are kept; default all", at_least=0)
    instruction_template: str | None = flag(None, "human_eval: text around each problem, with {prompt} in its place")
    no_chat_template: bool = flag(False, "plain prompts, although the tokenizer has a chat template; the default")
    tuned_only: bool = flag(False, "do not evaluate the base beside the adapter")
    allow_code_execution: bool = flag(
        False, "human_eval: run the code that the model writes, in a process with limits but no other protection"
    )
    save: str | None = flag(
        None, f"folder for the results, one folder a task in it; default {DEFAULT_FOLDER}/TASK-SETTINGS"
    )
    overwrite: bool = flag(False, "throw away what an earlier evaluation left in the folder")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.task:
            raise UserError(f"--task is missing: say what to evaluate on: {', '.join(TASK_NAMES)}")
        if len(set(self.task)) < len(self.task):
            raise UserError(f"--task {' '.join(self.task)}: names a task twice")
        if len(self.task) != len(self.task_data_path):
            raise UserError(
                f"--task names {len(self.task)} ({' '.join(self.task)}) and --task-data-path "
                f"{len(self.task_data_path)} ({' '.join(self.task_data_path) or 'nothing'}): give one folder for each "
                "task, in the same order"
            )
        if "human_eval" in self.task and not self.allow_code_execution:
            raise UserError(
                "--task human_eval runs code that the model writes: give --allow-code-execution, on a machine or in a "
                "container where that does no harm"
            )
        if self.instruction_template is not None and "{prompt}" not in self.instruction_template:
            raise UserError("--instruction-template must say with {prompt} where the problem goes")

    def sampling(self) -> tuple[float, float, int]:
        """(temperature, top-p, top-k) of written answers; temperature 0 is greedy."""
        if self.greedy or (self.temperature is None and self.top_p is None and self.top_k is None):
            return 0.0, 1.0, 0
        temperature = _TEMPERATURE if self.temperature is None else self.temperature
        top_p = _TOP_P if self.top_p is None else self.top_p
        return temperature, top_p, _TOP_K if self.top_k is None else self.top_k
