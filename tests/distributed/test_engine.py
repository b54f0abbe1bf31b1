"""Answers of the engine are those of transformers with the PEFT adapter, token by token, at every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from modellink_lora.inference.request import BASE, Choice, Request, Sampling
from tests.helpers.conversion import convert
from tests.helpers.engine import STOPS, peft_adapter, reference, reference_answers, with_engine
from tests.helpers.shared import shared
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model, tiny_tokenizer

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"tp1": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2)}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
_random = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(0, 256, (n,), generator=_random).tolist() for n in (1, 23, 7, 40, 12)]
PROMPTS.append([*PROMPTS[3][:30], 9, 8, 7])  # begins like another one
TUNED = Choice("tuned")
CHOICES = {"tuned": TUNED, "base": Choice(BASE), "half": Choice("tuned", 0.5)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a Hugging Face model `hf`, an adapter `lora` of PEFT's and another one, `other`."""
    folder = tmp_path_factory.mktemp("engine")
    tiny_tokenizer(tiny_model("llama", folder / "hf", std=0.15))
    peft_adapter(folder / "hf", folder / "lora")
    peft_adapter(folder / "hf", folder / "other", seed=2, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture(scope="module")
def answers(models: Path) -> dict[str, list[list[int]]]:
    """What transformers answers to PROMPTS, greedily, under each of CHOICES."""
    hf, lora = models / "hf", models / "lora"
    found = {
        "tuned": reference_answers(reference(hf, lora), PROMPTS, 8),
        "base": reference_answers(reference(hf, None), PROMPTS, 8),
        "half": reference_answers(reference(hf, lora, scale=0.5), PROMPTS, 8),
    }
    assert all(found[a] != found[b] for a, b in (("tuned", "base"), ("tuned", "half"), ("half", "base")))
    return found


def ask(models: Path, layout: str, use: str, *, lora: bool = True, **rest: Any) -> Any:
    """What the leader gets; `rest` are settings of EngineConfig, in `arguments` those of `use`."""
    world_size, parallel = LAYOUTS[layout]
    arguments = rest.pop("arguments")
    config = {"load": str(models / "hf"), "max_batch_size": 4, **rest}
    if lora:
        config["lora_load"] = str(models / "lora")
    return run(with_engine, world_size=world_size, use=use, parallel=parallel, config=config, arguments=arguments)[0]


def requests(choice: Choice, lengths: Sequence[int] = (8,) * len(PROMPTS)) -> list[Request]:
    return [Request(tuple(ids), n, stop_ids=STOPS, choice=choice) for ids, n in zip(PROMPTS, lengths, strict=True)]


@EVERY_LAYOUT
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_greedy_answers_equal_transformers(
    layout: str, cache: bool, models: Path, answers: dict[str, list[list[int]]]
) -> None:
    lengths = (3, 8, 1, 8, 5, 7)  # so that rows become free between others, with and without prompts waiting for them
    asked = {"requests": [request for name in CHOICES for request in requests(CHOICES[name], lengths)]}
    found = ask(models, layout, "generate", use_kv_cache=cache, arguments=asked)
    assert found == [ids[:n] for name in CHOICES for ids, n in zip(answers[name], lengths, strict=True)]


def test_an_answer_ends_at_a_stop_token(models: Path, answers: dict[str, list[list[int]]]) -> None:
    third = answers["tuned"][1][2]
    stop = [dataclasses.replace(request, stop_ids=frozenset({third})) for request in requests(TUNED)]
    found = ask(models, "tp1", "generate", arguments={"requests": stop})
    assert found[1] == answers["tuned"][1][:2]


BEAMS = [("tp1", 2, 1.0, 1.0), ("tp1", 2, 3.0, 1.3), ("tp1", 4, 0.0, 1.0), ("tp2", 3, 0.5, 1.0), ("pp2", 2, 1.0, 1.0)]


@pytest.mark.parametrize("layout, beams, penalty, repetition", BEAMS)
def test_beam_search_equals_transformers(
    layout: str, beams: int, penalty: float, repetition: float, models: Path
) -> None:
    model = reference(models / "hf", models / "lora")
    # tokens that do come up end some beams early and let others go on
    stops = STOPS | {ids[2] for ids in reference_answers(model, PROMPTS[:4], 3)}
    settings = {"num_beams": beams, "length_penalty": penalty}
    expected = reference_answers(model, PROMPTS, 10, stops=stops, repetition_penalty=repetition, **settings)
    asked = {"prompts": PROMPTS, "max_new_tokens": 10, "stop_ids": stops, "choice": TUNED,
             "sampling": Sampling(repetition_penalty=repetition), **settings}  # fmt: skip
    found = ask(models, layout, "beams", arguments=asked)
    assert [beam[0][1] for beam in found] == expected
    assert len({len(ids) for ids in expected}) > 1


def test_beams_end_at_a_stop_text_where_those_of_transformers_do(models: Path) -> None:
    model, tokenizer = reference(models / "hf", models / "lora"), AutoTokenizer.from_pretrained(models / "hf")
    settings = {"num_beams": 3, "length_penalty": 2.0}
    usual = reference_answers(model, PROMPTS[:4], 7, **settings)
    # letters that come up end some beams and let others go on; the special token ends none
    letters = {chr(token) for ids in usual for token in ids[2:4] if 32 < token < 127}
    stop = [*sorted(letters), "<s>"]
    expected = reference_answers(model, PROMPTS[:4], 7, stop_strings=stop, tokenizer=tokenizer, **settings)
    asked = {"prompts": PROMPTS[:4], "max_new_tokens": 7, "stop_ids": STOPS, "stop": stop, "choice": TUNED, **settings}
    found = ask(models, "tp1", "beams", arguments=asked)
    assert [beam[0][1] for beam in found] == expected and expected != usual


def test_sampling_is_the_same_at_every_layout_and_in_every_batch(models: Path) -> None:
    sampling = [Sampling(0.8, 20, 0.9, 0.01, 1.1, seed) for seed in range(len(PROMPTS))]
    asked = [dataclasses.replace(request, sampling=s) for request, s in zip(requests(TUNED), sampling)]
    found = [ask(models, layout, "generate", arguments={"requests": asked}) for layout in LAYOUTS]
    found.append(ask(models, "tp1", "generate", max_batch_size=1, arguments={"requests": asked}))
    assert all(one == found[0] for one in found)
    others = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=99)) for request in asked
    ]
    assert ask(models, "tp1", "generate", arguments={"requests": others}) != found[0]


def test_sampled_beams_are_the_same_at_every_layout(models: Path) -> None:
    asked = {"prompts": PROMPTS[:2], "max_new_tokens": 8, "sampling": Sampling(0.7, 10, seed=3), "choice": TUNED}
    found = [ask(models, layout, "beams", arguments=asked) for layout in LAYOUTS]
    for one in found[1:]:
        assert [[ids for _, ids in beams] for beams in one] == [[ids for _, ids in beams] for beams in found[0]]


@EVERY_LAYOUT
def test_scores_equal_transformers(layout: str, models: Path) -> None:
    prefix = PROMPTS[3]
    pairs = [([*prefix, n], [n + 1, n + 2, n + 3][: 1 + n % 3]) for n in range(9)]
    pairs += [(pairs[0][0], [n]) for n in range(4)] + [(PROMPTS[1], PROMPTS[2])]  # one context, several endings
    for name, choice in CHOICES.items():
        model = reference(models / "hf", None if name == "base" else models / "lora", scale=choice.scale)
        found = ask(models, layout, "score", arguments={"pairs": pairs, "choice": choice})
        for (context, continuation), score in zip(pairs, found, strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
            expected = [logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation)]
            best = logprobs[len(context) - 1 : -1].argmax(-1).tolist()
            assert score.logprobs == pytest.approx(expected, abs=2e-5)  # fp32, |logits| below 20
            assert score.greedy == (best == list(continuation))


def test_an_unmerged_adapter_answers_like_the_merged_model_and_not_like_the_base(models: Path, tmp_path: Path) -> None:
    convert(models / "hf", tmp_path / "mg", to="mg", target_tensor_parallel_size=2)
    convert(tmp_path / "mg", tmp_path / "merged", to="hf", lora_load=str(models / "lora"))
    pairs = {"pairs": [(PROMPTS[1], PROMPTS[3]), (PROMPTS[3], PROMPTS[4])]}

    def scores(choice: Choice, **config: Any) -> torch.Tensor:
        found = run(
            with_engine, world_size=2, use="score", parallel=TP2, config=config,
            arguments={**pairs, "choice": choice},
        )[0]  # fmt: skip
        return torch.tensor([logprob for score in found for logprob in score.logprobs])

    unmerged = scores(TUNED, load=str(tmp_path / "mg"), lora_load=str(models / "lora"),
                      tokenizer_name_or_path=str(models / "hf"))  # fmt: skip
    merged = scores(Choice(BASE), load=str(tmp_path / "merged" / "mg2hg"))
    base = scores(Choice(BASE), load=str(models / "hf"))
    assert (unmerged - merged).abs().max() < 1e-4
    assert (unmerged - base).abs().max() > 1


def test_several_adapters_answer_by_name_in_one_batch(models: Path) -> None:
    names = ("tuned", "other", "base")
    asked = [Request(tuple(ids), 8, choice=Choice(name)) for ids in PROMPTS[1:3] for name in names]
    found = ask(models, "tp2", "generate", lora_modules=(f"other={models / 'other'}",), arguments={"requests": asked})
    folders = {"tuned": models / "lora", "other": models / "other", "base": None}
    for name in names:
        expected = reference_answers(reference(models / "hf", folders[name]), PROMPTS[1:3], 8, stops=frozenset())
        assert [ids for ids, request in zip(found, asked) if request.choice.adapter == name] == expected


def test_long_prompts_in_pieces_give_the_same(models: Path, answers: dict[str, list[list[int]]]) -> None:
    asked = {"requests": requests(TUNED), "tokens_at_once": 16}
    assert ask(models, "pp2", "in_pieces", arguments=asked) == answers["tuned"]


STORY_PROMPTS = [[1, *PROMPTS[1]], [1], [1, 403, 407, 261]]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An adapter of a published model, and what transformers answers with it: greedily and with two beams."""
    hf, ends = shared("models/stories260K-hf"), frozenset({2})
    adapter = peft_adapter(hf, tmp_path_factory.mktemp("stories") / "lora", std=0.05)
    model = reference(hf, adapter)
    greedy = reference_answers(model, STORY_PROMPTS, 24, stops=ends)
    assert greedy != reference_answers(reference(hf, None), STORY_PROMPTS, 24, stops=ends)
    return adapter, {"greedy": greedy, "beams": reference_answers(model, STORY_PROMPTS, 12, stops=ends, num_beams=2)}


@EVERY_LAYOUT
def test_a_published_model_answers_like_transformers(layout: str, stories: tuple[Path, dict[str, Any]]) -> None:
    adapter, expected = stories
    world_size, parallel = LAYOUTS[layout]
    if layout == "pp2":
        parallel = {**parallel, "num_layer_list": "3,2"}
    config = {"load": str(shared("models/stories260K-hf")), "lora_load": str(adapter), "max_batch_size": 2}
    asked = [Request(tuple(ids), 24, stop_ids=frozenset({2}), choice=TUNED) for ids in STORY_PROMPTS]
    beams = {"prompts": STORY_PROMPTS, "max_new_tokens": 12, "stop_ids": frozenset({2}), "choice": TUNED}
    for use, arguments, what in (("generate", {"requests": asked}, "greedy"), ("beams", beams, "beams")):
        found = run(with_engine, world_size=world_size, use=use, parallel=parallel, config=config, arguments=arguments)
        ids = found[0] if what == "greedy" else [beam[0][1] for beam in found[0]]
        assert ids == expected[what]
