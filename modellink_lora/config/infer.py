"""What `inference.py` is told besides the model: which task, which prompts, how to sample, where to listen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag

BATCH_TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling")
TASKS = (*BATCH_TASKS, "chat", "server", "web")
DEFAULT_PROMPT = "how are you?"
KEY_VARIABLE = "MODELLINK_LORA_API_KEY"
_LONGEST_KEY = 1024
_PORTS = {"server": 8000, "web": 7860}


@dataclass(frozen=True)
class InferConfig:
    """Inference"""

    task: tuple[str, ...] = flag(
        (), f"any of {' '.join(TASKS)}; default the first four, then chat on a terminal", choices=TASKS
    )
    prompt: tuple[str, ...] = flag((), f"prompts to answer; default '{DEFAULT_PROMPT}'")
    prompt_file: str | None = flag(
        None, 'prompts: .txt lines, a .json list of texts, or .jsonl of {"prompt": ..} or {"messages": [..]}'
    )
    output: str | None = flag(None, "write the answers to this .jsonl file instead of printing them")
    max_new_tokens: int = flag(128, "most tokens of an answer", at_least=1)
    temperature: float = flag(0.7, "of sampling; 0 takes the most likely token", at_least=0)
    top_k: int = flag(50, "sample from that many of the most likely tokens; 0 from all", at_least=0)
    top_p: float = flag(
        0.95, "sample from the most likely tokens that together reach this probability", above=0, at_most=1
    )
    min_p: float = flag(
        0.0, "sample from tokens with at least this share of the best one's probability", at_least=0, at_most=1
    )
    repetition_penalty: float = flag(1.0, "above 1 makes tokens that were seen less likely", at_least=1e-3, at_most=1e3)
    num_beams: int = flag(2, "beams of a beam search", at_least=1)
    length_penalty: float = flag(1.0, "beams are compared by log-probability / length ** this")
    stop: tuple[str, ...] = flag((), "further texts that end an answer")
    adapter_scale: float = flag(1.0, "strength of the adapter: 0 is the base, 1 as trained", at_least=-1e6, at_most=1e6)
    history_turns: int = flag(3, "questions that a chat remembers, the newest included", at_least=1)
    host: str = flag("127.0.0.1", "address that server and web page listen on; by default this machine only")
    port: int | None = flag(
        None, "port of server (default 8000) or web page (default 7860); 0 takes a free one", at_least=0, at_most=65535
    )
    api_key: str | None = flag(
        None,
        "ask for this key: clients of the server as Authorization: Bearer KEY, browsers as the password of any user; "
        f"other users of this machine see it in `ps`: prefer --api-key-file or the variable {KEY_VARIABLE}",
    )
    api_key_file: str | None = flag(None, "read the key of --api-key from this file, of one line")
    max_waiting: int = flag(256, "requests that may wait for their turn; more are answered with status 429", at_least=1)
    max_request_bytes: int = flag(1 << 20, "longest request that server and web page read", at_least=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        _check(all(self.stop), "--stop", "''", "every text ends with nothing: give at least one character")
        _check(all(self.prompt), "--prompt", "''", "is empty: write something")
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt-file exclude each other: give one")
        if self.api_key is not None and self.api_key_file is not None:
            raise UserError("--api-key and --api-key-file exclude each other: give one")
        if self.api_key is not None:
            check_api_key(self.api_key, "--api-key")
        endless = [task for task in self.task if task not in BATCH_TASKS]
        if len(set(endless)) > 1 or (endless and self.task[-1] != endless[0]):
            raise UserError(
                f"--task {' '.join(self.task)}: {' and '.join(dict.fromkeys(endless))} end only when they are told to: "
                "give one of chat, server and web, as the last task"
            )
        if self.output is not None:
            if not self.output.endswith(".jsonl"):
                raise UserError(f"--output {self.output}: one JSON object a line is written: end its name with .jsonl")
            if not (self.prompt or self.prompt_file):
                raise UserError("--output is for the answers to your prompts: give --prompt or --prompt-file")
            if self.task and not self.batch_tasks:
                raise UserError(f"--output: {self.task[-1]} writes no file; choose a --task of {' '.join(BATCH_TASKS)}")

    @property
    def batch_tasks(self) -> Sequence[str]:
        """The tasks that answer prompts and end, each once."""
        return tuple(dict.fromkeys(task for task in self.task if task in BATCH_TASKS)) if self.task else BATCH_TASKS

    def last_task(self, *, terminal: bool) -> str | None:
        """chat, server or web, where one follows. Without --task it is a chat, if somebody is there to write."""
        if not self.task:
            return "chat" if terminal else None
        return self.task[-1] if self.task[-1] not in BATCH_TASKS else None

    def port_of(self, task: str) -> int:
        return _PORTS[task] if self.port is None else self.port


def check_api_key(key: str, where: str) -> None:
    """Raise UserError, which begins with `where` and does not show the key, for one that no client could send."""
    if not key:
        raise UserError(f"{where}: the key is empty: nobody would be kept out; write one, or leave it out")
    if not key.isprintable() or key != key.strip() or len(key) > _LONGEST_KEY:
        raise UserError(
            f"{where}: a key is one line of at most {_LONGEST_KEY} printable characters, without blanks around it"
        )


def _check(right: bool, flag: str, value: object, advice: str) -> None:
    if not right:
        raise UserError(f"{flag} {value}: {advice}")


_BEAM = ("beam_search", "beam_search_with_sampling")
_SAMPLED = ("do_sample", "beam_search_with_sampling", "chat", "server", "web")
_LISTENING = ("server", "web")
_EFFECT = {
    **dict.fromkeys(("prompt", "prompt_file"), BATCH_TASKS),
    **dict.fromkeys(("num_beams", "length_penalty"), _BEAM),
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), _SAMPLED),
    **dict.fromkeys(("host", "port", "max_waiting", "max_request_bytes", "api_key", "api_key_file"), _LISTENING),
    "repetition_penalty": ("greedy", "beam_search", *_SAMPLED),
    "history_turns": ("chat", "web"),
}


def without_effect(given: Iterable[str], tasks: Iterable[str]) -> list[str]:
    """A sentence for each field in `given` that none of `tasks` looks at."""
    running = set(tasks)
    return [
        f"--{name.replace('_', '-')} has no effect here: it is for --task {' '.join(_EFFECT[name])}"
        for name in given
        if name in _EFFECT and not running & set(_EFFECT[name])
    ]
