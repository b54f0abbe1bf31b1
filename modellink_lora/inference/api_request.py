"""What clients of the server ask, in OpenAI's fields: checked one by one, and turned into the engine's requests.

A field that is not understood but would change the answer is refused by name; silence would be a wrong answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modellink_lora.config.errors import UserError, printable
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.api_error import ApiError
from modellink_lora.inference.prompt_file import ROLES
from modellink_lora.inference.request import BASE, Choice, Request, default_choice
from modellink_lora.inference.tasks import sampling_of

_MOST_TOP = 20  # of the tokens reported beside each chosen one
_MOST_STOPS = 16
_SEED_BITS = (1 << 63) - 1
_GREATEST = 100.0  # of factors: what they multiply must not overflow
# taken without effect: they say who asks, or how the service keeps and bills
_HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# not offered; these values of them ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
    "echo": (False,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "ignore_eos": (False,), "min_tokens": (0,),
}  # fmt: skip
_REASONS = {
    "echo": "prompts are not repeated in the answer, nor scored; send max_tokens and read the answer alone",
    "best_of": "answers are not ranked; ask for n of them with logprobs",
}


@dataclass(frozen=True)
class Asked:
    """One HTTP request, understood.

    Args:
        requests: for each prompt in turn its `n` answers.
        prompt_tokens: of all prompts, each counted once.
        top: None: no log-probabilities are wanted; else how many tokens beside the chosen one.
    """

    model: str
    chat: bool
    requests: tuple[Request, ...]
    prompt_tokens: int
    top: int | None
    stream: bool
    include_usage: bool


class Reader:
    """Reads requests for one engine. Unnamed fields get the values of the server's flags.

    Args:
        seed: of the sequence of seeds that requests without one get.
    """

    def __init__(self, config: InferConfig, engine: Any, prompter: Any, *, seed: int) -> None:
        self._config, self._engine, self._prompter = config, engine, prompter
        self._random = random.Random(seed)
        self.models = (BASE, *engine.choices)

    def read(self, body: Any, *, chat: bool) -> Asked:
        """Raises ApiError that names the field."""
        if not isinstance(body, dict):
            raise ApiError(400, 'the body must be a JSON object, such as {"prompt": "Hello"}')
        fields = _Fields(body)
        choice = self._choice(fields)
        prompts = self._messages(fields) if chat else self._prompts(fields)
        n = fields.whole("n", 1, least=1, most=self._config.max_waiting)
        if n * len(prompts) > self._config.max_waiting:
            raise ApiError(400, f"{len(prompts)} prompts x {n} answers are more than the {self._config.max_waiting} "
                           "that may wait here: send fewer at once", param="n")  # fmt: skip
        top = _top_logprobs(fields, chat)
        request = self._request(fields, choice, top or 0)
        wanted = _max_tokens(fields, chat)
        stream = fields.switch("stream")
        include_usage = _include_usage(fields, stream)
        fields.refuse_others()
        given_seed = "seed" in body and body["seed"] is not None
        first = request.sampling.seed if given_seed else self._random.getrandbits(31)
        requests = []
        for ids in prompts:
            room = self._room(len(ids), wanted, "messages" if chat else "prompt")
            for number in range(n):
                sampling = replace(request.sampling, seed=(first + number) & _SEED_BITS)
                requests.append(replace(request, ids=tuple(ids), max_new_tokens=room, sampling=sampling))
        return Asked(choice.adapter, chat, tuple(requests), sum(map(len, prompts)), top, stream, include_usage)

    def _choice(self, fields: _Fields) -> Choice:
        scale = fields.number("adapter_scale", self._config.adapter_scale, least=-_GREATEST, most=_GREATEST)
        name = fields.take("model", None, str, "a text")
        if name is None:
            return default_choice(self._engine.choices, scale)
        if name not in self.models:
            raise ApiError(404, f"the model {short(name)} does not exist; there are {', '.join(self.models)}",
                           param="model", code="model_not_found")  # fmt: skip
        return Choice(name, scale)

    def _request(self, fields: _Fields, choice: Choice, top: int) -> Request:
        defaults = sampling_of(self._config, seed=0)
        sampling = replace(
            defaults,
            temperature=fields.number("temperature", defaults.temperature, least=0.0, most=_GREATEST),
            top_k=max(0, fields.whole("top_k", defaults.top_k, least=-1)),  # other servers write -1 for all
            top_p=fields.number("top_p", defaults.top_p, above=0.0, most=1.0),
            min_p=fields.number("min_p", defaults.min_p, least=0.0, most=1.0),
            repetition_penalty=fields.number(
                "repetition_penalty", defaults.repetition_penalty, least=1 / _GREATEST, most=_GREATEST
            ),
            seed=fields.whole("seed", 0, least=-(1 << 63), most=_SEED_BITS) & _SEED_BITS,
        )
        stop = fields.take("stop", (), (str, list), "a text or a list of texts")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if len(stop) > _MOST_STOPS or not all(isinstance(text, str) and text for text in stop):
            raise ApiError(400, f"stop must be at most {_MOST_STOPS} texts, none of them empty", param="stop")
        stop = tuple(_encodable(text, "stop") for text in stop)
        stops = (*self._config.stop, *stop)
        return Request((), 1, sampling, self._prompter.stop_ids, stops, choice, top)

    def _room(self, length: int, wanted: int | None, param: str) -> int:
        """How many new tokens a prompt of that length may get."""
        most = self._engine.max_length
        new = min(self._config.max_new_tokens, most - length) if wanted is None else wanted
        if new < 1 or length + new > most:
            asked = f" and max_tokens {wanted}" if wanted is not None else ""
            raise ApiError(400, f"the prompt has {length} tokens{asked}; the model has room for {most} of prompt and "
                           "answer together", param=param, code="context_length_exceeded")  # fmt: skip
        return new

    def _messages(self, fields: _Fields) -> list[list[int]]:
        messages = fields.take("messages", None, list, "a list of messages")
        if not messages:
            raise ApiError(400, "messages must be given: at least one with a role and a content", param="messages")
        read = [_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
        try:
            ids = self._prompter.chat(read)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        return [_nonempty(ids, "messages")]

    def _prompts(self, fields: _Fields) -> list[list[int]]:
        prompt = fields.take("prompt", None, (str, list), "a text, a list of texts, or token ids")
        if prompt is None:
            raise ApiError(400, "prompt must be given", param="prompt")
        if isinstance(prompt, str) or (prompt and all(map(_is_whole, prompt))):
            prompt = [prompt]
        if not prompt:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        return [self._prompt(one) for one in prompt]

    def _prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return _nonempty(self._prompter.plain(_encodable(prompt, "prompt")), "prompt")
        if not isinstance(prompt, list) or not all(map(_is_whole, prompt)):
            raise ApiError(400, "prompt must be a text, a list of texts, token ids or lists of them", param="prompt")
        size = self._engine.vocab_size
        if any(not 0 <= token < size for token in prompt):
            raise ApiError(400, f"prompt has token ids outside 0 to {size - 1}", param="prompt")
        return _nonempty(prompt, "prompt")


class _Fields:
    """A JSON object whose fields are taken one by one; what is left in the end must mean nothing."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}  # null says nothing

    def take(self, name: str, default: Any, kind: type | tuple[type, ...], called: str) -> Any:
        value = self._left.pop(name, default)
        if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ApiError(400, f"{name} must be {called}, not {short(value)}", param=name)
        return value

    def has(self, name: str) -> bool:
        return name in self._left

    def switch(self, name: str) -> bool:
        return bool(self.take(name, False, bool, "true or false"))

    def whole(self, name: str, default: int, *, least: int, most: int | None = None) -> int:
        value = int(self.take(name, default, int, "a whole number"))
        return self._within(name, value, lambda v: least <= v and (most is None or v <= most), least, most)

    def number(
        self, name: str, default: float, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
    ) -> float:
        value = self.take(name, default, (int, float), "a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        right = math.isfinite(value) and least <= value <= most and value > above
        return float(self._within(name, value, lambda _: right, least if above == -math.inf else above, most))

    def _within(self, name: str, value: Any, right: Callable[[Any], bool], least: Any, most: Any) -> Any:
        if not right(value):
            limits = " and ".join(
                word for word, limit in ((f"at least {least}", least), (f"at most {most}", most))
                if limit is not None and abs(limit) != math.inf
            )  # fmt: skip
            raise ApiError(400, f"{name} {short(value)}: must be {limits or 'a finite number'}", param=name)
        return value

    def refuse_others(self) -> None:
        for name, value in self._left.items():
            if name in _HARMLESS or any(value == neutral for neutral in _NEUTRAL.get(name, ())):
                continue
            if name in _NEUTRAL:
                why = _REASONS.get(name, "leave it out")
                raise ApiError(400, f"{name} {short(value)} is not supported: {why}", param=name,
                               code="unsupported_parameter")  # fmt: skip
            raise ApiError(400, f"unknown field {short(name)}: it is not supported here", param=name,
                           code="unknown_parameter")  # fmt: skip


def _top_logprobs(fields: _Fields, chat: bool) -> int | None:
    if not chat:
        top = fields.whole("logprobs", -1, least=-1, most=_MOST_TOP)
        return None if top < 0 else top
    wanted = fields.switch("logprobs")
    top = fields.whole("top_logprobs", 0, least=0, most=_MOST_TOP)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return top if wanted else None


def _max_tokens(fields: _Fields, chat: bool) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    values = {fields.whole(name, 1, least=1) for name in names if fields.has(name)}
    if len(values) > 1:
        raise ApiError(400, f"{' and '.join(names)} differ: give one", param=names[0])
    return values.pop() if values else None


def _include_usage(fields: _Fields, stream: bool) -> bool:
    options = fields.take("stream_options", None, dict, "an object")
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    inner = _Fields(options)
    wanted = inner.switch("include_usage")
    inner.take("include_obfuscation", False, bool, "true or false")
    inner.refuse_others()
    return wanted


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with a role and a content", param=where)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}, not {short(role)}", param=where)
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content must be a text, or a list of parts of type text", param=where)
    others = [name for name in message if name not in ("role", "content", "name") and message[name]]
    if others:
        raise ApiError(400, f"{where}: the field {short(others[0])} is not supported", param=where,
                       code="unsupported_parameter")  # fmt: skip
    return {"role": role, "content": _encodable(content, where)}


def _nonempty(ids: Sequence[int], param: str) -> list[int]:
    if not ids:
        raise ApiError(400, f"{param} has no token: write something", param=param)
    return list(ids)


def _encodable(text: str, param: str) -> str:
    """JSON can write halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} has half of a character (a lone surrogate)", param=param) from None
    return text


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value of a request for a message: printable, on one line and not long."""
    try:
        text = printable(repr(value))
    except RecursionError:  # the reader of JSON goes deeper than repr
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
