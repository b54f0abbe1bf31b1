"""The web page: one question, answered by the base and by an adapter side by side, each with its own memory.

Needs gradio; nothing is sent or fetched elsewhere. The engine belongs to the main thread (worker.py), the page's
functions run in threads of gradio.
"""

from __future__ import annotations

import dataclasses
import queue
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from fastapi import FastAPI

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.history import History
from modellink_lora.inference.listening import SPARE_CONNECTIONS, Limits, Listening, address_of, is_loopback
from modellink_lora.inference.page_guard import guarded
from modellink_lora.inference.request import BASE, TUNED, Choice, Request, Sampling, Token
from modellink_lora.inference.tasks import sampling_of
from modellink_lora.inference.worker import Answer, Busy, Ended, NoAnswer, Worker

Memory = dict[str, list[tuple[str, str]]]  # model -> questions and answers
Dialogue = list[Any]  # messages as gradio shows them: {"role": .., "content": ..}

_STYLE = """
.gradio-container, .gradio-container main.fillable {max-width: none !important}
#question textarea {font-size: 1.05rem}
.count {min-height: 1.4em; opacity: .65; font-size: .85rem}
.bubble-wrap ~ .icon-button-wrapper, button[aria-label="Clear"] {display: none}  /* it would forget one side only */
"""


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
    """Show the page until `stopping`. Errors of the engine are raised after every visitor has been told."""
    worker = Worker(engine, most=most_running + config.max_waiting)
    page = Page(config, engine, prompter, worker, seed=seed)
    limits = Limits(connections=config.max_waiting + SPARE_CONNECTIONS)
    with Listening(page.application(), listener, limits) as listening:
        asked = "; a browser asks for a user, any name, and a password, which is the key" if config.api_key else ""
        say(f"web page at {address_of(listener)}{asked}; Ctrl-C ends")
        if not is_loopback(config.host) and not config.api_key:
            say(f"warning: --host {config.host} is open to other machines without a key; see --api-key-file")
        worker.run(stopping, closing=listening.close)
    say("the web page has ended")


@dataclass(frozen=True)
class _Side:
    """One answer on its way."""

    choice: Choice
    history: History
    request: Request


class Page:
    """What stands on the page and what its buttons do.

    Args:
        seed: of the first visitor's sampling, until it is changed on the page.
    """

    def __init__(self, config: InferConfig, engine: Any, prompter: Any, worker: Worker, *, seed: int) -> None:
        self._config, self._engine, self._prompter, self._worker = config, engine, prompter, worker
        self._seed = seed
        self._adapters = list(engine.choices)
        self._running: dict[str, Answer] = {}  # visitor -> what is being written for them

    def application(self) -> Any:
        """The ASGI application."""
        outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="lg")
        mounted = gr.mount_gradio_app(
            outer, self._blocks(), "/", footer_links=[], theme=theme, css=_STYLE, show_error=True, ssr_mode=False
        )
        return guarded(mounted, api_key=self._config.api_key, max_request_bytes=self._config.max_request_bytes)

    def _blocks(self) -> gr.Blocks:
        first = TUNED if TUNED in self._adapters else next(iter(self._adapters), None)
        shown = [BASE, *filter(None, [first])]
        with gr.Blocks(analytics_enabled=False, title="modellink_lora", fill_height=True, fill_width=True) as blocks:
            memory = gr.State(dict)
            with gr.Sidebar(width=300):
                gr.Markdown("### modellink_lora")
                adapter = gr.Dropdown(
                    self._adapters, value=first, label="Adapter", elem_id="adapter",
                    visible=bool(self._adapters), interactive=len(self._adapters) > 1,
                )  # fmt: skip
                scale = gr.Slider(
                    0, 2, self._config.adapter_scale, step=0.05, label="Strength",
                    info="1 is as trained", visible=bool(self._adapters), elem_id="scale",
                )  # fmt: skip
                controls = self._controls()
            dialogues, counts = [], []
            with gr.Row(equal_height=True, scale=1):
                for number, name in enumerate(shown):
                    with gr.Column(min_width=280):
                        dialogues.append(
                            gr.Chatbot(
                                label=name, elem_id=f"answers-{number}", height="calc(100vh - 205px)", layout="bubble",
                                buttons=["copy_all"], placeholder=_PLACEHOLDERS[bool(number)], feedback_options=None,
                            )
                        )  # fmt: skip
                        counts.append(gr.Markdown("", elem_classes="count", elem_id=f"count-{number}"))
            with gr.Row():
                question = gr.Textbox(
                    placeholder="Ask both models"
                    if self._adapters else "Ask the model",
                    show_label=False, container=False, scale=8, lines=1, max_lines=8, autofocus=True,
                    elem_id="question",
                )  # fmt: skip
                send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
                stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop")
                clear = gr.Button("Clear", scale=1, min_width=90, elem_id="clear")
            outputs = [question, memory, *dialogues, *counts]
            gr.on(
                [question.submit, send.click], self._send, [question, memory, adapter, scale, *controls], outputs,
                show_progress="hidden", concurrency_limit=16,
            )  # fmt: skip
            stop.click(self._stop, None, None, show_progress="hidden")
            clear.click(self._clear, None, outputs, show_progress="hidden")
            adapter.change(self._switch, [memory, adapter], [dialogues[-1], counts[-1]], show_progress="hidden")
            blocks.unload(self._stop)
        return blocks.queue(default_concurrency_limit=16)

    def _controls(self) -> list[Any]:
        """In the order of `_send`'s last arguments."""
        config = self._config
        longest = max(2, min(self._engine.max_length - 1, max(1024, config.max_new_tokens)))
        return [
            gr.Slider(0, 2, config.temperature, step=0.05, label="Temperature", info="0: most likely token",
                      elem_id="temperature"),
            gr.Slider(1, longest, min(config.max_new_tokens, longest), step=1, label="New tokens", info="at most",
                      elem_id="tokens"),
            gr.Number(self._seed, precision=0, label="Seed", info="the same seed gives the same answers"),
            gr.Slider(0, max(200, config.top_k), config.top_k, step=1, label="Top-k", info="0: all tokens"),
            gr.Slider(0.01, 1, config.top_p, step=0.01, label="Top-p"),
            gr.Slider(0, 1, config.min_p, step=0.01, label="Min-p"),
            gr.Slider(0.5, 2, config.repetition_penalty, step=0.05, label="Repetition penalty"),
        ]  # fmt: skip

    def _send(
        self, question: str, memory: Memory, adapter: str | None, scale: float, temperature: float, tokens: int,
        seed: int, top_k: int, top_p: float, min_p: float, penalty: float, visitor: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Both answers as they come."""
        question = (question or "").strip()
        choices = [
            Choice(BASE),
            *([Choice(adapter, scale)] if adapter is not None and adapter in self._adapters else []),
        ]
        shown = [_dialogue(memory.get(choice.adapter, [])) for choice in choices]
        arrived: queue.SimpleQueue[tuple[int, Token | Ended]] = queue.SimpleQueue()
        key = str(visitor.session_hash)
        try:
            if not question or key in self._running:
                raise UserError("write a question first" if not question else "wait for the answer, or stop it")
            config = dataclasses.replace(  # compares with the ranges: programs may send anything
                self._config, adapter_scale=scale, temperature=temperature, max_new_tokens=_whole(tokens),
                top_k=_whole(top_k), top_p=top_p, min_p=min_p, repetition_penalty=penalty,
            )  # fmt: skip
            sampling = sampling_of(config, seed=_whole(seed or 0))
            sides = [self._side(question, memory, choice, sampling, config.max_new_tokens) for choice in choices]
            answer = self._worker.ask([side.request for side in sides], lambda n, token: arrived.put((n, token)))
        except (UserError, Busy, Ended) as error:
            gr.Warning(str(error))
            yield [question, memory, *shown, *([gr.skip()] * len(choices))]
            return
        self._running[key] = answer
        shown = [[*_dialogue(side.history.pairs), {"role": "user", "content": question}] for side in sides]
        texts, counts, notes = ["" for _ in sides], [0 for _ in sides], ["" for _ in sides]
        open_, began = len(sides), time.perf_counter()
        failed: set[int] = set()  # sides whose model gave no answer: nothing of them is remembered
        try:
            yield ["", memory, *shown, *notes]
            while open_:
                number, token = arrived.get()
                if isinstance(token, Ended):
                    failed |= {number} if isinstance(token, NoAnswer) else set()
                    notes[number] += " (stopped)" if str(token) == "cancelled" else f" ({token})"
                    open_ -= 1
                else:
                    texts[number] += token.text
                    counts[number] += token.counted
                    seconds = time.perf_counter() - began
                    notes[number] = f"{counts[number]} tokens, {counts[number] / seconds:.1f} a second"
                    open_ -= token.finish is not None
                if arrived.empty() or not open_:  # what has come meanwhile is shown at once
                    answers = [[*lines, {"role": "assistant", "content": text}] for lines, text in zip(shown, texts)]
                    yield ["", memory, *answers, *notes]
        finally:  # also when the visitor has left
            self._worker.cancel(answer)
            self._running.pop(key, None)
        remembered = {
            side.choice.adapter: [*side.history.pairs, (question, text)]
            for number, (side, text) in enumerate(zip(sides, texts))
            if number not in failed
        }
        yield ["", memory | remembered, *answers, *notes]

    def _side(self, question: str, memory: Memory, choice: Choice, sampling: Sampling, tokens: int) -> _Side:
        history = History(
            self._prompter, self._config.history_turns, self._prompter.has_template,
            list(memory.get(choice.adapter, [])),
        )  # fmt: skip
        room = min(tokens, self._engine.max_length // 2)
        ids = history.ask(question, longest=self._engine.max_length - room, tell=gr.Info)
        request = Request(tuple(ids), room, sampling, self._prompter.stop_ids, self._config.stop, choice)
        return _Side(choice, history, request)

    def _stop(self, visitor: gr.Request) -> None:
        if answer := self._running.get(str(visitor.session_hash)):
            self._worker.cancel(answer)

    def _clear(self, visitor: gr.Request) -> list[Any]:
        self._stop(visitor)
        sides = 2 if self._adapters else 1
        return ["", {}, *([[]] * sides), *([""] * sides)]

    def _switch(self, memory: Memory, adapter: str) -> list[Any]:
        """Another adapter has a memory of its own."""
        return [gr.Chatbot(_dialogue(memory.get(adapter, [])), label=adapter), ""]


def _whole(value: Any) -> Any:
    """A slider's number as an int, where it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_PLACEHOLDERS = {False: "The model without adapter answers here.", True: "The model with its adapter answers here."}


def _dialogue(pairs: list[tuple[str, str]]) -> Dialogue:
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
