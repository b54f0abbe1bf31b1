"""OpenAI's fields, read and written: what each becomes, and which are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.api_answer import Writer
from modellink_lora.inference.api_error import ApiError
from modellink_lora.inference.api_request import Asked, Reader
from modellink_lora.inference.request import Choice, Token

ENGINE = SimpleNamespace(choices=("tuned", "other"), max_length=40, vocab_size=300)


class Letters:
    """One token a letter."""

    stop_ids = frozenset({9})

    def plain(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if messages[-1]["role"] != "user":
            raise UserError("messages must end with a question")
        return self.plain("".join(f"{message['role'][0]}:{message['content']}|" for message in messages))


def read(body: Any, *, chat: bool = False, **flags: Any) -> Asked:
    return Reader(InferConfig(**flags), ENGINE, Letters(), seed=1).read(body, chat=chat)


def test_a_bare_prompt_gets_the_values_of_the_flags() -> None:
    asked = read(
        {"prompt": "abc", "user": "me", "metadata": {"a": "b"}, "best_of": 1, "suffix": None}, top_k=7, stop=("|",)
    )
    (request,) = asked.requests
    assert request.ids == (97, 98, 99) and request.max_new_tokens == 37, "what the model has room for"
    assert (request.sampling.temperature, request.sampling.top_k, request.stop) == (0.7, 7, ("|",))
    assert request.choice == Choice("tuned", 1.0) and request.stop_ids == {9} and asked.top is None


def test_prompts_come_as_texts_or_ids_and_each_gets_n_answers_with_seeds_of_their_own() -> None:
    assert [request.ids for request in read({"prompt": [5, 6]}).requests] == [(5, 6)]
    asked = read({"prompt": ["a", [5, 6]], "n": 2, "seed": 70, "max_tokens": 4, "model": "base", "logprobs": 0})
    assert [request.ids for request in asked.requests] == [(97,), (97,), (5, 6), (5, 6)]
    assert [request.sampling.seed for request in asked.requests] == [70, 71, 70, 71]
    assert asked.prompt_tokens == 3 and asked.top == 0
    one, other = (read({"prompt": "a"}).requests[0].sampling.seed for _ in range(2))
    assert one == other, "a server started anew with the same --seed repeats itself"


def test_a_chat_takes_parts_of_text_and_its_own_names() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    body = {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": parts}],
            "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 3, "stop": "x",
            "adapter_scale": 0.5}  # fmt: skip
    asked = read(body, chat=True)
    (request,) = asked.requests
    assert "".join(map(chr, request.ids)) == "s:a|u:bc|" and request.max_new_tokens == 2
    assert (asked.top, request.top_logprobs, request.stop, request.choice.scale) == (3, 3, ("x",), 0.5)


@pytest.mark.parametrize(
    "body, status, param, reason",
    [
        ([], 400, None, "must be a JSON object"),
        ({}, 400, "prompt", "prompt must be given"),
        ({"prompt": ""}, 400, "prompt", "no token"),
        ({"prompt": []}, 400, "prompt", "empty list"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt must be a text"),
        ({"prompt": [True]}, 400, "prompt", "prompt must be a text"),
        ({"prompt": "a\ud800"}, 400, "prompt", "half of a character"),
        ({"prompt": [300]}, 400, "prompt", "token ids outside 0 to 299"),
        ({"prompt": "a" * 40}, 400, "prompt", "the prompt has 40 tokens; the model has room for 40"),
        ({"prompt": "a" * 30, "max_tokens": 11}, 400, "prompt", "30 tokens and max_tokens 11"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"prompt": "a", "max_tokens": "4"}, 400, "max_tokens", "a whole number, not '4'"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens", "a whole number, not True"),
        ({"prompt": "a", "model": "gpt-9"}, 404, "model", "there are base, tuned, other"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature", "temperature nan"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "top_p 0.0"),
        ({"prompt": "a", "n": 300}, 400, "n", "at most 256"),
        ({"prompt": ["a"] * 100, "n": 3}, 400, "n", "100 prompts x 3 answers"),
        ({"prompt": "a", "stop": ["", "b"]}, 400, "stop", "none of them empty"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream: true"),
        ({"prompt": "a", "echo": True}, 400, "echo", "echo True is not supported: prompts are not repeated"),
        ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty", "is not supported"),
        ({"prompt": "a", "temprature": 0}, 400, "temprature", "unknown field 'temprature'"),
    ],
)
def test_mistakes_are_named(body: Any, status: int, param: str | None, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(body)
    assert (caught.value.status, caught.value.param) == (status, param) and reason in caught.value.message


@pytest.mark.parametrize(
    "body, reason",
    [
        ({}, "messages must be given"),
        ({"messages": ["a"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "owl", "content": "a"}]}, "messages[0].role must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content must be a text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must end with a question"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "needs logprobs: true"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "is not supported"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 2}, "differ"),
    ],
)
def test_mistakes_of_a_chat_are_named(body: Any, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(body, chat=True)
    assert caught.value.status == 400 and reason in caught.value.message


TOKENS = [Token(97, "a", -0.1, ((97, -0.1), (98, -2.0))), Token(98, "", -0.2, ((98, -0.2),)),
          Token(99, "bc", -0.3, ((99, -0.3),)), Token(9, "", -0.4, (), "stop", counted=False)]  # fmt: skip


def test_log_probabilities_have_the_shape_of_each_api_and_leave_the_stop_token_out() -> None:
    writer = Writer(read({"prompt": "a", "logprobs": 2}), lambda id, begins: chr(id).encode())
    for token in TOKENS:
        writer.add(0, token)
    choice = writer.whole()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"], "token_logprobs": [-0.1, -0.2, -0.3], "text_offset": [0, 1, 1],
        "top_logprobs": [{"a": -0.1, "b": -2.0}, {"b": -0.2}, {"c": -0.3}],
    }  # fmt: skip
    assert writer.usage() == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    writer = Writer(read(body, chat=True), lambda id, begins: chr(id).encode())
    chunks = [*writer.opening(), *(chunk for token in TOKENS for chunk in writer.piece(0, token))]
    likely = [row for chunk in chunks for row in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [row["token"] for row in likely] == ["a", "b", "c"] and likely[0]["bytes"] == [97]
    assert likely[0]["top_logprobs"][1] == {"token": "b", "logprob": -2.0, "bytes": [98]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
