"""A conversation at the terminal, or on a pipe: commands, streamed answers, one history for each model that answers."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.history import History
from modellink_lora.inference.request import BASE, TUNED, Choice, NotFinite, Request, default_choice
from modellink_lora.inference.tasks import sampling_of

_QUIT, _CLEAR = ("q", "quit", "exit"), ("clear", "new")
_HELP = """\
q, quit, exit            end
clear, new               forget the conversation
/base                    the model without adapter answers
/tuned                   the model with the adapter of --lora-load answers
/adapter NAME [SCALE]    the adapter NAME answers, SCALE times as strong as trained
/both                    base and adapter answer each question
/help                    this list
Ctrl-C stops an answer; at the prompt it ends the chat."""


class Chat:
    """Which models answer, and what each of them remembers.

    Args:
        seed: of the first answer; each further one has the next.
    """

    def __init__(self, config: InferConfig, engine: Any, prompter: Any, *, seed: int, console: Console) -> None:
        self._config, self._engine, self._prompter = config, engine, prompter
        self._seed, self._console = seed, console
        self._tuned = default_choice(engine.choices, config.adapter_scale)
        self.choices = [self._tuned]
        self._histories: dict[str, History] = {}

    def run(self, read: Callable[[str], str] = input) -> None:
        """Until q, the end of the input, or Ctrl-C at the prompt."""
        if self._console.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrow keys in input()
        self._say(f"Chat with {self._names()}. /help lists the commands, q ends.")
        while True:
            try:
                line = read("\nYou >> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._say("")
                return
            if line.lower() in _QUIT:
                return
            if line.lower() in _CLEAR:
                self._histories.clear()
                self._console.clear()  # nothing on a pipe
                self._say("The conversation starts anew.")
            elif line.startswith("/") and "/" not in line.split()[0][1:]:
                self._command(*line.split())
            elif line:
                for choice in self.choices:
                    if not self._answer(line, choice):
                        break

    def _command(self, name: str, *words: str) -> None:
        try:
            if name == "/base":
                self.choices = [Choice(BASE)]
            elif name == "/tuned":
                self.choices = [self._chosen(TUNED)]
            elif name == "/both":
                if not self._engine.choices:
                    raise UserError("there is no adapter beside the base: give --lora-load")
                self.choices = [Choice(BASE), next((c for c in self.choices if c.adapter != BASE), self._tuned)]
            elif name == "/adapter" and len(words) in (1, 2):
                self.choices = [self._chosen(*words)]
            else:
                self._say(_HELP if name == "/help" else f"{' '.join((name, *words))}: no such command\n{_HELP}")
                return
        except UserError as error:
            self._say(str(error))
            return
        self._say(f"Now {self._names()} will answer.")

    def _chosen(self, name: str, scale: str | None = None) -> Choice:
        known = (BASE, *self._engine.choices)
        if name not in known:
            raise UserError(f"no adapter {name}; there are {', '.join(known)}")
        try:
            given = self._config if scale is None else dataclasses.replace(self._config, adapter_scale=float(scale))
            return Choice(name, given.adapter_scale)
        except ValueError:
            raise UserError(f"/adapter {name} {scale}: the scale is a number, 1 is as trained") from None

    def _answer(self, question: str, choice: Choice) -> bool:
        """Whether it was given to its end."""
        history = self._histories.setdefault(
            choice.adapter, History(self._prompter, self._config.history_turns, self._prompter.has_template)
        )
        try:
            room = min(self._config.max_new_tokens, self._engine.max_length // 2)
            ids = history.ask(question, longest=self._engine.max_length - room, tell=self._say)
        except UserError as error:
            self._say(str(error))
            return False
        name = "ModelLink" if len(self.choices) == 1 else f"ModelLink ({choice.adapter})"
        sampling = sampling_of(self._config, seed=self._seed)
        self._seed += 1
        request = Request(tuple(ids), room, sampling, self._prompter.stop_ids, self._config.stop, choice)
        pieces: list[str] = []
        try:
            with contextlib.closing(self._engine.stream(request)) as tokens, _interruptible() as interrupted:
                for token in tokens:
                    if not pieces:  # not before: the engine may have had something to say
                        self._console.print(f"{name}:", style="bold cyan", end=" ", highlight=False, markup=False)
                    pieces.append(token.text)
                    self._console.file.write(token.text)
                    self._console.file.flush()
                    if interrupted():
                        break
                stopped = interrupted()
        except NotFinite as error:
            self._say("")
            if not self._console.is_terminal:  # a program reads on: let it fail
                raise
            self._say(f"error: {error}")
            return False
        self._say(" [stopped]" if stopped else "")
        history.add(question, "".join(pieces))
        return not stopped

    def _names(self) -> str:
        return " and ".join(c.adapter if c.scale == 1 else f"{c.adapter} x {c.scale:g}" for c in self.choices)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside the block is noted: an exception amidst a token would leave processes at different places."""
    seen: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, former)
