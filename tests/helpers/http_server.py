"""The HTTP server in this process, over an engine that needs no model, and clients that write bytes to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.api_request import Reader
from modellink_lora.inference.listening import Limits, Listening, open_socket
from modellink_lora.inference.request import Request, Token
from modellink_lora.inference.server import make_application
from modellink_lora.inference.worker import Worker


class Letters:
    """An engine, its prompts and its tokenizer: tokens are letters, and every answer is xxx.

    Args:
        logprob: of every token.
    """

    choices = ("tuned",)
    max_length, vocab_size, has_template = 64, 128, False
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, logprob: float = -0.5) -> None:
        self._logprob = logprob
        self._running: dict[int, Request] = {}
        self._number = 0

    def plain(self, text: str) -> list[int]:
        return list(text.encode())

    text = plain

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if messages[-1]["role"] != "user":
            raise UserError("messages must end with a question")
        return self.plain("".join(message["content"] for message in messages))

    def check(self, request: Request) -> None:
        pass

    def submit(self, request: Request) -> int:
        self._number += 1
        self._running[self._number] = request
        return self._number

    def cancel(self, number: int) -> None:
        self._running.pop(number)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def step(self) -> list[tuple[int, Token]]:
        ended, self._running = self._running, {}
        top = [(120 + rank, self._logprob) for rank in range(2)]
        return [(n, Token(120, "xxx", self._logprob, tuple(top[: r.top_logprobs]), "stop")) for n, r in ended.items()]


class Served:
    """Args:
    log: the lines the server has written.
    """

    def __init__(self, port: int, log: list[str]) -> None:
        self.port, self.log = port, log

    def connect(self, seconds: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def send(self, content: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to these bytes, of which the last request asks to close the connection."""
        with self.connect() as client:
            client.sendall(content)
            return answer(client)

    def request(
        self, path: str, body: bytes | None = None, *, method: str | None = None, headers: Sequence[str] = ()
    ) -> tuple[int, Any]:
        """Status and body, which must be JSON."""
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "Host: a", "Connection: close"]
        if body is not None and not any(header.lower().startswith("content-length") for header in headers):
            lines.append(f"Content-Length: {len(body)}")
        status, text = self.send("\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + (body or b""))
        return status, json.loads(text) if text else None

    def post(self, fields: Any, *, chat: bool = False) -> tuple[int, Any]:
        return self.request(f"/v1/{'chat/' * chat}completions", json.dumps(fields).encode())


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer, after which the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):  # it has not read everything that we have sent
        while part := client.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


@contextlib.contextmanager
def served(*, limits: Limits | None = None, engine: Any = None, **flags: Any) -> Iterator[Served]:
    """A server on a port of 127.0.0.1, with these flags of inference.py."""
    config, engine, log = InferConfig(**flags), engine or Letters(), []  # type: ignore[var-annotated]
    worker, stopping = Worker(engine, most=config.max_waiting), threading.Event()
    reader = Reader(config, engine, engine, seed=1)
    application = make_application(config, reader, worker, lambda id, begins: chr(id).encode(), log.append)
    computing = threading.Thread(target=worker.run, args=(stopping.is_set,), kwargs={"closing": lambda: None})
    with open_socket("127.0.0.1", 0) as listener, Listening(application, listener, limits or Limits()):
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16
        )  # of its connections: a kernel holds megabytes
        computing.start()
        try:
            yield Served(listener.getsockname()[1], log)
        finally:
            stopping.set()
            computing.join()
