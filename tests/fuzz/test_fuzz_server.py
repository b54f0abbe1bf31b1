"""Seeded bytes and JSON against the real HTTP server: an answer or a refusal, never status 500, never silence.

Seen in public as vllm-project/vllm#35438: a malformed `response_format` was answered with status 500.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi and uvicorn: pip install -e .[web]")

from modellink_lora.inference.listening import Limits
from tests.helpers.http_server import Served, served

FAST, SLOW = 60, 3000  # a third of a second for each request that is never completed
VALUES: list[Any] = [
    None, True, 0, -1, 3, 10**30, 0.5, 1e308, 5e-324, math.nan, math.inf, "", "x", "\ud800", "\x00", "é" * 50, [], [[]],
    ["x"], [3], [-1], {}, {"x": []}, [{"role": "user", "content": "a"}], [{"role": [], "content": {}}],
]  # fmt: skip
NAMES = ["prompt", "messages", "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "best_of",
         "logprobs", "top_logprobs", "stream", "stream_options", "adapter_scale", "echo", "\ud800", "x\n"]  # fmt: skip
GOOD = {"prompt": "a", "max_tokens": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(limits=Limits(header_seconds=0.3, body_seconds=0.3)) as server:
        yield server


def content(choose: random.Random) -> bytes:
    """A request, of which the fields, the JSON, the headers or the bytes are damaged."""
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    body.pop(choose.choice(list(body)))
    for name in choose.sample(NAMES, choose.randrange(4)):
        body[name] = choose.choice(VALUES)
    text = bytearray(json.dumps(body).encode())
    if choose.random() < 0.3:
        damage(text, choose)
    length = len(text) if choose.random() < 0.9 else choose.choice([0, -1, len(text) + 9, 10**30, "x"])
    path = choose.choice(["/v1/completions", "/v1/chat/completions", "/v1/models/%00%0a", "/%ff", "*"])
    method = choose.choice(["POST", "POST", "POST", "GET", "OWL", "HEAD"])
    head = bytearray(f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}".encode())
    if choose.random() < 0.2:
        damage(head, choose)
    return bytes(head + b"\r\n\r\n" + text)


def damage(data: bytearray, choose: random.Random) -> None:
    for _ in range(choose.randrange(1, 4)):
        place = choose.randrange(len(data))
        data[place : place + choose.randrange(3)] = choose.randbytes(choose.randrange(3))


def fuzz(server: Served, numbers: range) -> None:
    good = server.post(GOOD)[1]["choices"]
    for number in numbers:
        sent = content(random.Random(number))
        status, _ = server.send(sent)
        assert status == 200 or 400 <= status < 500, (number, status, sent)
    assert server.post(GOOD)[1]["choices"] == good
    assert all(line.isprintable() and "error" not in line for line in server.log)


def test_damaged_requests_are_answered_or_refused(server: Served) -> None:
    fuzz(server, range(FAST))


@pytest.mark.slow
def test_many_more_damaged_requests_are_answered_or_refused(server: Served) -> None:
    fuzz(server, range(FAST, FAST + SLOW))
