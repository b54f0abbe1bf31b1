"""The server as a real process: what clients get, and that nothing they do stops it; Ctrl-C does, leaving nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.answering import MAX_LENGTH, address, ask, inference, made_pair
from tests.helpers.jobs import TORCHRUN, Job

pytest.importorskip("fastapi", reason="needs fastapi and uvicorn: pip install -e .[web]")
httpx = pytest.importorskip("httpx", reason="needs httpx")

PROMPTS = ["Red, yellow", "The capital of France is", "Human: Add two and three.", "sum", "### Instruction: Name"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def job(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    log = tmp_path_factory.mktemp("server") / "log"
    words = ("--task", "server", "--port", 0, "--prompt-type", "qwen", "--max-waiting", 80)
    with inference(pair, *words, log=log) as job:
        yield job


def refused(answer: httpx.Response, status: int, reason: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and reason in error["message"], error


def streamed(url: str, path: str, **body: object) -> list[dict]:
    with httpx.stream("POST", f"{url}{path}", json={"temperature": 0, "stream": True, **body}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_models_are_the_base_and_its_adapters(job: Job) -> None:
    url = address(job)
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["base", "tuned"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    base, tuned = (ask(url, prompt=PROMPTS[0], model=name) for name in ("base", "tuned"))
    assert base["choices"][0]["text"] != tuned["choices"][0]["text"]
    assert ask(url, prompt=PROMPTS[0])["model"] == "tuned"
    off = ask(url, prompt=PROMPTS[0], model="tuned", adapter_scale=0)
    assert off["choices"][0]["text"] == base["choices"][0]["text"]


def test_a_streamed_answer_is_the_whole_one_in_pieces(job: Job) -> None:
    url = address(job)
    whole = ask(url, prompt=PROMPTS[1], logprobs=2)
    chunks = streamed(url, "/v1/completions", prompt=PROMPTS[1], max_tokens=12, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == len(whole["choices"][0]["logprobs"]["tokens"]) <= 12
    messages = [{"role": "user", "content": "sum"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    chat = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]
    chunks = streamed(url, "/v1/chat/completions", messages=messages, max_tokens=8)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert (text, chunks[-1]["choices"][0]["finish_reason"]) == (chat["message"]["content"], chat["finish_reason"])


def test_bad_requests_are_answered_with_the_reason(job: Job) -> None:
    url = address(job)
    post = lambda content, path="/v1/completions": httpx.post(url + path, content=content, timeout=60)  # noqa: E731
    refused(post(b'{"prompt": '), 400, "not valid JSON")
    refused(post(b"\xff\xfe"), 400, "not valid JSON")
    refused(post(b"[" * 100_000), 400, "not valid JSON")
    refused(post(json.dumps({"prompt": "word " * 200_000}).encode()), 400, f"the model has room for {MAX_LENGTH}")
    refused(post(b"x" * (1 << 21)), 413, "longer than 1048576 bytes")
    refused(post(iter([b"x" * 100_000] * 20)), 413, "longer than 1048576 bytes")  # of no declared length
    refused(post(b'{"prompt": "x", "model": "gpt-9"}'), 404, "there are base, tuned")
    refused(post(b'{"prompt": "x", "echo": true}'), 400, "echo True is not supported")
    refused(post(b"{}", "/v1/embeddings"), 404, "Not Found")
    refused(httpx.get(f"{url}/v1/completions"), 405, "Method Not Allowed")
    assert ask(url, prompt=PROMPTS[0])["usage"]["completion_tokens"] > 0


def test_64_clients_at_once_get_what_each_gets_alone(job: Job) -> None:
    url = address(job)
    asked = [
        {"prompt": prompt, "model": model, "temperature": temperature, "seed": 7, "max_tokens": 10}
        for prompt in PROMPTS[:4] for model in ("base", "tuned") for temperature in (0, 1.5)
    ]  # fmt: skip
    alone = [ask(url, **body)["choices"][0] for body in asked]
    assert len({choice["text"] for choice in alone}) > 8
    together: list[dict] = [{}] * 64

    def one(number: int) -> None:
        together[number] = ask(url, **asked[number % 16])["choices"][0]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 4


def test_more_requests_than_may_wait_are_turned_away(job: Job) -> None:
    answer = httpx.post(f"{address(job)}/v1/completions", json={"prompt": ["a"] * 81})
    refused(answer, 400, "more than the 80")
    codes: list[int] = []

    def many() -> None:
        body = {"prompt": ["a"] * 60, "max_tokens": 40}
        codes.append(httpx.post(f"{address(job)}/v1/completions", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 429, 429]


def test_a_client_that_leaves_amidst_its_answer_takes_its_requests_along(job: Job) -> None:
    url, lines, ended = address(job), job.text.count(" 499 "), job.text.count("POST /v1/completions 200")
    body = {"prompt": ["a"] * 70, "max_tokens": 55, "temperature": 1.9, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    job.until(lambda: job.text.count("POST /v1/completions 200") > ended, seconds=10)  # an answer had begun
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=0.3)
    job.until(lambda: job.text.count(" 499 ") > lines, seconds=10)
    time.sleep(0.5)
    ask(url, prompt=["a"] * 80, max_tokens=1)  # as many as may wait: all others must be gone


def test_ctrl_c_ends_the_server_well(job: Job) -> None:
    address(job)
    job.process.send_signal(signal.SIGINT)
    assert job.ends(within=20) == 0
    assert job.text.rstrip().endswith("the server has ended") and "Traceback" not in job.text
    assert "warning: --host" not in job.text


def test_over_two_processes_it_answers_and_ctrl_c_ends_all(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the launcher and every process, and the launcher sends it on once more."""
    words = ("--task", "server", "--port", 0, "--tensor-model-parallel-size", 2)
    with inference(pair, *words, log=tmp_path / "log", launcher=TORCHRUN) as job:
        url = address(job)
        texts = {ask(url, prompt=PROMPTS[0], model=name)["choices"][0]["text"] for name in ("base", "tuned")}
        assert len(texts) == 2 and len(job.workers()) == 2
        refused(httpx.post(f"{url}/v1/completions", content=b"{"), 400, "not valid JSON")
        body = {"prompt": "a", "max_tokens": 55, "temperature": 1.9, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
            os.killpg(job.process.pid, signal.SIGINT)
            job.ends(within=25)
        assert "the server has ended" in job.text and "KeyboardInterrupt" not in job.text.split("torch/distributed")[0]
