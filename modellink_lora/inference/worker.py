"""Many askers, one engine: requests of other threads are computed together by the thread that calls run().

That is the main thread: a device's context and the process group belong to it, and an error in it ends the process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.inference.request import NotFinite, Request, Token

_LOOK_SECONDS = 0.1  # how often an idle engine looks whether it is to stop


class Ended(Exception):
    """Instead of a token: the answer ends here, for the reason in the message."""


class NoAnswer(Ended):
    """Ended because the model's logits for this request are not finite."""


class Busy(Exception):
    """Too many requests are waiting."""


class Answer:
    """Requests that were asked together; `deliver(index, token or Ended)` is called for each of them, in the worker."""

    def __init__(self, requests: Sequence[Request], deliver: Callable[[int, Token | Ended], None]) -> None:
        self.requests, self.deliver = requests, deliver
        self.cancelled = False


class Worker:
    """Args:
    engine: is called by run() only, but for engine.check.
    most: unfinished requests at a time, running and waiting.
    """

    def __init__(self, engine: Any, *, most: int) -> None:
        self._engine, self._most = engine, most
        self._inbox: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()
        self._running: dict[int, tuple[Answer, int]] = {}  # number in the engine -> whose, and which of its requests
        self._lock = threading.Lock()
        self._unfinished = 0
        self._closed: str | None = None  # why nothing more is taken

    def ask(self, requests: Sequence[Request], deliver: Callable[[int, Token | Ended], None]) -> Answer:
        """From any thread. Raises UserError for a request that cannot be computed, Busy, or Ended when closing."""
        for request in requests:
            self._engine.check(request)
        answer = Answer(requests, deliver)
        with self._lock:
            if self._closed:
                raise Ended(self._closed)
            if self._unfinished + len(requests) > self._most:
                raise Busy(f"{self._unfinished} requests are being answered or wait: try again later")
            self._unfinished += len(requests)
            self._inbox.put(("ask", answer))
        return answer

    def cancel(self, answer: Answer) -> None:
        """From any thread; without effect on an answer that has ended."""
        answer.cancelled = True
        self._inbox.put(("cancel", answer))

    def run(self, stopping: Callable[[], bool], *, closing: Callable[[], None], patience: float = 5.0) -> None:
        """Compute until `stopping`, then finish what runs within `patience` seconds and cut the rest.

        Args:
            closing: called once when nothing more is taken.
        """
        limit = float("inf")
        try:
            while True:
                self._take(wait=not self._engine.busy and limit == float("inf"))
                if limit == float("inf") and stopping():
                    self._close("the server is shutting down")
                    limit = time.monotonic() + patience
                    closing()
                    self._take(wait=False)
                if self._engine.busy:
                    self._step()
                elif limit < float("inf"):
                    return
                if time.monotonic() > limit:
                    self._cut("the server is shutting down")
                    return
        except BaseException as error:
            self._close("the engine has failed")
            self._cut(f"the engine has failed: {type(error).__name__}")
            raise

    def _take(self, *, wait: bool) -> None:
        """Everything that has come in; with `wait` not at once, if there is nothing."""
        while True:
            try:
                what, answer = self._inbox.get(timeout=_LOOK_SECONDS) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            wait = False
            if what == "cancel":
                for number in [n for n, (owner, _) in self._running.items() if owner is answer]:
                    self._engine.cancel(number)
                    self._end(number, Ended("cancelled"))
                continue
            for index, request in enumerate(answer.requests):
                if answer.cancelled:  # before its turn came
                    self._finished(answer, index, Ended("cancelled"))
                    continue
                try:
                    self._running[self._engine.submit(request)] = (answer, index)
                except UserError as error:
                    self._finished(answer, index, Ended(str(error)))

    def _step(self) -> None:
        for number, token in self._engine.step():
            if number not in self._running:
                continue
            if isinstance(token, NotFinite):
                self._end(number, NoAnswer(str(token)))
            elif token.finish:
                self._end(number, token)
            else:
                answer, index = self._running[number]
                answer.deliver(index, token)

    def _end(self, number: int, last: Token | Ended) -> None:
        self._finished(*self._running.pop(number), last)

    def _finished(self, answer: Answer, index: int, last: Token | Ended) -> None:
        with self._lock:
            self._unfinished -= 1
        answer.deliver(index, last)

    def _close(self, reason: str) -> None:
        with self._lock:
            self._closed = reason

    def _cut(self, reason: str) -> None:
        """End every answer now. The engine is not asked any more: it is left behind, or has failed."""
        for number in list(self._running):
            self._end(number, Ended(reason))
        while True:
            try:
                what, answer = self._inbox.get_nowait()
            except queue.Empty:
                return
            if what == "ask":
                for index in range(len(answer.requests)):
                    self._finished(answer, index, Ended(reason))
