"""The HTTP server: OpenAI's completions and chat completions over one engine, several clients at a time.

Requests are read and answered in the server's thread; the engine belongs to the main one (worker.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modellink_lora.config.document import parse_document, to_json
from modellink_lora.config.errors import UserError, printable
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.access import check_key
from modellink_lora.inference.api_answer import Writer
from modellink_lora.inference.api_error import ApiError
from modellink_lora.inference.api_request import Asked, Reader, short
from modellink_lora.inference.listening import SPARE_CONNECTIONS, Limits, Listening, address_of, is_loopback
from modellink_lora.inference.request import Token
from modellink_lora.inference.token_bytes import TokenBytes, token_bytes
from modellink_lora.inference.worker import Busy, Ended, NoAnswer, Worker

_LONGEST = 200  # characters of a path in the log


def serve(
    config: InferConfig,
    engine: Any,
    prompter: Any,
    listener: socket.socket,
    *,
    seed: int,
    most_running: int,
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Serve until `stopping`. Errors of the engine are raised after every client has been told."""
    worker = Worker(engine, most=most_running + config.max_waiting)
    reader = Reader(config, engine, prompter, seed=seed)
    application = make_application(config, reader, worker, token_bytes(engine.tokenizer), say)
    limits = Limits(connections=config.max_waiting + SPARE_CONNECTIONS)
    with Listening(application, listener, limits) as listening:
        say(f"serving {', '.join(reader.models)} at {address_of(listener)}/v1; Ctrl-C ends")
        if not is_loopback(config.host) and not config.api_key:
            say(f"warning: --host {config.host} is open to other machines without a key; see --api-key-file")
        worker.run(stopping, closing=listening.close)
    say("the server has ended")


def make_application(
    config: InferConfig, reader: Reader, worker: Worker, bytes_of: TokenBytes, say: Callable[[str], None]
) -> Any:
    """The ASGI application."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    # the pages on its interface would load scripts from elsewhere; docs/inference.md describes the fields
    application = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    # one thread: a tokenizer is not made for several, and a prompt of a megabyte must not stop the event loop
    reading = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def failed(error: ApiError) -> Response:
        return Response(error.content(), error.status, media_type="application/json")

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "modellink_lora"}

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card(name) for name in reader.models]})

    async def model(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if name not in reader.models:
            raise ApiError(404, f"the model {short(name)} does not exist; there are {', '.join(reader.models)}",
                           param="model", code="model_not_found")  # fmt: skip
        return JSONResponse(card(name))

    async def completions(request: Request) -> Any:
        return await complete(request, chat=False)

    async def chat_completions(request: Request) -> Any:
        return await complete(request, chat=True)

    async def complete(request: Request, *, chat: bool) -> Any:
        content = await read_body(request, config.max_request_bytes)
        asked = await asyncio.get_running_loop().run_in_executor(
            reading, lambda: reader.read(parse(content), chat=chat)
        )
        writer = Writer(asked, bytes_of)
        request.state.writer = writer
        tokens = ask(worker, asked, config.adapter_scale, say)
        if asked.stream:
            first = await anext(tokens)  # an error before it is still an answer with a status
            return StreamingResponse(
                events(writer, first, tokens), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        gone = asyncio.create_task(disconnected(request))
        collecting = asyncio.create_task(collect(writer, tokens))
        try:
            await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ApiError(499, "the client has gone")
            await collecting
        finally:
            for task in (gone, collecting):
                task.cancel()
            await asyncio.gather(gone, collecting, return_exceptions=True)
            await tokens.aclose()
        return JSONResponse(writer.whole())

    for path, handler, method in (
        ("/health", health, "GET"), ("/v1/models", models, "GET"), ("/v1/models/{name:path}", model, "GET"),
        ("/v1/completions", completions, "POST"), ("/v1/chat/completions", chat_completions, "POST"),
    ):  # fmt: skip
        application.add_route(path, handler, methods=[method])

    async def on_http_error(request: Request, error: Any) -> Response:
        return failed(ApiError(error.status_code, f"{_asked(request.scope)}: {error.detail}"))

    async def on_api_error(request: Request, error: Any) -> Response:
        return failed(error)

    async def on_mistake(request: Request, error: Any) -> Response:  # which goes on to _Guard, to be logged there
        return failed(ApiError(500, f"the server made a mistake: {type(error).__name__}"))

    application.add_exception_handler(HTTPException, on_http_error)
    application.add_exception_handler(ApiError, on_api_error)
    application.add_exception_handler(Exception, on_mistake)
    return _Guard(application, config.api_key, say)


async def read_body(request: Any, most: int) -> bytes:
    """The body, of which not more than `most` bytes are ever kept."""
    from starlette.requests import ClientDisconnect

    error = ApiError(413, f"the request is longer than {most} bytes: shorten it (the server's --max-request-bytes)")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise error
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise error
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    return b"".join(parts)


def parse(content: bytes) -> Any:
    try:
        return parse_document(content, object, where="the body")
    except UserError as error:
        raise ApiError(400, str(error)) from None


async def ask(
    worker: Worker, asked: Asked, usual_scale: float, say: Callable[[str], None]
) -> AsyncGenerator[tuple[int, Token], None]:
    """(which request, token) as they come; closing the iterator cancels what has not ended.

    Args:
        usual_scale: of the adapter, where a request names none.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Token | Ended]]()

    def deliver(index: int, token: Token | Ended) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(arrived.put_nowait, (index, token))

    try:
        answer = worker.ask(asked.requests, deliver)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    except Busy as error:
        raise ApiError(429, str(error), code="rate_limit_exceeded") from None
    except Ended as error:
        raise ApiError(503, str(error)) from None
    open_ = len(asked.requests)
    try:
        while open_:
            index, token = await arrived.get()
            if isinstance(token, NoAnswer):
                say(printable(f"error: {token}"))
                raise _no_answer(token, asked.requests[index].choice.scale, usual_scale)
            if isinstance(token, Ended):
                raise ApiError(500 if "failed" in str(token) else 503, str(token))
            open_ -= token.finish is not None
            yield index, token
    finally:
        if open_:
            worker.cancel(answer)


def _no_answer(ended: NoAnswer, scale: float, usual_scale: float) -> ApiError:
    """The model's fault, which no repetition mends (500, not 503), unless the request has set the adapter's scale."""
    if scale != usual_scale:
        return ApiError(400, str(ended), param="adapter_scale", code="logits_not_finite")
    return ApiError(500, str(ended), code="logits_not_finite")


async def collect(writer: Writer, tokens: AsyncIterator[tuple[int, Token]]) -> None:
    async for index, token in tokens:
        writer.add(index, token)


async def disconnected(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(writer: Writer, first: tuple[int, Token], tokens: Any) -> AsyncIterator[str]:
    """Server-sent events of one answer."""
    async with contextlib.aclosing(tokens):
        for chunk in (*writer.opening(), *writer.piece(*first)):
            yield _event(chunk)
        try:
            async for index, token in tokens:
                for chunk in writer.piece(index, token):
                    yield _event(chunk)
        except ApiError as error:  # the status has been sent: the reason goes where the rest would have
            yield _event(error.body())
            return
        for chunk in writer.closing():
            yield _event(chunk)
        yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {to_json(chunk)}\n\n"


class _Guard:
    """Around the application: the key, one line for each request, and an answer for errors that nobody foresaw."""

    def __init__(self, application: Any, api_key: str | None, say: Callable[[str], None]) -> None:
        self._application, self._api_key, self._say = application, api_key, say

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        scope.setdefault("state", {})
        where = _asked(scope)

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] != "/health":
                check_key(scope, self._api_key)
            await self._application(scope, receive, sending)
        except ApiError as error:
            await error.send(sending)
        except Exception as error:
            self._say(printable(f"error: {where}: {type(error).__name__}: {error}"))
        finally:
            writer = scope["state"].get("writer")
            tokens = writer.completion_tokens if writer else 0
            seconds = time.perf_counter() - began
            self._say(f"{where} {status or 499} {tokens} tokens {seconds:.2f} s")


def _asked(scope: Any) -> str:
    """Method and path for messages and the log, as the client wrote them: decoded, %0A would begin a new line."""
    path = printable(scope["raw_path"].decode("ascii", "replace"))
    return f"{scope['method'][:_LONGEST]} {path if len(path) <= _LONGEST else path[:_LONGEST] + '...'}"
