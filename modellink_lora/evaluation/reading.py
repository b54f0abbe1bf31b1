"""The grammar of written answers, for every task: how a letter, a number, a word or a text is read in an answer.

docs/evaluation.md, "Reading answers", states the rules. The functions `read_...` take away the markup (markup.py) and
look for the answer in what is boxed, in what is said to be the answer, at the beginning, and last in what alone can be
meant. Where two answers can be meant there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from modellink_lora.evaluation.markup import plain, without_reasoning

GRAMMAR = 2  # to be raised with the rules: an evaluation that was begun under others is not continued

# Where an answer is said.

_BOX = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NOT = r"(?!\s*(?:not\b|n[o']t\b|neither\b|never\b|不))"
_IS = r"(?:is(?!n['’]t)|are|was|(?:would|should|must|will|could|may|might)\s+be|=|:|=>|->|→)"
_SAID = re.compile(
    rf"""(?:
    (?:\b(?:answers?|option|choice|letter|response|solution|alternative)
        (?:\s*\([^()\n]*\)|\s+(?:to|for)\s+[^.:\n]{{1,80}}?|\s+(?:here|choice|option|letter))?
      | \b(?:correct|right|best)\s+(?:one|statement|option|choice|letter)s?)
    \s*(?:{_IS}\s*)+
  | \b(?:final|correct|right)?\s*answer\s*\n+
  | \b(?:choose|select|pick|go(?:ing)?\s+with|opt\s+for|choosing|selecting|would\s+say|['’]d\s+say)\b\s*:?
  | (?:答案|选项|答)(?:应该?|就|只能)?(?:是|为|选|:)+
  | (?<![不勿未可])选(?!项)(?:择|取)?(?:的是|了)?
    ){_NOT}\s*""",
    re.I | re.X,
)
_STRONG = re.compile(rf"(?:the\s+answer\s+is|####){_NOT}", re.I)  # of which the first counts
_FINAL = re.compile(rf"(?:\bfinal\s+answer|最终答案)(?:\s*(?:{_IS}|为|是))*{_NOT}\s*", re.I)


def boxed(text: str) -> list[str]:
    r"""What stands in `\boxed{}` of a plain text, the last first."""
    return [content.strip() for content in _BOX.findall(text)][::-1]


def _said(text: str) -> Iterator[str]:
    """The rest of the text after each place that announces an answer."""
    text = _BOX.sub(r"\1", text)
    yield from (text[found.end() :] for found in _SAID.finditer(text))


def _final(text: str) -> list[str]:
    """The rest of the text after each `final answer`, the last first."""
    return [text[found.end() :] for found in _FINAL.finditer(text)][::-1]


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# Letters of choices.

_FILLER = re.compile(  # between what announces an answer and its letter
    r"(?:[\s:(\[{\"'“‘「【<]*(?:most\s+likely|likely|probably|clearly|definitely|therefore|thus|either|both|option"
    r"|options|choice|choices|answer|letter|the|选项|应该?|是|为)(?![A-Za-z]))*[\s:]*",
    re.I,
)
_OPEN, _CLOSE = r"[(\[{\"'“‘「【<]", r"[)\]}\"'”’」】>]"
# no word such as Dogs, B-12, C++, A's or D.C. goes on after the letter
_ALONE = r"(?![A-Za-z0-9]|['’][A-Za-z]|-[A-Za-z0-9]|\+\+|\#|\.[A-Za-z]\b)"
_LETTER = rf"(?:{_OPEN}\s*){{0,4}}([A-Za-z])(?![a-z0-9])(?:\s*{_CLOSE}){{0,4}}"
_JOIN = r"\s*(?:,\s*(?:and|or)\b|,|、|;|/|&|\band\s*/\s*or\b|\band\b|\bor\b|和|与|及|以及|或者?|还是)\s*"
_ALSO = r"(?:(?:maybe|perhaps|possibly|also|option|choice|选项)\s*)?"
_NEXT = re.compile(rf"(?:{_JOIN}{_ALSO})?{_LETTER}{_ALONE}")
_DENIED = re.compile(  # after a letter
    r"(?:\s*\([^()\n]{1,60}\))?\s*(?:选?项)?\s*"
    r"(?:(?:is|are|was|seems)\s*(?:not\b|n['’]t\b|incorrect|wrong|false)|isn['’]t|不|错)"
)
_AFTER_A = re.compile(  # what follows the letter A and not the article
    r"\s+(?:is|because|since|as|for|due|given|would|seems|and|or|was|with|based|according|the|an?|none|both|all)\b",
    re.I,
)
_VERDICT = re.compile(  # letters that are called right
    rf"(?<![A-Za-z0-9.])({_LETTER}{_ALONE}(?:{_JOIN}{_ALSO}{_LETTER}{_ALONE}){{0,6}})"
    r"(?:\s*\([^()\n]{1,60}\))?[^.\n;,A-Z]{0,40}?(?:"
    r"\s(?:is|are|seems|looks|would\s+be)\s+(?:clearly\s+|therefore\s+|thus\s+)?(?:the\s+)?(?:most\s+|only\s+)?"
    r"(?:correct|right|best|true|accurate|appropriate|answer)\b|(?:选?项)?(?:是|为|最)?(?:正确|对的?|符合))"
)
_CONCLUDES = re.compile(  # a letter that ends its line
    rf"\b(?:(?:so|therefore|thus|hence|conclusion|leaving)\b[,:]?\s*(?:it\s+is\s+|it['’]s\s+)?"
    rf"|it\s+(?:is|must\s+be)\s+|it['’]s\s+)(?={_LETTER}\W*$)",
    re.I | re.M,
)
_CHOICE_LIKE = re.compile(  # a letter in brackets, at the beginning of a clause, or before a punctuation mark
    rf"(?:(?<=^)|(?<=[\n,:;.。，]\s)|(?<=[\n,:;，。是选])|{_OPEN}\s*|\b(?:option|choice|选项)\s*)([A-Za-z]){_ALONE}"
    rf"|(?<![A-Za-z0-9.]){_LETTER}{_ALONE}(?=\s*(?:[.):,;!?。，]|$)|{_JOIN}{_ALSO}{_LETTER}{_ALONE})",
    re.M,
)
_NEGATED = re.compile(  # before a letter
    r"(?:\bnot|n['’]t|\brather\s+than|\binstead\s+of|\bexcept|\bexclude|不是|不选|排除|而非|非)\s*\(?$", re.I
)


def read_choices(text: str, letters: str) -> str:
    """The letters said to be right, in alphabetical order: several where they are named together; "" without any."""
    text = plain(text)
    first = _first_line(text)
    begin, end = _group(first, letters, begins=True) or ("", 0)
    rest = first[end:]
    if begin and not rest.strip(" .。!*"):  # the letter alone
        return begin
    for content in boxed(text):
        group = _group(content, letters, said=True)
        if group and re.fullmatch(r"\s*(?:[.:),].*)?", content[group[1] :], re.S):
            return group[0]
    if found := _last_said(first, letters):
        return found
    second = _first_line(text.partition("\n")[2])
    listed = "A" in begin and bool(re.match(rf"\(?{letters[1:2]}[.):]", second, re.I))  # the choices, not one of them
    question = rest.startswith(":")  # `A: Let us see` may mean an answer
    if begin and not listed and not question and not _DENIED.match(rest):
        return begin
    dotted = re.findall(rf"(?<![A-Za-z0-9.])([{letters}])\)?\.(?![A-Za-z]\b)", first)
    if dotted and not begin and _alone(first, letters) == dotted[-1]:
        return str(dotted[-1])
    for said in _final(_BOX.sub(r"\1", text)):
        if (group := _group(said, letters, said=True)) and not _DENIED.match(said[group[1] :]):
            return group[0]
    for part in (*filter(_STRONG.search, text.splitlines()), text):
        if found := _last_said(part, letters):
            return found
    return begin if question and not listed else _alone(text, letters)


def read_choice(text: str, letters: str) -> str:
    """The one letter that is said to be right; "" where there is none, or more than one."""
    found = read_choices(text, letters)
    return found if len(found) == 1 else ""


def _group(text: str, letters: str, *, said: bool = False, begins: bool = False) -> tuple[str, int] | None:
    """(letters, where they end) at the beginning of `text`: `B`, `(B)`, `A, C and D`, `ACD`.

    Args:
        said: it is announced as an answer, so that fillers may stand before it and a small letter counts.
        begins: `A` may be the article.
    """
    at = found.end() if (found := _FILLER.match(text)) and (said or begins) else 0
    run = re.compile(rf"{_OPEN}*([{letters}]{{2,}}){_CLOSE}*{_ALONE}").match(text, at)
    if run and len(run[1]) == len(set(run[1])):
        rising, closed = list(run[1]) == sorted(run[1]), not text[run.end() :].strip(" .。!")
        if rising or closed:
            return "".join(sorted(run[1])), run.end()
    chosen: list[str] = []
    end = at
    while found := _NEXT.match(text, end):
        letter = found[1]
        joined = found[0][: found.start(1) - found.start()].strip()
        if chosen and not joined:
            break
        rest = text[found.end() :]
        bracketed = not found[0].strip()[-1:].isalnum() or bool(re.search(rf"{_OPEN}\s*$", joined))
        closed = not re.match(r"\s*[\w'’]", rest) if said else not rest.strip(" .。!") or rest[0] in ".:"
        if letter.islower() and not closed and not bracketed:
            break
        if letter == "A" and begins and not bracketed and re.match(r"\s+[a-z]", rest) and not _AFTER_A.match(rest):
            break
        if letter.upper() not in letters:
            break
        chosen.append(letter.upper())
        end = found.end()
    return ("".join(sorted(set(chosen))), end) if chosen else None


def _last_said(text: str, letters: str) -> str:
    """The letters of the last statement in `text` that names some, else those that are called right."""
    groups = [(_group(rest, letters, said=True), rest) for rest in _said(text)]
    groups += [(_group(text[m.end() :], letters, said=True), text[m.end() :]) for m in _CONCLUDES.finditer(text)]
    named = [group[0] for group, rest in groups if group and not _DENIED.match(rest[group[1] :])]
    if named:
        return named[-1]
    right = "".join(m[1] for m in _VERDICT.finditer(text) if not _negated(text, m.start()))
    return "".join(sorted(set(re.findall(rf"(?<![A-Za-z])[{letters}](?![A-Za-z])", right))))


def _negated(text: str, at: int) -> bool:
    """Whether what stands before `text[at]` denies it."""
    return bool(_NEGATED.search(text[max(0, at - 30) : at]))


def _alone(text: str, letters: str) -> str:
    """The letters that are written as choices are, anywhere, and are not denied."""
    found = set()
    for match in _CHOICE_LIKE.finditer(text):
        letter, at = match[1] or match[2], match.start(1) if match[1] else match.start(2)
        article = letter == "A" and re.match(r"\s+[a-z]", text[at + 1 :]) and not _AFTER_A.match(text[at + 1 :])
        denied = _negated(text, at) or _DENIED.match(text[at + 1 :])
        if letter in letters and not article and not denied:
            found.add(letter)
    return "".join(sorted(found))


# Numbers.

_SIGN = r"(?:(?<![\w)\]%])[-+]|(?<!\d\s)(?<![\w])(?:negative|minus)\s+|负)?"
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"({_SIGN})(?:(?:[$€£¥₹]|US\$|USD\s|Rs\.?\s)\s?(-?))?(?<![A-Za-z\d.])(?:"
    rf"(?<!/)(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)(?!\d|[/.]\d)"
    rf"|({_DIGITS})(?:[eE]([-+]?\d+)\b|\s*[×x*·]\s*10\s*\^\s*\{{?\s*([-+]?\d+)\}}?|\s*\^\s*\{{?(\d{{1,2}})\b\}}?)?)",
    re.I,
)
_WEAK = re.compile(rf"(?:\banswer\s*(?:{_IS})+|答案(?:是|为|:)+){_NOT}\s*", re.I)
_LONGEST = 300  # digits of a number that can be meant
_UNIT = re.compile(r"\s*(?:[^\W\d]+\s*){0,3}(?:[%°]|[.(,;!。，)]|$)", re.M)


def read_number(text: str) -> str:
    """The number that is said to be the answer, else the last one, as `as_number` spells it; "" without any."""
    text = plain(text)
    for content in boxed(text):
        if values := list(_NUMBER.finditer(content)):
            return _spelled(values[-1] if "=" in content else values[0])
    text = _BOX.sub(r"\1", text)
    for rest in (*_final(text), *(text[said.end() :] for said in _STRONG.finditer(text))):
        rest = rest[:_LONGEST]
        if (found := _NUMBER.search(rest)) and not re.search(r"\d", rest[: found.start()]) and found.start() <= 12:
            return _spelled(_result(rest, found))
    if found := _NUMBER.fullmatch(text.partition("\n\n")[0].rstrip(".。!")):
        return _spelled(found)
    for said in reversed(list(_WEAK.finditer(text))):
        line = text[said.end() :].partition("\n")[0]
        if (found := _NUMBER.match(line)) and (_UNIT.match(line, found.end()) or "=" in line):
            return _spelled(_result(line, found))
    numbers = list(_NUMBER.finditer(text))
    return _spelled(numbers[-1]) if numbers else ""


def as_number(text: str) -> str:
    """A number in one spelling, without currency, thousands and trailing zeros; "" for what is none."""
    found = _NUMBER.fullmatch(plain(text))
    return _spelled(found) if found else ""


def _result(text: str, found: re.Match[str]) -> re.Match[str]:
    """The number after the last `=` of the line where `found` begins a calculation, `18 * 2 = 36`, else `found`."""
    line = text[found.end() :].partition("\n")[0]
    if re.match(r"\s*(?:[^\W\d]+\s*)?[-+*×x÷/]\s*[$(\d]", line) and "=" in line:
        return _NUMBER.match(text, found.end() + line.rindex("=") + 1 + _blanks(line[line.rindex("=") + 1 :])) or found
    return found


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())


def _spelled(found: re.Match[str]) -> str:
    sign, inner, whole, above, below, digits, e, of_ten, power = found.groups()
    if len(found[0]) > _LONGEST:
        return ""
    if digits:
        exponent = int(e or of_ten or 0)
        if abs(exponent) > _LONGEST:
            return ""
        value = Fraction(digits.replace(",", "")) ** int(power or 1) * Fraction(10) ** exponent
    elif int(below) == 0:
        return ""
    else:
        value = int(whole or 0) + Fraction(int(above), int(below))
    value = -value if (sign not in ("", "+")) != bool(inner) else value
    rest = value.denominator
    places = 0
    while rest % 2 == 0 or rest % 5 == 0:
        rest = rest // 10 if rest % 10 == 0 else rest // 2 if rest % 2 == 0 else rest // 5
        places += 1
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    if not places:
        return str(value.numerator)
    scaled = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' * (value < 0)}{scaled[:-places]}.{scaled[-places:]}".rstrip("0")


# Words and phrases.

_MEANINGS = {
    "Yes": "yes yeah yep true correct 是的 正确 是 对",
    "No": "not-true not-correct no nope false incorrect 不是 不正确 错误 不对 错 否 不是的 不",
}
YES_NO = {word.replace("-", " "): meaning for meaning, words in _MEANINGS.items() for word in words.split()}
_SHORT = "[是否对错不]"  # words that may begin others, such as 是否


def read_word(text: str, words: dict[str, str]) -> str:
    """The value in `words` of the word that is said to be the answer; "" where there is none, or two.

    Args:
        words: in lower case; what each of them means.
    """
    text = plain(text)
    any_ = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    not_so = rf"[A-Za-z0-9]|\s+(?:idea|clue|information|answer|comment)\b|的?(?:答案|选项)|(?<={_SHORT})\w"
    word = re.compile(rf"({any_})(?!{not_so})", re.I)
    both = re.compile(rf"\s*(?:or|and|/|或者?|和|还是)\s*(?:{any_})(?![A-Za-z0-9])", re.I)

    def at_start(rest: str) -> str:
        begin = re.match(r"\W*(?:[A-Da-d][).:]\s*)?\W*", rest)
        found = word.match(rest, begin.end() if begin else 0)
        return words[found[1].lower()] if found and not both.match(rest, found.end()) else ""

    for candidate in (_first_line(text), *boxed(text), *_final(text), *_said(text)):
        if meaning := at_start(candidate):
            return meaning
    concluded = re.compile(
        rf"(?:\b(?:so|therefore|thus|hence)\b,?\s*|\b(?:it|that)['’]s\s+|\bthink\s+|\b(?:it|this|that|statement|claim|expression|argument)\s+is\s+"
        rf"|(?:^|[.,:;!(。，]\s*))(?=({any_})\s*(?:[.,;:!)。，]|$))",
        re.I | re.M,
    )
    meanings = {words[found[1].lower()] for found in concluded.finditer(text)}
    return meanings.pop() if len(meanings) == 1 else ""


_THE_ANSWER = re.compile(rf"the\s+answer\s+is{_NOT}\s*:?(.*)|####\s*(.+)", re.I)
_ANSWER = re.compile(r"\banswer\s*:\s*(.+)|答案(?:是|为|:)+\s*(.+)", re.I)


def read_phrase(text: str) -> str:
    """What is boxed, else what follows the first `the answer is` on its line, else the first line that is not empty."""
    text = without_reasoning(text)
    said = _THE_ANSWER.search(text) or _ANSWER.search(text)
    line = next(filter(None, said.groups()), "") if said else ""
    for content in boxed(text):
        return bare_phrase(content)
    return bare_phrase(line.strip() or _first_line(text[said.end() :] if said else text))


def bare_phrase(text: str) -> str:
    """A text without the marks people put around it: `(A).`, `**A**`, `$A$` and `A` are one."""
    text = text.strip().strip("*\"'`“” ").rstrip("。").removesuffix(".").strip("*\"'`“” ")
    if text.startswith(("$", "\\(")) and text.endswith(("$", "\\)")):
        text = text.removeprefix("\\(").removesuffix("\\)").strip("$").strip()
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def same_phrase(one: str, other: str) -> bool:
    """Whether two short texts or formulas are one: letter case, blanks, LaTeX's wrappers and list commas aside."""

    def reduced(text: str) -> str:
        # a text of signs alone, such as brackets, has no markup
        text = plain(text) if re.search(r"\w", text) else text
        return re.sub(r"\s+", "", text.replace("°", "").replace("^\\circ", "")).casefold()

    words = [re.sub(r"[,、]\s+", " ", text).casefold().split() for text in (one, other)]
    return words[0] == words[1] or reduced(one) == reduced(other) or (
        bool(as_number(one)) and as_number(one) == as_number(other)
    )  # fmt: skip
