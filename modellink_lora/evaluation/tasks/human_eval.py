"""HumanEval (Chen et al. 2021, arXiv:2107.03374): functions to be written, judged by running the authors' tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.files import json_rows, split_files
from modellink_lora.evaluation.item import Item, Options, Task, conversation
from modellink_lora.evaluation.sandbox import passes

_CHAT_QUESTION = "Complete this Python function. Answer with the whole function in one code block.\n\n{prompt}"


def items(folder: Path, options: Options) -> list[Item]:
    """The problems; what judges an answer is kept in the item as the program's parts."""
    if options.num_shots:
        raise UserError(f"--num-shots {options.num_shots}: human_eval has no worked examples; leave the flag out or 0")
    files, _ = split_files(folder, task="human_eval")
    around = options.instruction or (_CHAT_QUESTION if options.chat else "{prompt}")
    found = []
    for number, row in enumerate(json_rows(files)[: options.most]):
        parts = {key: row.text(key) for key in ("prompt", "entry_point", "test")}
        asked = around.replace("{prompt}", parts["prompt"])
        prompt = conversation([], asked) if options.chat else asked
        found.append(Item("human_eval", number, prompt, json.dumps(parts)))
    return found


_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
# what a base model writes after the function's end, besides the next function
_BEHIND = re.compile(r"\n(?:def |class |if |print\(|#|@|assert |```)")


def read(item: Item, text: str) -> str:
    """The whole function: a code block that defines it, or the prompt continued by the answer up to the next thing."""
    parts = json.loads(item.answer)
    block = _BLOCK.search(text)
    code = block[1] if block else text
    if re.search(rf"^def {re.escape(parts['entry_point'])}\b", code, re.MULTILINE):
        head = parts["prompt"].split(f"def {parts['entry_point']}")[0]  # imports and helpers the function may use
        return f"{head}\n{code}"
    return parts["prompt"] + _BEHIND.split(code, maxsplit=1)[0]


def judge(prediction: str, item: Item) -> bool:
    parts = json.loads(item.answer)
    return passes(f"{prediction}\n\n{parts['test']}\n\ncheck({parts['entry_point']})\n")


TASK = Task(
    "human_eval", "human_eval", items, read, judge=judge, runs_code=True, max_new_tokens=512,
    stop=("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "\nassert "),
)  # fmt: skip
