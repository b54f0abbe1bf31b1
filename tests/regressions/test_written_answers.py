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
import time

import pytest

from modellink_lora.evaluation.index import TASKS
from modellink_lora.evaluation.item import Item
from modellink_lora.evaluation.reading import YES_NO, as_number, read_number, read_word

# the letter that is read -> texts; "" for texts without one answer
LETTERS = {
    "A": [
        "The answer is A because", "A is correct", "A", "A.", "A because", "The answer is a", "A, definitely.",
        "A. An apple", "a) apple", "A\n", "A - because",
    ],
    "B": [
        "B", " B", "**(B)**.", "**B**", "**B.** Paris", "(B)", "[B]", "B)", "B) because", "B because it is", "b",
        "(b)", "b.", "Answer: B", "**Answer:** B", "**Answer: B**", "Answer:\n\n**B. Paris**", "ANSWER: $B$",
        "Answer: (B) Paris", "The answer is (B)", "The answer is (B).", "The correct answer is **B**.",
        "The correct answer is **(B) Paris**.", "The correct option is B: Paris", "\\boxed{B}",
        "$\\boxed{\\text{B}}$", "The answer is $\\boxed{B}$.", "\\[\\boxed{\\textbf{(B)}}\\]",
        "\\boxed{\\mathrm{B. Paris}}", "Ｂ", "（Ｂ）", "Ｂ．", "𝐁", "Ⓑ", "答案是B", "答案：B", "正确答案是：B。",
        "选B", "选 B。", "故选B", "应选择B", "答案为（B）", "正确答案：**B**", "选项B正确", "B是正确的",
        "B选项是正确的", "B项正确，A项错误", "不选A，选B", "我认为答案应该是B。", "根据题意，选项B符合题意。",
        "Certainly! The answer is B", "Certainly! Option B is correct.", "A. is wrong, so the answer is B.",
        "A is wrong. B is correct.", "The answer is not A but B", "I would choose B", "I'd go with option (B).",
        "So B", "I think it's B.", "Option B", "Option (B)", "option b", "Choice: B",
        "A. Paris - incorrect\nB. London - correct\nC. Rome\nD. Oslo\n\nAnswer: B",
        "<think>maybe A. The answer is A</think>\n\nB", "<answer>B</answer>",
        "B\n\nQuestion 2\nA. x\nB. y\nAnswer: C", "B. Paris\n\nQ: next?\nAnswer: C",
        "The best answer is B) Paris.", "> B", "- B", "## Answer\n\nB", "### Answer: B", "`B`", "'B'", "\"B\"",
        "“B”", "Answer：B", "The answer is option B.", "The answer is: B", "the answer is\nB", "Final Answer: B",
        "**Final Answer**: \\boxed{B}", "The correct answer to the question is B.", "My answer: B", "Answer - B",
        "B - Paris", "B: Paris", "B, since", "B!", "B？", "$B$", "\\(B\\)", "\\text{B}", "<b>B</b>",
        "The correct answer is **Paris (B)**.", "The correct answer is Paris, option B.", "答：B", "答案选B",
        "本题选B。", "正确选项为B", "因此，答案为 **B**", "综上所述，正确答案是 B. 巴黎", "【答案】B",
        "参考答案：B", "Out of these, B seems best", "The answer would be B, because A is wrong.",
        "The answer is **B**, since A is wrong", "**Answer**: B", "**B) Paris**", "*B*", "__B__",
        "**Correct answer: B**", "✅ B", "B ✅", "Answer: B ✓", "**(B)** Paris", "**B**: Paris", "**Option B**",
        "The correct answer is:\n\n**B) Paris**",
        "The correct answer is:\n\n(B) Paris\n\nExplanation: A is wrong.",
        "**A. Paris**: no.\n\n**B. London**: yes.\n\n**C. Rome**: no.\n\nSo, the correct answer is **B. London**.",
        "Let us see.\n\nOption A is incorrect.\nOption B is correct.\nOption C is incorrect.", "Answer is B",
        "answer: b", "the correct answer is b) paris", "ans: B", "Ans. B", "Solution: B", "Response: B",
        "The correct choice is: $\\text{(B)}$", "$$\\boxed{B}$$", "\\boxed{(B)}", "\\boxed{\\text{(B)}}",
        "\\boxed{b}", "boxed{B}", "Thus, the answer is $\\boxed{\\textbf{(B) }42}$.", "{B}", "<B>", "【B】",
        "「B」", "(B", "B）", "（B）巴黎", "Ｂ、巴黎", "Ｂ：巴黎", "B、巴黎", "B。", "答案：B。解析：A错误",
        "答案：Ｂ", "【答案】：B", "【解析】A错。【答案】B", "选择B。", "应该选B", "应当选择 B 选项", "我会选择B",
        "正确的选项是B", "正确的是B", "故本题答案为B", "故答案为：B", "因此选择B选项。", "所以选B。", "B正确",
        "B是正确答案", "A不正确，B正确", "A错误，B正确，C错误，D错误。故选B。",
        "本题考查...\nA项错误。\nB项正确。\nC项错误。\n故选B。", "答案不是A，而是B", "排除A，选B", "B选项",
        "选项B", "选项：B", "最佳答案是B", "答案應為B", "正確答案是B", "Answer B", "The answer's B", "It's B",
        "It is B.", "I'll go with B", "I pick B.", "My choice is B", "Final answer: (B)", "FINAL ANSWER: B",
        "Final answer\nB", "So, the final answer is: **B**", "Hence B.", "Hence, option (B) is correct.",
        "Therefore, B is the answer.", "Therefore (B).", "(B) is the correct option", "the correct letter is B",
        "B, Paris", "B; Paris", "B / Paris", "B = Paris", "B → Paris", "B (Paris)", "B\tParis", "B\u00a0",
        "\u200bB", "\ufeffB", "B\r\n", "I would say B.", "Probably B", "Maybe B.", "B, I think", "B I think",
        "I think B", "{\"answer\": \"B\"}", "{'answer': 'B'}", "answer = 'B'", "```\nB\n```",
        "```json\n{\"answer\": \"B\"}\n```", "<answer>\nB\n</answer>", "<final>B</final>", "[[B]]", "Answer: [B]",
        "#### B", "It isn't A. It's B.",
    ],
    "C": [
        "\nC. because", "Based on the passage, the answer is C",
        "A: Let's think step by step.\nFirst.\nSo the answer is (C).",
        "Let's see.\nA is wrong because x.\nB is wrong because y.\nC is right.\nThe answer is C",
        "The right choice would be C", "Of the options, only (C) fits.",
        "Sure! The correct answer is **C. The third law**.\n\nWhy:\n\n- **A** is wrong\n- **B** is wrong",
        "The answer is not B, it is C.",
    ],
    "D": [
        "The answer is D.", "D 因为", "I believe the correct choice is (D), not (A).", "The answer: **(D)**",
        "Not A, B, or C, so D.",
    ],
    "": [
        "Dogs", "no idea", "", "A or B", "A and B", "A/B", "The answer is A or B", "Either A or B",
        "The answer could be A or B.", "答案是A或B", "Both A and B are correct.", "A, B", "AB", "Because I say so",
        "A dog barks", "As an AI, I cannot answer", "Cannot be determined", "The answer is not A.",
        "The answer is a dog", "<think>A A A", "Vitamin C helps", "Washington D.C.", "None of the above",
        "The answer is B or maybe C.", "E", "The answer is E", "The answer is B-12", "The options are A, B, C, D.",
        "The answer is either B or C", "It could be A, but also B.", "The answer is: A) and B)",
        "Option A or option B", "B or C", "The answer is (A) or (B).", "A or B?", "(A) or (B)", "答案是A和B",
        "A、B", "A 或 B", "I'm torn between A and B.", "I don't know.", "All of the above.", "答案是 B 和 C",
        "无法确定", "An apple", "AI", "ABCD", "Bob", "DNA", "C++", "B-cells", "A's",
    ],
}  # fmt: skip
SEVERAL = {
    "A": ["A", "正确答案：A C"],
    "AB": ["AB"],
    "ABD": ["应选ABD。"],
    "AC": ["A和C", "(A)(C)", "**A, C**", "\\boxed{A, C}", "选项A和C正确", "ＡＣ"],
    "ACD": ["ACD", "答案是ACD", "A、C、D", "The answer is A, C and D.", "\\boxed{ACD}"],
    "B": ["(B)y"],
}  # fmt: skip
NUMBERS = {
    "-0.5": [
        "−0.5", "-0.5", "－０．５", "–0.5", "-\\frac{1}{2}", "Answer: **−0.5**", "The answer is −0.5", "#### −0.5",
        "The answer is \\(-0.5\\).", "\\(\\boxed{-0.5}\\)", "-1/2", "-.5", "-$0.50", "−$0.50", "$−0.50",
    ],
    "-0.75": ["$\\boxed{-\\frac{3}{4}}$", "-3/4", "\\frac{-3}{4}", "-\\dfrac{3}{4}"],
    "-3": ["答案：−3", "minus 3"],
    "-5": ["#### −5", "-$5", "$-5", "The answer is -5", "negative 5", "The answer is $-5$"],
    "0": ["-0", "The answer is 0."],
    "0.5": ["1/2", "½", "\\frac{1}{2}", "\\dfrac12", ".5"],
    "0.75": ["\\frac{3}{4}", "3/4", "3 / 4", "3⁄4", "¾", "The answer is \\frac{3}{4}."],
    "1": ["1."],
    "1.75": ["1¾"],
    "1/3": ["1/3"],
    "10": ["5-10 apples", "5–10"],
    "100": ["100\\%", "￥100", "¥100", "100元", "答案是100元。", "答案是：１００"],
    "1000": ["10^3"],
    "100000": ["1,00,000"],
    "1000000": ["£1,000,000", "1\u00a0000\u00a0000"],
    "12": ["１２％"],
    "1200": ["1.2 × 10^3", "1.2 \\times 10^{3}"],
    "123": ["１２３"],
    "1234": ["\\boxed{1{,}234}", "#### $1,234", "1\u202f234", "1'234", "１，２３４"],
    "1234.5": [
        "1,234.5", "The answer is: \n\n**$1,234.50**", "Therefore, the total is $1,234.50.", "\\$1,234.50",
        "$\\$1{,}234.50$", "#### 1,234.5",
    ],
    "15": ["Answer: In 3 days he eats 15.", "所以一共是 15 个", "5 × 3 = 15", "5*3=15", "5 * 3 = 15"],
    "1500": ["1.5e3"],
    "18": [
        "The answer is **18**.", "**18**", "Answer: 18", "**Answer:** $18", "Answer: 18 apples (12+6)", "答案是18",
        "答案：18。", "答案为１８个", "18\n\nJanet sells 9 eggs at 2", "The answer is **$18**.",
        "She makes **$18** every day.", "The final answer is $\\boxed{\\$18}$", "\\boxed{18\\text{ dollars}}",
        "\\boxed{x = 18}", "x=18", "= 18", "≈ 18", "about 18", "18 eggs", "18.0", "18.00", "+18", "(18)", "[18]",
        "\"18\"", "`18`", "**18** eggs", "*18*", "_18_", "18**", "The answer is 18!", "Answer = 18",
        "Answer: $18/hour", "18\n", "Answer:\n18", "Answer:\n\n**18**", "Total: 5 + 13 = 18", "5 + 13 = **18**",
        "$5 + $13 = $18", "{\"answer\": 18}", "<answer>18</answer>", "#### 18 eggs", "####18",
        "The answer is:\n#### 18", "The answer is 12 + 6 = 18",
    ],
    "2.5": ["2 1/2", "2½"],
    "2/3": ["The answer is 2/3"],
    "2020": ["12/25/2020"],
    "234": ["1 234"],
    "3.5": ["$3.50", "＄３．５０"],
    "3000": ["3 × 10³"],
    "36": ["The answer is 18 * 2 = 36.", "The answer is 36 = 18*2"],
    "4": ["3,4", "<think>3</think>4"],
    "42": ["\\boxed{42}", "最终答案：**42**"],
    "5": [
        "The answer is 5. Not 5000", "10-5", "So she has 5 apples.", "x = 5", "5°", "€5",
        "The answer is approximately 5.0", "10 minus 5", "5,", "\\$5", "$5$", "5\\text{ apples}", "=5", "5.", "+5",
        "The answer is USD 5", "12 - 5",
    ],
    "50": ["50%", "50 percent", "50 %", "\\boxed{50\\%}"],
    "5000": ["The answer is 5,000. Then", "so #### 5000", "3 and then $5,000.00", "The answer is: 5000.0\n7"],
    "6": ["The answer is not 5 but 6"],
    "7": ["007", "The final answer is 7.", "**Final Answer: 7**", "12 – 5 = 7", "12 − 5 = 7"],
    "8": ["2^3 = 8"],
    "": ["who knows", "0/0", "1e999", "The answer is zero"],
}  # fmt: skip
WORDS = {
    "No": [
        "False.", "**No.** Because", "The answer is no.", "不是", "否", "答案：否", "(No)", "Incorrect",
        "It is false.", "<think>yes</think>No", "No, it isn't", "Therefore, the answer is: **No**", "不正确",
        "错误。", "Answer: **False**", "That is not true.", "The correct answer is **No**.", "Answer: False.",
        "(b) No", "No — because", "No - the", "不，", "不是的", "答案是否", "不对",
        "Based on the passage, the answer is no", "<answer>No</answer>", "The statement is incorrect.", "Ｎｏ",
        "Nope", "{\"answer\": \"no\"}", "\\text{No}", "I would say no.", "否。",
    ],
    "Yes": [
        " yes, it is", "**Yes**", "Answer: Yes", "\\boxed{\\text{Yes}}",
        "Based on the passage, yes, snow is white.", "According to the passage, the statement is true.", "是的",
        "答案是：是", "Ｙｅｓ", "Correct.", "YES", "So yes.", "\"Yes\"", "正确", "**Answer:** Yes",
        "The answer is: Yes.", "Yes.", "Yes!", "`Yes`", "Yes, because", "是，因为", "对", "True", "True.", "Yeah",
        "The answer is \"Yes\"", "{\"answer\": true}", "The passage confirms it. So, yes.",
        "The passage confirms it. Yes.", "Yes. No.", "正确。", "**是**",
    ],
    "": [
        "Yesterday", "Yes or no", "Yes and no", "No idea", "I have no idea", "There is no snow", "True or false?",
        "The passage says no such thing", "答案是是", "Yes/No", "yes or no?", "Neither yes nor no",
        "It is not true that", "The answer is not yes", "Nothing", "Not", "Yesno", "是否正确尚不清楚",
    ],
}  # fmt: skip


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


@pytest.mark.parametrize(("text", "right"), listed(WORDS))
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
    began = time.perf_counter()
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
    assert time.perf_counter() - began < 15
