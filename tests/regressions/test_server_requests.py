"""Requests that a server must answer with a reason, in time, and on one line of its log, whatever they are.

Slow clients: xorbitsai/inference#5213 (uvicorn waits for ever for a request). Log-probabilities that JSON cannot write:
sgl-project/sglang#5984 (status 500). The others were found by fuzzing.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi and uvicorn: pip install -e .[web]")

from modellink_lora.inference.listening import Limits
from tests.helpers.http_server import Letters, Served, answer, served

GOOD = {"prompt": "a", "max_tokens": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as server:
        yield server


def refused(got: tuple[int, Any], status: int, reason: str = "") -> None:
    assert got[0] == status and set(got[1]["error"]) == {"message", "type", "param", "code"}, got
    assert reason in got[1]["error"]["message"] and "\n" not in got[1]["error"]["message"], got


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff", b'{"prompt": "\xff"}', b'"', b"nul", b"[]", b"1", b"null", b'"prompt"', b"\x00", NESTED,
        b'{"prompt": ' + NESTED + b"}", b'{"logit_bias": ' + b"[" * 900 + b"]" * 900 + b', "prompt": "a"}',
        b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "\\ud800": "\\udfff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": ["a", "\\ud800"]}', b'{"prompt": "a", "model": "\\ud800"}', b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"prompt": "a", "stream_options": {"\\ud800": 1}, "stream": true}', b'{"prompt": "a", "\\n\\u001b[2J": 1}',
        b'{"prompt": "a", "echo": "\\ud800"}', b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": [' + b"9" * 4000 + b"]}", b'{"prompt": "a", "x": ' + b"9" * 4000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(server: Served, body: bytes) -> None:
    status = 404 if b'"model"' in body and b"ud800" not in body else 400
    refused(server.request("/v1/completions", body), status)
    refused(server.request("/v1/chat/completions", body), 404 if status == 404 else 400)


ODD: list[Any] = [
    True, "", "\ud800", "\x00", -1, 0.5, 10**30, -(10**30), 1e308, 5e-324, math.nan, -math.inf, [], [[]], ["x", 1],
    [[1], "x"], [10**30], {}, {"x": []}, [{}], [{"role": []}],
    [{"role": "user"}], [{"role": "user", "content": {"a": 1}}], [{"role": "user", "content": [{"text": 1}]}],
    [{"role": "user", "content": "a", "\ud800": 1}], [{"role": "owl", "content": "a"}], ["x"] * 17, [""],
]  # fmt: skip
FIELDS = (
    "prompt", "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "seed", "stop", "n", "best_of", "logprobs", "top_logprobs", "stream", "stream_options",
    "adapter_scale", "echo", "suffix", "logit_bias", "user", "metadata", "tools", "response_format", "min_tokens",
)  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_any_type_is_an_answer_or_a_refusal(server: Served, field: str, chat: bool) -> None:
    base = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    for value in ODD:
        body = json.dumps({**base, field: value}).encode()
        with server.connect() as client:
            head = f"POST /v1/{'chat/' * chat}completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            status, text = answer(client)
        assert status in (200, 400, 404), (field, value, status, text)
        if status != 200:
            refused((status, json.loads(text)), status)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, math.inf])
def test_a_logprob_that_json_cannot_write_is_a_finite_one(logprob: float) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    with served(engine=Letters(logprob)) as server:
        status, body = server.post({**GOOD, "logprobs": 2})
        assert status == 200 and body["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
        assert set(body["choices"][0]["logprobs"]["top_logprobs"][0].values()) == {-9999.0}
        status, body = server.post(chat, chat=True)
        assert status == 200 and body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
        body = json.dumps({**chat, "stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
        status, text = server.send(head + body)
        assert status == 200 and b"-9999.0" in text and b"NaN" not in text and b"Infinity" not in text


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\r\n" * 9000,
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\nB\r\x00: c\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000,
        b"GET /" + b"x" * 20_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=lambda content: repr(content[:40]),
)  # fmt: skip
def test_what_is_not_http_is_refused_in_the_same_form(server: Served, content: bytes) -> None:
    status, body = server.send(content)
    refused((status, json.loads(body)), 400, "not an HTTP request")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/%00", 404), ("GET", "/%00", 404), ("GET", "/v1/models/%ff%fe", 404), ("GET", "//", 404),
        ("GET", "/v1/models/" + "x" * 9000, 404), ("GET", "/v1/models/", 404), ("GET", "*", 404),
        ("OWL", "/v1/models", 405), ("PUT", "/v1/completions", 405), ("GET", "http://b:c/v1/models", 404),
        ("CONNECT", "b:80", 404), ("get", "/v1/models", 405),
    ],
)  # fmt: skip
def test_unknown_paths_and_methods_are_refused(server: Served, method: str, path: str, status: int) -> None:
    got = server.request(path, method=method)
    refused(got, status)
    assert len(got[1]["error"]["message"]) < 300


@pytest.mark.parametrize("host", ["[", "a b", "]:x", "", "[::1", "a:99999999"])
def test_a_bad_host_header_is_not_an_error_of_the_server(server: Served, host: str) -> None:
    status, _ = server.send(f"GET /nowhere HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert status in (400, 404)


def test_a_client_that_shuts_down_amidst_its_body_is_no_error(server: Served) -> None:
    with server.connect() as client:
        client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 90\r\n\r\n{"prompt"')
    until(lambda: any(" 499 " in line for line in server.log))
    assert not any("error" in line for line in server.log)


FORGED = "POST /v1/completions 200 9 tokens 0.01 s"


@pytest.mark.parametrize(
    "path",
    [f"/v1/models/x%0a{FORGED}", f"/v1/models/x%0d%0a{FORGED}", f"/x%E2%80%A8{FORGED}", "/x%1b[2J", "/%c2%85", "/%7f",
     f"/?a=%0a{FORGED}", "/x%00", "/" + "x" * 9000],
)  # fmt: skip
def test_no_path_writes_lines_of_its_own_into_the_log(path: str) -> None:
    with served() as server:
        server.request(path.replace(" ", "%20"))
        (line,) = server.log
    method, shown, status, *_ = line.split(" ")
    assert (method, status) == ("GET", "404") and line.isprintable() and line.isascii() and len(line) < 300
    assert shown.removesuffix("...") in path.replace(" ", "%20"), "as it was sent"


def test_an_error_of_the_server_is_one_line_too() -> None:
    class Broken(Letters):
        def plain(self, text: str) -> list[int]:
            raise RuntimeError(f"cannot read\n{FORGED}\x1b[2J")

    with served(engine=Broken()) as server:
        refused(server.post(GOOD), 500, "the server made a mistake: RuntimeError")
        assert all(line.isprintable() for line in server.log) and "RuntimeError" in server.log[0]


def until(true: Any, seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n"


@pytest.mark.parametrize(
    ("sent", "part", "dripping"),
    [
        (b"", "headers", False), (HEAD, "headers", False), (HEAD + b"\r\n{", "body", False),
        (b"POST /v1", "headers", True), (HEAD, "headers", True), (HEAD + b"\r\n{", "body", True),
    ],
)  # fmt: skip
def test_a_slow_client_is_told_and_closed(sent: bytes, part: str, dripping: bool) -> None:
    with served(limits=Limits(header_seconds=0.4, body_seconds=0.6)) as server:
        began = time.monotonic()
        with server.connect() as client:
            client.sendall(sent)
            for _ in range(400 if dripping else 0):  # twenty seconds
                client.settimeout(0.05)
                try:
                    client.sendall(b" " if part == "body" else b"a" if b"\r" not in sent else b"X")
                    if client.recv(1, socket.MSG_PEEK):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                assert not dripping, "a byte now and then keeps the connection"
            client.settimeout(10)
            status, body = answer(client)
        assert time.monotonic() - began > 0.3
        refused((status, json.loads(body)), 408, f"the {part} of the request did not arrive within")
        assert server.post(GOOD)[0] == 200


def test_the_second_request_of_a_connection_has_the_same_limits() -> None:
    with served(limits=Limits(header_seconds=0.4)) as server, server.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /hea")
        client.settimeout(10)
        assert answer(client)[0] == 408


def test_a_client_that_does_not_read_its_answer_is_closed() -> None:
    with served(limits=Limits(read_seconds=0.4), max_waiting=2048) as server:
        body = json.dumps({"prompt": ["a"] * 2000, "logprobs": 2}).encode()
        ask = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect(("127.0.0.1", server.port))
            client.sendall(ask)
            until(lambda: server.log)
            time.sleep(0.8)
            status, text = answer(client)
            assert status == 200 and not text.endswith(b"}"), "the rest was not kept for it"
        assert server.post(GOOD)[0] == 200


def test_more_connections_than_allowed_are_turned_away_and_the_others_served() -> None:
    with served(limits=Limits(connections=3)) as server:
        held = [server.connect() for _ in range(3)]
        try:
            for client in held:  # so that the server has seen it
                client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
            with server.connect() as client:
                status, body = answer(client)
            refused((status, json.loads(body)), 503, "3 connections are open")
        finally:
            for client in held:
                client.close()
        until(lambda: server.post(GOOD)[0] == 200)
