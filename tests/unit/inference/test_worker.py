"""Many askers and one engine: what each is told when the engine fails, ends, or its answer is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.inference.request import Request, Token
from modellink_lora.inference.worker import Busy, Ended, Worker


class Counting:
    """An engine whose answers are 1, 2, 3, ..; one prompt makes it fail, another it cannot compute."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.requests: list[Request] = []

    def check(self, request: Request) -> None:
        if request.ids == (13,):
            raise UserError("an unlucky number")

    def submit(self, request: Request) -> int:
        self.requests.append(request)
        self.running[len(self.requests) - 1] = 0
        return len(self.requests) - 1

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        del self.running[number]

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def step(self) -> list[tuple[int, Token]]:
        found = []
        for number in list(self.running):
            if self.requests[number].ids == (66,):
                raise RuntimeError("broken")
            self.running[number] += 1
            ended = self.running[number] == self.requests[number].max_new_tokens
            found.append((number, Token(self.running[number], "x", 0.0, finish="length" if ended else None)))
            if ended:
                del self.running[number]
        return found


class Asker:
    """Keeps what is delivered, and notices when everything has ended."""

    def __init__(self) -> None:
        self.got: dict[int, list[Token | Ended]] = {}

    def __call__(self, index: int, token: Token | Ended) -> None:
        self.got.setdefault(index, []).append(token)

    def ended(self, count: int) -> bool:
        last = [tokens[-1] for tokens in self.got.values()]
        return sum(isinstance(token, Ended) or token.finish is not None for token in last) == count


def request(*ids: int, length: int = 3) -> Request:
    return Request(ids, length)


def run(worker: Worker, until: Callable[[], bool], *, patience: float = 5.0) -> None:
    worker.run(until, closing=lambda: None, patience=patience)


def test_every_asker_gets_its_own_tokens_and_requests_run_together() -> None:
    engine, one, other = Counting(), Asker(), Asker()
    worker = Worker(engine, most=8)
    worker.ask([request(1), request(2, length=2)], one)
    worker.ask([request(3)], other)
    run(worker, lambda: one.ended(2) and other.ended(1))
    assert [token.id for token in one.got[0]] == [1, 2, 3] and [token.id for token in one.got[1]] == [1, 2]
    assert [token.id for token in other.got[0]] == [1, 2, 3]


def test_what_exceeds_the_queue_or_cannot_be_computed_is_refused_at_once() -> None:
    worker, asker = Worker(Counting(), most=2), Asker()
    with pytest.raises(UserError, match="unlucky"):
        worker.ask([request(1), request(13)], asker)
    worker.ask([request(1), request(2)], asker)
    with pytest.raises(Busy, match="2 requests"):
        worker.ask([request(3)], asker)
    run(worker, lambda: asker.ended(2))
    assert sorted(asker.got) == [0, 1]


def test_a_cancelled_answer_leaves_the_engine_and_its_place_in_the_queue() -> None:
    engine, asker, later = Counting(), Asker(), Asker()
    worker = Worker(engine, most=1)
    answer = worker.ask(
        [request(1, length=10**9)], lambda n, token: (asker(n, token), len(asker.got[0]) == 5 and worker.cancel(answer))
    )

    def stop() -> bool:
        if asker.ended(1) and not later.got:
            worker.ask([request(2)], later)
            later.got[0] = []
        return bool(later.got.get(0)) and later.ended(1)

    run(worker, stop)
    assert engine.cancelled == [0] and str(asker.got[0][-1]) == "cancelled" and len(later.got[0]) == 3


def test_a_failing_engine_tells_everybody_and_ends_the_run() -> None:
    worker, one, other = Worker(Counting(), most=8), Asker(), Asker()
    worker.ask([request(1, length=9)], one)
    worker.ask([request(66)], other)
    with pytest.raises(RuntimeError, match="broken"):
        run(worker, lambda: False)
    assert [str(asker.got[0][-1]) for asker in (one, other)] == ["the engine has failed: RuntimeError"] * 2
    with pytest.raises(Ended, match="failed"):
        worker.ask([request(2)], one)


def test_at_the_end_answers_are_finished_and_those_that_take_too_long_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count()  # each look at the clock is a second later, and there is one for every token
    monkeypatch.setattr("modellink_lora.inference.worker.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    short, long, late = Asker(), Asker(), Asker()
    worker = Worker(Counting(), most=8)
    worker.ask([request(1, length=50)], short)
    worker.ask([request(2, length=10**9)], long)
    refused = threading.Event()

    def closing() -> None:
        with pytest.raises(Ended, match="shutting down"):
            worker.ask([request(3)], late)
        refused.set()

    worker.run(lambda: True, closing=closing, patience=100)
    assert refused.is_set() and len(short.got[0]) == 50
    assert str(long.got[0][-1]) == "the server is shutting down" and not late.got
