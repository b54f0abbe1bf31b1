"""Reading `--config FILE.yaml`: a mapping of flag spellings to values that stands under the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from modellink_lora.config.document import parse_yaml
from modellink_lora.config.errors import UserError


def read_mapping(path: str) -> dict[str, Any]:
    """The YAML mapping in `path`, keys spelled with dashes. Raises UserError naming the file, and the key at fault."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        node, content = yaml.compose(text, Loader=yaml.SafeLoader), parse_yaml(text)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config {path}: must hold one mapping, a line per flag such as `lora-r: 16`")
    values: dict[str, Any] = {}
    for key, value in node.value:  # the nodes still show a key given twice, which the loaded dict hides
        if value.tag.endswith(":int") and not re.fullmatch("[+-]?(0|[1-9][0-9]*)", value.value):
            line, meant = value.start_mark.line + 1, yaml.safe_load(value.value)
            raise UserError(f"--config {path}: {value.value} (line {line}) is {meant} to YAML: write plain digits")
        name = str(key.value).replace("_", "-")
        if name in values:
            raise UserError(f"--config {path}: {name} is given twice (line {key.start_mark.line + 1})")
        values[name] = None
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in values:
            raise UserError(f"--config {path}: the key {key!r} is not the name of a flag")
        values[name] = value
    return values


def apply(
    path: str,
    values: Mapping[str, Any],
    setter: Callable[[str], Callable[[Any], None] | None],
    hint: Callable[[str], str],
) -> None:
    """Hand each value to its setter; the setter's ValueError becomes one line that names file and key."""
    for name, value in values.items():
        use = setter(name)
        if use is None:
            raise UserError(f"--config {path}: unknown key {name}{hint(name)}")
        try:
            use(value)
        except ValueError as error:
            raise UserError(f"--config {path}: {name}: {error}") from None
