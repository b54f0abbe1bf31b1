"""Prompts as users give them: words of the command line, or a file of texts or conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from modellink_lora.config.document import parse_document, read_text
from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import DEFAULT_PROMPT, InferConfig

ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, str]]
Prompt = str | Messages


class Encoder(Protocol):
    """What turns prompts into token ids; the engine's Prompter does."""

    def chat(self, messages: Sequence[Any]) -> list[int]: ...
    def text(self, prompt: str) -> list[int]: ...


def prompts_of(config: InferConfig) -> list[Prompt]:
    """The prompts to answer. Raises UserError for a file that holds none, or something else."""
    if config.prompt_file is None:
        return list(config.prompt or (DEFAULT_PROMPT,))
    path = Path(config.prompt_file)
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise UserError(f"--prompt-file {path}: give a .txt file of lines, a .json list or a .jsonl file")
    return read_conversations(path) if path.suffix == ".jsonl" else list(read_prompts(path))


def read_prompts(path: Path) -> list[str]:
    """The prompts in `path`. Raises UserError for a missing or empty file and for anything that is not text."""
    if not path.is_file():
        raise UserError(f"--prompt-file {path}: no such file")
    text = read_text(path)
    if path.suffix == ".txt":
        prompts = [line for line in text.splitlines() if line.strip()]
    else:
        prompts = parse_document(text, list[str], where=f"--prompt-file {path}")
        if not all(prompts):
            raise UserError(f'--prompt-file {path}: must be a JSON list of texts such as ["Who are you?"]')
    if not prompts:
        raise UserError(f"--prompt-file {path}: holds no prompt")
    return prompts


def read_conversations(path: Path) -> list[Prompt]:
    """The prompts of a .jsonl file: {"prompt": text} or {"messages": [..]} on each line."""
    if not path.is_file():
        raise UserError(f"--prompt-file {path}: no such file")
    lines = read_text(path).split("\n")
    prompts = [_prompt_of(line, f"--prompt-file {path} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {path}: holds no prompt")
    return prompts


def _prompt_of(line: str, where: str) -> Prompt:
    row = parse_document(line, Any, where=where)
    if isinstance(row, dict):
        if isinstance(row.get("prompt"), str) and row["prompt"]:
            return row["prompt"]
        if isinstance(row.get("messages"), list) and row["messages"]:
            return [_message(message, where) for message in row["messages"]]
    raise UserError(f'{where}: must be {{"prompt": "text"}} or {{"messages": [{{"role": "user", "content": ..}}]}}')


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
        raise UserError(f'{where}: a message is {{"role": one of {", ".join(ROLES)}, "content": "text"}}')
    return {"role": message["role"], "content": message["content"]}


def shown(prompt: Prompt) -> str:
    """The prompt as it stands after `You:`; of a conversation its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def encoded(prompt: Prompt, encoder: Encoder) -> tuple[int, ...]:
    return tuple(encoder.text(prompt) if isinstance(prompt, str) else encoder.chat(prompt))
