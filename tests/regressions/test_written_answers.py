"""Answers as chat models write them are read right in every task; what was read right before is so still.

Markdown and LaTeX around a letter: UKGovernmentBEIS/inspect_ai#5055, Azure/azureml-assets#5274. A letter out of a boxed
formula: NVIDIA-NeMo/Skills#1526. Signs lost: google-deepmind/proeval#19, meridianlabs-ai/inspect_scout#99. Numbers of a
run-on after the answer: sgl-project/sglang#29933.
"""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from modellink_lora.evaluation.index import TASKS
from modellink_lora.evaluation.item import Item
from modellink_lora.evaluation.reading import YES_NO, as_number, read_number, read_word
from tests.helpers.written_answers import LETTERS, NUMBERS, SEVERAL, YES_OR_NO


def item(task: str, answer: str, *choices: str, prompt: str = "") -> Item:
    return Item(task, 0, prompt, answer, dict.fromkeys(choices, ""))


def listed(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(text, right) for right, texts in table.items() for text in texts]


def judged(task: str, item: Item, text: str) -> bool:
    return TASKS[task].judge(TASKS[task].read(item, text), item)


@pytest.mark.parametrize(("text", "right"), listed(LETTERS))
def test_a_letter_is_read_alike_in_every_exam(text: str, right: str) -> None:
    for task in ("mmlu", "cmmlu", "ceval", "agieval"):
        assert TASKS[task].read(item(task, "B", *"ABCD"), text) == right, task
    # the letters are those of the question
    options = item("bbh", "B", prompt="Q: before\n(E) x\n\nQ: Which?\n(A) w\n(B) x\n(C) y\n(D) z\nA:")
    assert judged("bbh", options, text) == (right == "B")


@pytest.mark.parametrize(("text", "right"), listed(SEVERAL))
def test_several_letters_are_read_where_several_can_be_right(text: str, right: str) -> None:
    assert judged("agieval", item("agieval", right), text)
    assert TASKS["agieval"].read(item("agieval", right, *"ABCD"), text) == (right if len(right) == 1 else "")


@pytest.mark.parametrize(("text", "right"), listed(NUMBERS))
def test_a_number_is_read_alike_in_every_task(text: str, right: str) -> None:
    assert TASKS["gsm8k"].read(item("gsm8k", "1"), text) == right
    for task in ("bbh", "agieval") if right else ():
        assert judged(task, item(task, right), text), task
        assert not judged(task, item(task, "123456789"), text), task


@pytest.mark.parametrize(("text", "right"), listed(YES_OR_NO))
def test_yes_and_no_are_read_in_words_of_both_languages(text: str, right: str) -> None:
    assert TASKS["boolq"].read(item("boolq", "Yes", "Yes", "No"), text) == right
    if right and re.search(r"\b(yes|no)\b", text, re.I):
        assert judged("bbh", item("bbh", right), text) and not judged("bbh", item("bbh", "maybe"), text)


@pytest.mark.parametrize(
    ("task", "answer", "texts"),
    [
        ("bbh", "True", ["True", "**True**", "The answer is True.", "not ( True ) is False. So the answer is True."]),
        ("bbh", "valid", ["The argument is valid.", "**Valid**", "Answer: valid"]),
        ("bbh", "invalid", ["So the answer is invalid.", "The argument is invalid."]),
        ("bbh", "apple pear plum", ["apple pear plum", "apple, pear, plum", "Answer: **apple pear plum**",
                                    "The answer is:\n\napple pear plum", "Sorted:\nThe answer is apple pear plum."]),
        ("bbh", "] ] >", ["] ] >", "`]]>`", "The answer is ] ] >.", "The answer is: **] ] >**"]),
        ("bbh", "07/22/1924", ["07/22/1924", "The answer is 07/22/1924.", "\\boxed{07/22/1924}"]),
        ("agieval", "x^2", [" $x^2$.\nmore", "\\boxed{x^2}", "The answer is $\\boxed{x^{2}}$".replace("{2}", "2"),
                            "The answer is \\(x^2\\).", "答案是 x^2"]),
        ("agieval", "\\frac{1}{2}", ["\\frac{1}{2}", "1/2", "$\\dfrac{1}{2}$", "The answer is 0.5.", "½",
                                     "\\boxed{\\dfrac12}"]),
        ("agieval", "-\\frac{3}{4}", ["−3/4", "So \\(\\boxed{-\\frac{3}{4}}\\)."]),
    ],
)  # fmt: skip
def test_other_answers_are_compared_without_their_form(task: str, answer: str, texts: list[str]) -> None:
    for text in texts:
        assert judged(task, item(task, answer), text), text
        assert not judged(task, item(task, f"{answer}q"), text), text


PROBLEM = json.dumps({
    "prompt": 'import math\n\ndef double(x):\n    """Twice x."""\n', "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
})  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "```Python\ndef double(x):\n    return x + x\n```", "~~~\ndef double(x):\n    return x + x\n~~~",
        "```py\ndef double(x):\n    return x + x", "````python3\r\ndef double(x):\r\n    return x + x\r\n````",
        "1. So:\n   ```python\n   def double(x):\n       return x + x\n   ```",
        "First:\n```python\nprint('no')\n```\nthen\n```python\ndef double(x):\n    return x + x\n```",
        "```python\nimport re\n\ndef helper(x):\n    return x\n\ndef double(x):\n    return helper(x) * 2\n```",
        "Here it is:\n\nfrom math import floor\n\ndef double(x):\n    return floor(2 * x)\n\nThis doubles x.",
        "   y = 2 * x\n    return y", "return 2 * x", "```python\ny = 2 * x\nif y:\n    y = y\nreturn y\n```",
        "<think>\ndef double(x):\n    return 3 * x\n</think>\n```python\ndef double(x):\n    return 2 * x\n```",
    ],
)  # fmt: skip
def test_code_is_found_in_what_stands_around_it(text: str) -> None:
    namespace: dict[str, object] = {}
    exec(TASKS["human_eval"].read(item("human_eval", PROBLEM), text), namespace)
    assert namespace["double"](3) == 6  # type: ignore[operator]


def test_code_that_is_none_is_kept_for_the_judge_to_refuse() -> None:
    for text in ("", "I cannot", "```", "def double(x):\n    return (", "```python\nasync"):
        assert TASKS["human_eval"].read(item("human_eval", PROBLEM), text)


def test_numbers_have_one_spelling() -> None:
    for text, spelled in (("-0.5", "-0.5"), ("−0.50", "-0.5"), ("5,000.00", "5000"), ("-0", "0"), ("0.125", "0.125"),
                          ("1/3", "1/3"), ("2/4", "0.5"), ("3 apples", ""), ("", ""), ("1" * 999, "")):  # fmt: skip
        assert as_number(text) == spelled


# How answers were read before there was a grammar. What they read right is to be read right.


def former_letter(text: str) -> str:
    found = re.match(r".*([ABCD])\.", text.lstrip())
    return found[1] if found else text.lstrip()[:1]


def former_first_letter(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "")
    found = re.findall(r"\(([A-G])\)", line) or re.findall(r"(?<![A-Za-z])([A-G])(?![a-z])", line)
    return "".join(found[:1])


def former_number(text: str) -> str:
    number = r"-?\$?\d[\d,]*(?:\.\d+)?"
    found = re.search(rf"(?:The answer is|####)\D{{0,12}}?({number})", text, re.I)
    last = re.findall(number, text)
    return as_number(found[1] if found else last[-1]) if found or last else ""


def test_letters_that_were_read_right_are_so_still() -> None:
    texts = [
        "{x}", "{x}.", "({x})", "{x}. {t}", "{x}) {t}", "({x}) {t}", "{x}: {t}", " {x}\n\nQ\nA. x\nB. y\nAnswer: {y}",
        "{x}. {t}\n\nQ: next?\nA. x\nB. y\nAnswer: {y}", "The answer is {x}.", "The answer is ({x}).", "So it is {x}.",
        "The correct answer is {x}. {t}", "I think the answer is {x}.", "{y} is wrong, so {x}.", "{x}, because {t}",
        "{y}. is wrong, so the answer is {x}.", "{x} because {t}", "{x} is right. {t}", "答案是{x}.", "{x}。{t}",
        "选{x}.", "{x}\n{t}", "{x}\nA is x. {y}.", "Answer: {x}.", "The answer: {x}. {t}. {t}", "{x}\nThe answer is {y}"
    ]  # fmt: skip
    choices = ["Paris", "London is big", "the third law", "a dog, a cat and B cells", "42 kg", "Because of rain"]
    count = 0
    for form, x, y, t in itertools.product(texts, "ABCD", "ABCD", choices):
        text = form.format(x=x, y=y, t=t)
        if x != y and x in (former_letter(text), former_first_letter(text)):
            count += 1
            assert TASKS["mmlu"].read(item("mmlu", x, *"ABCD"), text) == x, text
    assert count > 1500


def test_numbers_that_were_read_right_are_so_still() -> None:
    texts = [
        "The answer is {n}.", "The answer is ${n}. Then {m}", "3+4=7 so {n}", "#### {n}", "{m} and {m}: {m}+{m}={n}",
        "The answer is {n} apples.\n\nQuestion: {m}?\nThe answer is {m}.", "The answer is: {n}\n{m}", "{m} - 1 = {n}",
        "total of {m} for {n} dollars.", "so the answer is that he has {n}", "The answer is the total, which is {n}.",
        "Answer: Let's see. {m} * 2 = {n}", "{m}.{m}\n{n}", "The answer is {n} ({m} + 1)", "The answer is {n}/hour",
        "{m}%: {n}%", "{m} hours at ${m}/hour is ${n}", "The answer is {n}, not {m}", "The answer is {n} - {m} less",
        "{m}\n+ {m}\n= {n}", "12 days * {m} = {n} for all",
    ]  # fmt: skip
    count = 0
    for form, n, m in itertools.product(texts, ("5", "-3", "1,234", "12.50", "1,000,000"), ("2", "7.5", "3,000")):
        text = form.format(n=n, m=m)
        if former_number(text) == as_number(n):
            count += 1
            assert read_number(text) == as_number(n), text
    assert count > 200


def test_any_text_is_read_in_a_moment() -> None:
    pieces = ["A", "B", "(", ")", "*", "$", "\\boxed{", "}", "the answer is ", "Answer: ", "5", "-", "/", ",", ".",
              "\n", " ", "答案", "选", "is correct", "not ", "#### ", "\\frac", "<think>", "</think>", "`", "_", "é",
              "½", "=", "^", "10", "×", "e9", "negative ", "yes", "or", "\ud800"]  # fmt: skip
    choose = random.Random(3)
    texts = ["".join(choose.choices(pieces, k=choose.randrange(40))) for _ in range(100)]
    for text in [*texts, *(piece * 250 for piece in pieces)]:
        for task, answer in (
            ("mmlu", "A"),
            ("agieval", "AC"),
            ("gsm8k", "5"),
            ("bbh", "5"),
            ("bbh", "B"),
            ("bbh", "x y"),
        ):
            assert isinstance(TASKS[task].read(item(task, answer, *"ABCD"), text), str)
        assert read_word(text, YES_NO) in ("Yes", "No", "")
