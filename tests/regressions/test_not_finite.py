"""NaN or infinity among a model's logits is an error in words, of the request that met it, and never an answer.

Elsewhere such logits became uniformly random tokens in a healthy answer, with the request's cache spoiled
(sgl-project/sglang#33187), a row of exclamation marks (Blaizzy/mlx-vlm#1163), an error of the whole batch
(xorbitsai/inference#2728), or an accuracy of 1.00, the first choice of every question being the right one
(EleutherAI/lm-evaluation-harness#714).
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.chat import Chat
from modellink_lora.inference.request import Choice, NotFinite, Request, Sampling, Token, not_finite
from modellink_lora.inference.sampling import choose
from modellink_lora.inference.tasks import run_tasks
from modellink_lora.models.build import capped
from modellink_lora.models.finite import check_weight, fits
from tests.helpers.answering import made_pair
from tests.helpers.comparing import compared
from tests.helpers.conversion import convert
from tests.helpers.jobs import BARE, Job
from tests.helpers.spawn import run
from tests.helpers.spoiled import BAD, batch_here, changed, loading_here, overflowing, uses_here

NAN, INF = float("nan"), float("inf")
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp1": (1, {}), "tp2": (2, {"tensor_model_parallel_size": 2}), "pp2": (2, {"pipeline_model_parallel_size": 2}),
}  # fmt: skip
EVERY_LAYOUT = pytest.mark.parametrize("layout", ["tp1", "tp2", pytest.param("pp2", marks=pytest.mark.slow)])
SAID = "the model's logits are NaN or infinite, so there is no answer: check the checkpoint"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with its tokenizer, and an adapter of finite numbers whose outputs overflow."""
    base, adapter = made_pair(tmp_path_factory.mktemp("not finite"))
    return base, overflowing(adapter)


# Weights: found before anything is computed.


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_base_that_holds_one_is_not_loaded(pair: tuple[Path, Path], tmp_path: Path, value: float) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    changed(base / "model.safetensors", layers__1__mlp__down_proj__weight=value)
    said = run(loading_here, world_size=1, load=str(base))[0]
    assert said.startswith(f"{base}: decoder.layers.1.mlp.linear_fc2.weight: holds NaN or infinity"), said
    assert "choose an earlier checkpoint" in said


def test_weights_beyond_the_dtype_they_are_computed_in_are_not_loaded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    changed(base / "model.safetensors", lm_head__weight=7e4)
    assert run(loading_here, world_size=1, load=str(base), bf16=True)[0] == ""
    said = run(loading_here, world_size=1, load=str(base), fp16=True)[0]
    assert said == (
        f"{base}: output_layer.weight: the value 7e+04 is beyond the 6.55e+04 of float16: compute in bf16 (--bf16) or "
        "fp32 (neither flag)"
    )


def test_a_merge_that_overflows_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the merged weight reaches .* which does not fit torch.float32"):
        convert(pair[0], tmp_path / "merged", to="hf", lora_load=str(pair[1]))
    assert not (tmp_path / "merged/mg2hg").exists()


def test_extremes_tell_what_is_finite_after_rounding() -> None:
    most = torch.finfo(torch.float16).max
    for value, dtype, fitting in (
        (most, torch.float16, True), (most + 15, torch.float16, True), (most + 16, torch.float16, False),
        (-most - 16, torch.float16, False), (most + 16, torch.bfloat16, True), (3.4e38, torch.bfloat16, False),
        (3.4e38, torch.float32, True), (NAN, torch.float32, False), (-INF, torch.float32, False),
    ):  # fmt: skip
        tensor = torch.tensor([[0.0, value], [1.0, -1.0]])
        assert fits(tensor, dtype) == bool(tensor.to(dtype).isfinite().all()) == fitting, (value, dtype)
    check_weight(torch.empty(0, 3), torch.float16, "of an empty stage")


# Logits: what the engine says, whatever it is asked.


@EVERY_LAYOUT
def test_every_use_of_the_engine_raises_and_the_base_answers_on(pair: tuple[Path, Path], layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = {"load": str(pair[0]), "lora_load": str(pair[1]), "max_batch_size": 2}
    said, before, after, (greedy, total) = run(uses_here, world_size=world_size, parallel=parallel, config=config)[0]
    settings = said.pop("settings")
    assert settings.startswith("prompt 1, at token 1 of the answer: Sampling(") and "choose milder settings" in settings
    for use, line in said.items():
        assert SAID in line and "the adapter tuned (at strength 1) and the dtype fp32" in line, (use, line)
    assert said["greedy"].startswith("prompt 2, at token 1 of the answer: ")
    assert said["score"].startswith("prompt 1, at token 1 of the continuation: ")
    assert said["stream"].startswith("at token 1 of the answer: ")
    assert before == after and greedy and math.isfinite(total), "nothing of them was left in the cache"


@EVERY_LAYOUT
def test_one_request_of_a_batch_fails_and_the_others_get_their_answers(pair: tuple[Path, Path], layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    prompts = [[3, 1, 4, 1, 5], [BAD] + [2] * 20, [6, 5, 3, 5]]
    before, spoiled, after = run(
        batch_here, world_size=world_size, parallel=parallel, config={"load": str(pair[0]), "max_batch_size": 3},
        prompts=prompts,
    )[0]  # fmt: skip
    assert spoiled[0] == before[0] and spoiled[2] == before[2]
    assert spoiled[1].startswith(f"at token 1 of the answer: {SAID} and the dtype fp32")
    assert after == [before[0], before[2]] * 2, "also in the row of the failed one"


def test_an_infinite_logit_stays_one_beyond_a_cap() -> None:
    config: Any = SimpleNamespace(final_logit_softcapping=30.0)
    logits = torch.tensor([[1.5, -200.0, 0.0, 3e38], [INF, 1.0, -INF, NAN]])
    assert torch.equal(capped(logits[:1], config), torch.tanh(logits[:1] / 30) * 30)
    assert capped(logits[1:], config).isnan().tolist() == [[True, False, True, True]]
    trained = logits[:1].clone().requires_grad_()
    capped(trained, config).sum().backward()
    assert trained.grad is not None and torch.allclose(trained.grad, 1 - torch.tanh(logits[:1] / 30) ** 2)


def test_tokens_that_are_masked_out_are_no_fault_and_settings_that_overflow_are_told() -> None:
    logits = torch.tensor([1.0, 2.0, -INF, 0.5])  # as a mask before sampling leaves them
    assert choose(logits, [], Sampling(), 0) == 1
    assert choose(logits, [], Sampling(temperature=1.0, top_k=1), 0) == 1
    with pytest.raises(UserError, match=r"repetition_penalty=1e-300.* choose milder settings"):
        choose(logits, [0], Sampling(temperature=1.0, repetition_penalty=1e-300), 0)
    with pytest.raises(UserError, match=r"--repetition-penalty 1e-300: must be at least 0.001"):
        InferConfig(repetition_penalty=1e-300)


def test_what_to_check_names_adapter_and_dtype() -> None:
    assert str(not_finite("at token 3 of the answer", Choice("tuned", 2.0), "fp16")) == (
        f"at token 3 of the answer: {SAID}, the adapter tuned (at strength 2) and the dtype fp16, which overflows "
        "above 65504 (take bf16 or fp32)"
    )


# Every job over the engine.

ERROR = not_finite("at token 2 of the answer", Choice("tuned"), "fp32")


class Failing:
    """An engine whose answer to a prompt with the letter z ends at its second token."""

    choices, max_length, vocab_size, tokenizer = ("tuned",), 64, 128, SimpleNamespace(chat_template=None)
    stop_ids: frozenset[int] = frozenset()
    has_template = False

    def __init__(self) -> None:
        self._running: dict[int, tuple[Request, int]] = {}

    def plain(self, text: str) -> list[int]:
        return list(text.encode())

    text = plain

    def chat(self, messages: Sequence[Any]) -> list[int]:
        return self.plain(messages[-1]["content"])

    def check(self, request: Request) -> None:
        pass

    def submit(self, request: Request) -> int:
        number = len(self._running)
        self._running[number] = request, 0
        return number

    def cancel(self, number: int) -> None:
        self._running.pop(number, None)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def step(self) -> list[tuple[int, Token | NotFinite]]:
        found: list[tuple[int, Token | NotFinite]] = []
        for number, (request, count) in list(self._running.items()):
            self._running[number] = request, count + 1
            if count == 1 and ord("z") in request.ids:
                found.append((number, ERROR))
            else:
                found.append((number, Token(120, "x", -0.5, finish="stop" if count == 3 else None)))
            if count == 3 or found[-1][1] is ERROR:
                del self._running[number]
        return found

    def stream(self, request: Request) -> Iterator[Token]:
        yield Token(120, "x", -0.5)
        if ord("z") in request.ids:
            raise ERROR
        yield Token(120, "x", -0.5, finish="stop")

    def beam_search(self, ids: Sequence[int], *_: Any, **__: Any) -> Any:
        raise ERROR

    def generate(self, requests: Sequence[Request], **_: Any) -> Any:
        raise NotFinite(ERROR.what, prompt="prompt 2", index=1)

    def score(self, pairs: Sequence[Any], **_: Any) -> Any:
        raise NotFinite(ERROR.what, prompt="prompt 3", index=2)


def test_the_server_answers_with_an_error_and_the_others_with_their_answers() -> None:
    pytest.importorskip("fastapi", reason="needs fastapi and uvicorn: pip install -e .[web]")
    from tests.helpers.http_server import served

    with served(engine=Failing()) as server:
        status, body = server.post({"prompt": ["z"]})
        assert status == 500 and body["error"] == {
            "message": str(ERROR), "type": "server_error", "param": None, "code": "logits_not_finite",
        }  # fmt: skip
        assert f"error: {ERROR}" in server.log, "whoever runs it learns it too"
        status, body = server.post({"prompt": "z", "adapter_scale": 50})
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, "adapter_scale", "logits_not_finite")
        for chat in (False, True):
            asked = {"messages": [{"role": "user", "content": "z"}]} if chat else {"prompt": "z"}
            sent = json.dumps({**asked, "stream": True}).encode()
            head = f"POST /v1/{'chat/' * chat}completions HTTP/1.0\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
            status, text = server.send(head + sent)
            *chunks, last = [json.loads(line[6:]) for line in text.decode().split("\n\n") if line]
            assert status == 200 and last["error"]["message"] == str(ERROR), "OpenAI's clients raise on it"
            finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
            assert finishes and set(finishes) == {None}, "and nobody takes it for an answer"
        status, body = server.post({"prompt": "a"})
        assert status == 200 and body["choices"][0]["text"] == "xxxx"


def test_the_web_page_says_it_below_the_answer_and_forgets_the_question() -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install -e .[web]")
    from modellink_lora.inference.web import Page
    from modellink_lora.inference.worker import Worker

    engine, stopping = Failing(), threading.Event()
    worker = Worker(engine, most=8)
    page = Page(InferConfig(), engine, engine, worker, seed=1)
    computing = threading.Thread(target=worker.run, args=(stopping.is_set,), kwargs={"closing": lambda: None})
    computing.start()
    try:
        visitor: Any = SimpleNamespace(session_hash="a")
        settings = ("tuned", 1.0, 0.7, 5, 1, 0, 0.9, 0.0, 1.0, visitor)
        *_, (_, memory, *_, note) = page._send("z", {}, *settings)
        assert note.endswith(f" ({ERROR})") and memory == {}
        *_, (_, memory, *_, note) = page._send("a", memory, *settings)
        assert memory == {"base": [("a", "xxxx")], "tuned": [("a", "xxxx")]} and "tokens" in note
    finally:
        stopping.set()
        computing.join()


def talk(*lines: str, terminal: bool) -> str:
    waiting, out = iter(lines), io.StringIO()

    def read(prompt: str) -> str:
        return next(waiting, "q")

    console = Console(file=out, force_terminal=terminal, color_system=None, width=1000)
    try:
        Chat(InferConfig(), Failing(), Failing(), seed=5, console=console).run(read)
    except NotFinite as error:
        return f"{out.getvalue()}raised {error}"
    return out.getvalue()


def test_a_chat_says_it_and_forgets_the_question_and_on_a_pipe_it_ends() -> None:
    said = talk("z", "a", terminal=True)
    assert f"error: {ERROR}" in said and said.endswith("ModelLink: xx\n"), "the history holds no z, or it would fail"
    assert talk("z", "a", terminal=False).endswith(f"raised {ERROR}")


@pytest.mark.parametrize("task", ["greedy", "do_sample", "beam_search", "beam_search_with_sampling"])
def test_tasks_name_the_prompt_and_write_nothing(task: str, tmp_path: Path) -> None:
    config = InferConfig(task=(task,), prompt=("a", "z"), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(NotFinite, match=r"^prompt [12], at token 2 of the answer: "):
        run_tasks(["a", "z"], config, Failing(), Failing(), seed=1, say=lambda line: None)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("scoring", "question"), [("logprob", 2), ("generate", 2)])
def test_an_evaluation_names_the_question_instead_of_judging_it(scoring: str, question: int) -> None:
    from modellink_lora.evaluation.index import TASKS
    from modellink_lora.evaluation.item import Item
    from modellink_lora.evaluation.scoring import Answering, Writing

    items = [Item("law", number, "?", "B", {"A": "1", "B": "2"}) for number in range(3)]
    writing = Writing(always=scoring == "generate", max_new_tokens=4, sampling=Sampling())
    engine: Any = Failing()
    engine.tokenizer = SimpleNamespace(encode=lambda text, **_: list(text.encode()))
    answering = Answering(TASKS["mmlu"], engine, engine, writing, ["tuned"])
    with pytest.raises(NotFinite, match=f"^law, question {question}, at token 2 of the answer: "):
        answering.answers(items, lambda more: None)


def test_a_comparison_names_variant_and_prompt(pair: tuple[Path, Path]) -> None:
    engine = {"load": str(pair[0]), "lora_load": str(pair[1])}
    said, _ = run(compared, world_size=1, comparison={"prompt": ("a", "b"), "max_new_tokens": 2}, engine=engine)[0]
    assert SAID in said and "the adapter tuned" in said and said.startswith("unmerged, prompt 1, "), said


def test_the_logits_program_and_verify_logits_write_and_say_no_number(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(pair[0], tmp_path / "mg", to="mg")
    (tmp_path / "prompts.json").write_text('["a"]')
    said, written = run(
        logits_here, world_size=1, load=str(tmp_path / "mg"), lora_load=str(pair[1]),
        prompt_file=str(tmp_path / "prompts.json"), output=str(tmp_path / "logits.safetensors"),
        tokenizer_name_or_path=str(pair[0]),
    )[0]  # fmt: skip
    assert said.startswith("prompt 1, after token 1 of ") and SAID in said and "the adapter tuned" in said
    assert not (tmp_path / "logits.safetensors").exists()
    assert written.startswith("--verify-logits of base and adapter, after token 1 of 2: ") and SAID in written


def logits_here(**config: Any) -> tuple[str, str]:
    """What the logits program says, and what --verify-logits of a merge says."""
    from modellink_lora.config.convert import ConvertConfig
    from modellink_lora.config.logits import LogitsConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.inference.logits import prompt_logits
    from modellink_lora.inference.merged import compare_logits

    here: dict[str, Any] = {"device": get_device("cpu"), "torch_device": torch.device("cpu")}
    lines: list[str] = []
    conversion = ConvertConfig(
        load_dir=config["load"], load_model_type="mg", save_model_type="hf", save_dir=config["output"],
        lora_load=config["lora_load"], verify_logits="3,1",
    )  # fmt: skip
    try:
        prompt_logits(LogitsConfig(**config), ParallelConfig(), **here)
    except NotFinite as error:
        lines.append(str(error))
    try:
        compare_logits(conversion, Path(config["load"]), {}, say=lines.append, **here)
    except NotFinite as error:
        lines.append(str(error))
    return lines[0], lines[1]


@pytest.mark.parametrize("fault", ["adapter", pytest.param("weight", marks=pytest.mark.slow)])
def test_of_two_processes_one_says_it_and_both_end(pair: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    words = ["--task", "greedy", "--prompt", "a", "--tensor-model-parallel-size", "2"]
    if fault == "weight":  # the last row of the vocabulary is on the second process alone
        from safetensors.torch import load_file, save_file

        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"][-1, 0] = NAN
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        words += ["--lora-load", str(pair[1])]
    with Job("inference.py", "--load", base, *words, log=tmp_path / "log", launcher=BARE) as job:
        assert job.ends(within=60) == 1
        said = [line for line in job.text.splitlines() if "error: " in line]
    expected = "output_layer.weight: holds NaN or infinity" if fault == "weight" else f"prompt 1, at token 1 .*{SAID}"
    assert len(said) == 1 and re.search(expected, said[0]), job.text
    assert "Traceback" not in job.text
