"""Limits of what a pickle may ask for: a file of a hundred bytes can describe what takes all memory, or forever.

The same list, stored twice in a list that is stored twice in another, and so on, costs nothing until it is printed, and
such a tuple nothing until it is hashed (where tuples nested too deeply end the process).
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from modellink_lora.config.errors import UserError

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, np.generic)
_KEY_LENGTH, _KEY_DEPTH = 64, 2
_DEPTH, _OBJECTS = 100, 4_000_000  # a training checkpoint is 10 deep and has some 100,000


def check_keys(keys: Iterable[Any], *, also: tuple[type, ...] = ()) -> None:
    """Raise UserError unless all are plain values, objects of `also`, or small tuples of them."""
    for key in keys:
        if not _is_key(key, also, _KEY_DEPTH):
            raise UserError(
                f"has a {type(key).__name__} for a key, which weights do not need: the file is refused unread"
            )


def _is_key(value: Any, also: tuple[type, ...], depth: int) -> bool:
    if isinstance(value, tuple):
        return depth > 0 and len(value) <= _KEY_LENGTH and all(_is_key(each, also, depth - 1) for each in value)
    return isinstance(value, (*_PLAIN, *also))


def check_size(document: Any) -> None:
    """Raise UserError if `document` is too deep, or too large once what is stored several times is counted so often."""
    level, left = [document], _OBJECTS
    for _ in range(_DEPTH):
        level = list(itertools.islice(itertools.chain.from_iterable(map(_children, level)), left + 1))
        left -= len(level)
        if left < 0:
            raise UserError(f"describes more than {_OBJECTS} objects, which weights do not need: the file is refused")
        if not level:
            return
    raise UserError(f"is nested more than {_DEPTH} deep, which weights do not need: the file is refused")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, Namespace):
        return vars(node).values()
    return node if isinstance(node, (list, tuple, set, frozenset)) else ()


def container(kind: Callable[..., Any], *, pairs: bool = False, hashed: bool = False) -> Callable[..., Any]:
    """`kind`, a builtin container, called as a pickle calls it: with what other containers hold.

    Args:
        pairs: it is a dictionary, made of (key, value).
        hashed: it is a set.
    """

    def make(*values: Any) -> Any:
        *first, items = values or ((),)  # a defaultdict has its factory before the items
        if pairs and callable(items):
            first, items = [*first, items], ()
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise UserError(f"makes a container of a {type(items).__name__}, which weights do not need")
        if pairs and not isinstance(items, dict):
            check_keys(_firsts(items))
        if hashed:
            check_keys(items)
        return kind(*first, items)

    return make


def _firsts(pairs: Iterable[Any]) -> Iterator[Any]:
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError("makes a dictionary of what are no pairs, which weights do not need")
        yield pair[0]


def text(value: Any = "") -> str:
    if not isinstance(value, (str, int, float)):
        raise UserError(
            f"makes text of a {type(value).__name__}, which weights do not need: the file is refused unread"
        )
    return str(value)


def some_bytes(data: Any = b"") -> bytes:
    """bytes and bytearray, but not of a number, which would ask for so many zeros."""
    if not isinstance(data, (bytes, bytearray, list, tuple)):
        raise UserError(
            f"makes bytes of a {type(data).__name__}, which weights do not need: the file is refused unread"
        )
    return bytes(data)
