"""HumanEval (Chen et al. 2021, arXiv:2107.03374): functions to be written, judged by running the authors' tests."""

from __future__ import annotations

import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.files import json_rows, split_files
from modellink_lora.evaluation.item import Item, Options, Task, conversation
from modellink_lora.evaluation.markup import without_reasoning
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


_BLOCK = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
# what a base model writes after the function's end, besides the next function
_AFTER = re.compile(r"\n(?:def |class |if |print\(|#|@|assert |```)")
_CODE = re.compile(r"^(?:async def|class|def|from [\w.]+ import|import|@)\b", re.MULTILINE)


def read(item: Item, text: str) -> str:
    """The whole program: a code block that defines the function, or the prompt continued by the answer.

    Of the ways in which an answer can be meant the first that is Python counts, by its syntax alone.
    """
    parts = json.loads(item.answer)
    ways = list(_programs(without_reasoning(text).replace("\r\n", "\n"), parts["prompt"], parts["entry_point"]))
    return next(filter(_is_python, ways), ways[0])


def _programs(text: str, prompt: str, name: str) -> Iterator[str]:
    """The programs that `text` can be meant to be, at least one."""
    defines = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    head = prompt.split(f"def {name}")[0]  # imports and helpers the function may use
    blocks = [found[2].rstrip("\n") for found in _BLOCK.finditer(text)]
    whole = [code for code in (*map(textwrap.dedent, blocks), text) if defines.search(code)]
    for code in whole:
        yield f"{head}\n{code}"
        lines = code[found.start() :].splitlines() if (found := _CODE.search(code)) else []  # prose before it
        for end in range(len(lines), 0, -1):  # and after it
            if end == len(lines) or not lines[end][:1].isspace():
                yield f"{head}\n" + "\n".join(lines[:end])
    if whole:
        return
    code = blocks[0] if blocks else text
    if code.strip() and not code.lstrip("\n")[0].isspace():
        yield prompt + textwrap.indent(code, "    ")  # a body that lost its indentation
    body = _AFTER.split(code, maxsplit=1)[0]
    yield prompt + body
    yield f"{prompt} {body}"  # SentencePiece drops the first blank of an answer


def _is_python(program: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in what a model wrote
            compile(program, "answer", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def judge(prediction: str, item: Item) -> bool:
    parts = json.loads(item.answer)
    return passes(f"{prediction}\n\n{parts['test']}\n\ncheck({parts['entry_point']})\n")


TASK = Task(
    "human_eval", "human_eval", items, read, judge=judge, runs_code=True, max_new_tokens=512,
    stop=("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "\nassert "),
)  # fmt: skip
