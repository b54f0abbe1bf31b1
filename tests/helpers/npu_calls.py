"""Finds every use of torch_npu in the package by reading its source, so that tests cannot forget a new call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "modellink_lora"


@dataclass(frozen=True)
class Use:
    """`root.name`, as an attribute or called with so many positional arguments and these keywords."""

    where: str  # file:line
    root: str  # "torch_npu", or "npu" for torch.npu
    name: str  # may have dots
    called: bool = False
    positional: int = 0
    keywords: tuple[str, ...] = ()


def uses() -> list[Use]:
    return [use for file in sorted(PACKAGE.rglob("*.py")) for use in _uses_in(file)]


def _uses_in(file: Path) -> Iterator[Use]:
    tree = ast.parse(file.read_text())
    names = {"torch_npu": "torch_npu"} | {
        target.id: "npu"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _is_npu(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        root, dotted = _path(node, names)
        if not root or not dotted:
            continue
        where, call = f"{file.relative_to(PACKAGE)}:{node.lineno}", calls.get(id(node))
        if call is None:
            yield Use(where, root, dotted)
            continue
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        assert not starred, f"{where}: a call with *arguments cannot be bound by reading it"
        keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
        yield Use(where, root, dotted, True, len(call.args), keywords + _unpacked(call, tree))


def _unpacked(call: ast.Call, tree: ast.AST) -> tuple[str, ...]:
    """Keywords that come as **name: the keys of dicts written out where the name is assigned."""
    spread = {k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)}
    return tuple(
        str(key.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in spread for t in node.targets)
        for inside in ast.walk(node.value)
        if isinstance(inside, ast.Dict)
        for key in inside.keys
        if isinstance(key, ast.Constant)
    )


def _path(node: ast.expr, names: dict[str, str]) -> tuple[str, str]:
    """Of an attribute: what it is an attribute of in the end, and the dotted rest."""
    rest: list[str] = []
    while isinstance(node, ast.Attribute) and not _is_npu(node):
        rest.insert(0, node.attr)
        node = node.value
    if _is_npu(node):
        return "npu", ".".join(rest)
    return (names.get(node.id, "") if isinstance(node, ast.Name) else ""), ".".join(rest)


def _is_npu(node: ast.expr) -> bool:
    """torch.npu, or a call of the function that returns it."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "_npu"
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "npu"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    )
