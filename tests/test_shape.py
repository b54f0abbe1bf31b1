"""The shape of the package, read from its source: layers, the one patch place, where devices and environment appear."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modellink_lora"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# a file imports from lower layers, and from its own folder up to its own layer
FOLDER_LAYERS = {
    "config": 0, "megatron": 1.5, "device": 2, "parallel": 2.5, "models": 3, "adapters": 3.5, "data": 4,
    "checkpoint": 4, "planning": 4.5, "reporting": 4.5, "convert": 5, "training": 5, "inference": 5.5,
    "verification": 5.5, "diagnosis": 5.5, "evaluation": 5.7, "cli": 6,
}  # fmt: skip  # halves: two rooms of one layer, of which one stands on the other
PURE = {
    "data/templates", "data/text_encoder", "data/prompt",
    "data/handlers", "data/encode", "data/tools", "models/layouts", "models/family",
    "models/shapes", "models/config_keys", "models/families", "parallel/partition", "checkpoint/names",
    "checkpoint/store", "checkpoint/checksums", "checkpoint/disk", "checkpoint/fileset",
}  # fmt: skip
PATCH_PLACE = "device/redirect.py"


def layer_of(file: str) -> float:
    """Layer of `models/families/llama.py`; layer 1 is the pure files of folders that otherwise lie higher."""
    parts = file.removesuffix(".py").split("/")
    if len(parts) == 1 or parts[1:] == ["__init__"]:  # package markers hold a docstring, the root's the version
        return 7 if parts == ["__main__"] else FOLDER_LAYERS[parts[0]] if len(parts) == 2 else 0
    return 1 if "/".join(parts[:2]) in PURE else FOLDER_LAYERS[parts[0]]


def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module path, name it is bound to) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full, so that they can be searched for"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", alias.asname or alias.name


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain that starts at a name, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if isinstance(node, ast.Attribute) and inner else ""


def upward_imports(file: str, tree: ast.AST) -> list[str]:
    found = []
    for module, _ in imported(tree):
        if not module.startswith("modellink_lora."):
            continue
        words = module.split(".")[1:]
        paths = ["/".join(words[:n]) + end for n in range(len(words), 0, -1) for end in (".py", "/__init__.py")]
        target = next((path for path in paths if (PACKAGE / path).exists()), "__init__.py")
        own_folder = target.split("/")[0] == file.split("/")[0]
        if layer_of(target) > layer_of(file) or (layer_of(target) == layer_of(file) and not own_folder):
            found.append(f"{file} (layer {layer_of(file)}) imports {module} (layer {layer_of(target)})")
    return found


def patches(tree: ast.AST) -> list[str]:
    """Assignments to attributes of something imported from torch or megatron."""
    foreign = {name for module, name in imported(tree) if module.split(".")[0] in ("torch", "megatron")}
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(value=node.args[0], attr="?")]
        for target in targets:
            name = dotted(target)
            if isinstance(target, ast.Attribute) and name.split(".")[0] in foreign:
                found.append(f"line {node.lineno}: {name}")
    return found


def uses(tree: ast.AST, names: tuple[str, ...]) -> list[str]:
    """Imports and attribute chains that begin with one of `names`."""
    chains = [module for module, _ in imported(tree)] + [dotted(node) for node in ast.walk(tree)]
    return sorted({c for c in chains if any(c == name or c.startswith(name + ".") for name in names)})


DEVICE_NAMES = ("torch.cuda", "torch.npu", "torch_npu")
EDGE_NAMES = ("argparse.ArgumentParser", "os.environ", "os.getenv", "sys.argv")


@pytest.mark.parametrize("file", SOURCES)
def test_a_file_imports_from_lower_layers_and_its_own_folder_only(file: str) -> None:
    assert upward_imports(file, parse(file)) == []


@pytest.mark.parametrize("file", [f for f in SOURCES if layer_of(f) == 0])
def test_layer_0_uses_the_standard_library_and_readers_of_documents_only(file: str) -> None:
    roots = {module.split(".")[0] for module, _ in imported(parse(file))}
    assert roots <= set(sys.stdlib_module_names) | {"modellink_lora", "msgspec", "yaml"}


@pytest.mark.parametrize("file", [f for f in SOURCES if layer_of(f) == 1])
def test_layer_1_needs_neither_megatron_nor_process_groups(file: str) -> None:
    assert uses(parse(file), ("megatron", "torch.distributed")) == []


@pytest.mark.parametrize("file", [f for f in SOURCES if f != PATCH_PLACE])
def test_only_the_patch_place_changes_torch_or_megatron(file: str) -> None:
    settings = "torch.backends." if file.startswith("device/") else "nothing"
    assert [p for p in patches(parse(file)) if not p.split(": ")[1].startswith(settings)] == []


@pytest.mark.parametrize("file", [f for f in SOURCES if not f.startswith("device/")])
def test_accelerators_are_named_under_device_only(file: str) -> None:
    assert uses(parse(file), DEVICE_NAMES) == []


@pytest.mark.parametrize("file", [f for f in SOURCES if not f.startswith("cli/") and f != "__main__.py"])
def test_command_line_and_environment_are_read_in_cli_only(file: str) -> None:
    assert uses(parse(file), EDGE_NAMES) == []


def test_no_file_is_longer_than_400_lines() -> None:
    files = [p for folder in ("modellink_lora", "tests", "examples") for p in (ROOT / folder).rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {file: n for file, n in lengths.items() if n > 400} == {}


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, modellink_lora, modellink_lora.cli.main; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_these_guards_notice_what_they_guard_against() -> None:
    def tree(source: str) -> ast.AST:
        return ast.parse(source)

    assert upward_imports("config/model.py", tree("from modellink_lora.checkpoint.names import x"))
    assert upward_imports("data/prompt.py", tree("from modellink_lora.models import family"))
    assert upward_imports("models/layouts.py", tree("def f():\n  import modellink_lora.models.build"))
    assert not upward_imports("models/build.py", tree("from modellink_lora.models.layouts import x"))
    assert patches(tree("import torch\ntorch.cuda.synchronize = f"))
    assert patches(tree("from megatron.core import parallel_state as ps\nps._GROUP = 1"))
    assert patches(tree("import torch\nsetattr(torch.Tensor, 'type', f)"))
    assert not patches(tree("import torch\nx = torch.zeros(1)\nx.requires_grad = True"))
    assert uses(tree("import torch\nif x: torch.cuda.empty_cache()"), DEVICE_NAMES)
    assert uses(tree("from torch import cuda"), DEVICE_NAMES)
    assert uses(tree("import os\nos.environ['A'] = '1'"), EDGE_NAMES)
