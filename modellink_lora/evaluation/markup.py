"""What a written answer says, without its form: reasoning in tags, markdown, HTML, LaTeX, full-width characters."""

from __future__ import annotations

import re
import unicodedata

_REASONING = re.compile(r"^\s*<(think|thinking|thought|reasoning)>|</(?:think|thinking|thought|reasoning)>", re.I)
_TAG = re.compile(
    r"</?(?:em|strong|mark|div|span|code|center|li|ul|ol|h[1-6])(?:\s[^<>]*)?>|<(b|i|u|p)>([^<]*)</\1>", re.I
)
_LATEX_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|bb|tt)|operatorname|boldsymbol|bm|emph|underline|mbox)\s*"
    r"\{([^{}]*)\}"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))")
_REPLACED = [  # in this order
    (re.compile(r"<br\s*/?>|</(?:final_?)?(?:answer|final)>|\r\n?", re.I), "\n"),
    (re.compile(r"<(?:final_?)?(?:answer|final)>", re.I), "\nAnswer: "),
    (re.compile(r"(?<=\d)(?:\\[,!;:]|\{,\}|[\u00a0\u2009\u202f'’_])+(?=\d{3}(?!\d))"), ","),  # of thousands
    (re.compile(r"\\[,;:!> ]|\\q?quad\b|[\u00a0\u2000-\u200a\u202f\u3000]"), " "),
    (re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060\ufeff]"), ""),
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\(?=[%$#&_])"), ""),
    (re.compile(r"^[ \t]*(?:```|~~~).*$", re.M), ""),
    (re.compile(r"`|(?<=\w)[\"'](?=\s*:)"), ""),  # of code, and of the names of JSON
    (re.compile(r"(?<![A-Za-z0-9_])(_{1,3})(?=\S)([^_\n]+?)\1(?![A-Za-z0-9_])"), r"\2"),
    (re.compile(r"(?<![A-Za-z0-9)*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![A-Za-z0-9(*])"), ""),
    (re.compile(r"^[ \t]*(?:#{1,6}(?=\s+[^\s\d$-])|>(?=\s*[A-Za-z(])|[*+•-](?=\s))\s*", re.M), ""),
    (re.compile(r"\$(?!\s?[-+.]?\d)"), ""),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"\n\s*\n"), "\n\n"),
]
_MINUS = "‐‑‒–—−﹣－"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def plain(text: str) -> str:
    """`text` without reasoning in tags, markup and LaTeX's wrappers, its letters, digits and signs in ASCII's form."""
    text = "".join(map(_ascii, without_reasoning(text)))
    text = re.sub(f"[{_MINUS}](?=\\s?[$€£¥]?\\.?\\d)", "-", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = _TAG.sub(lambda m: m[2] or "", text)
    while (unwrapped := _LATEX_WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    text = _LATEX_FRACTION.sub(_as_fraction, text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip()


def without_reasoning(text: str) -> str:
    """`text` after the last `</think>`; nothing of it where `<think>` begins it and does not end."""
    ends = [found.end() for found in _REASONING.finditer(text) if not found[1]]
    return text[ends[-1] :] if ends else "" if _REASONING.match(text) else text


def _ascii(character: str) -> str:
    """The ASCII form of a full-width, mathematical or circled letter, of a full-width digit or sign, of a fraction."""
    if character < "\x80":
        return character
    kind, _, _ = unicodedata.decomposition(character).rpartition(" ")
    plain = unicodedata.normalize("NFKC", character)
    if kind in ("<wide>", "<font>") and plain.isascii() and character not in _MINUS:
        return plain
    if kind == "<circle>" and plain.isascii() and plain.isalpha():
        return plain
    if "\u2044" in plain:  # ½
        return " " + plain.replace("\u2044", "/")
    return "/" if character == "\u2044" else character


def _as_fraction(found: re.Match[str]) -> str:
    above, below = (part.strip() for part in (found[1] or found[3] or "", found[2] or found[4] or ""))
    mixed = " " if found.string[: found.start()][-1:].isdigit() else ""
    return f"{mixed}{above}/{below}" if f"{above}{below}".lstrip("-").isalnum() else f"{mixed}({above})/({below})"
