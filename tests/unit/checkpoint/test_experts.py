"""Mixtures of experts in rank files of an independent writer: any TP, PP and EP, and three ways to keep experts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.rank_files import FILE, open_rank_files
from modellink_lora.config.errors import UserError
from tests.golden import experts

H, HEADS, GROUPS, D, F, SHARED, EXPERTS, LAYERS, VOCAB = 16, 4, 2, 4, 12, 20, 4, 2, 20
MODEL: dict[str, Any] = {"heads": HEADS, "groups": GROUPS, "topk": 2}


def full_tensors(kind: str = "qwen2_moe") -> dict[str, Tensor]:
    """What `tests/golden/experts.py` writes; Mixtral's or, with a shared expert and its gate, Qwen2-MoE's."""
    wide = (HEADS + 2 * GROUPS) * D
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCAB, H)}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (H,), "self_attention.linear_qkv.weight": (wide, H),
        "self_attention.linear_proj.weight": (H, HEADS * D), "pre_mlp_layernorm.weight": (H,),
        "mlp.router.weight": (EXPERTS, H), "mlp.experts.w1": (EXPERTS, 2 * F, H), "mlp.experts.w2": (EXPERTS, H, F),
    }  # fmt: skip
    if kind == "qwen2_moe":
        layer |= {
            "self_attention.linear_qkv.bias": (wide,), "mlp.shared_experts.linear_fc1.weight": (2 * SHARED, H),
            "mlp.shared_experts.linear_fc2.weight": (H, SHARED), "mlp.shared_expert_gate.weight": (1, H),
        }  # fmt: skip
    for number in range(LAYERS):
        shapes |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes |= {"decoder.final_layernorm.weight": (H,), "output_layer.weight": (VOCAB, H)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by our global names, each expert a tensor of its own."""
    result = {}
    for name, tensor in full.items():
        head, mark, which = name.partition("mlp.experts.w")
        if not mark:
            result[name] = tensor
        for expert in range(EXPERTS if mark else 0):
            result[f"{head}mlp.experts.local_experts.{expert}.linear_fc{which}.weight"] = tensor[expert]
    return result


def is_read(root: Path, full: dict[str, Tensor]) -> None:
    files, wanted = open_rank_files(root), expected(full)
    assert set(files.names()) == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(files.read(name), tensor), name


@pytest.mark.parametrize("tp, pp, ep", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 4), (2, 2, 2)])
def test_files_of_any_layout_give_the_tensors_they_were_made_of(tp: int, pp: int, ep: int, tmp_path: Path) -> None:
    full = full_tensors()
    root = experts.write(tmp_path, full, **MODEL, tp=tp, pp=pp, ep=ep)
    is_read(root, full)
    files = open_rank_files(root)
    assert (files.tp, files.partition.stages, files.ep, files.config.hf_model_type) == (tp, pp, ep, "qwen2_moe")
    config = files.config
    assert (config.num_experts, config.moe_ffn_hidden_size, config.moe_router_topk) == (EXPERTS, F, 2)
    assert config.moe_shared_expert_intermediate_size == SHARED and config.moe_router_pre_softmax


@pytest.mark.parametrize("style", experts.STYLES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_are_read_however_a_file_keeps_them(kind: str, style: str, tmp_path: Path) -> None:
    full = full_tensors(kind)
    root = experts.write(tmp_path, full, **MODEL, tp=2, ep=2, style=style, gate_as_parameter=style != "one by one")
    is_read(root, full)
    assert open_rank_files(root).config.hf_model_type == kind


def edit(root: Path, rank: str, change: Callable[[dict[str, Any]], object]) -> None:
    for file in root.glob(f"iter_*/{rank}/{FILE}"):
        document = torch.load(file, weights_only=False)
        change(document)
        torch.save(document, file)


PROJ = "decoder.layers.0.self_attention.linear_proj.weight"


@pytest.mark.parametrize("rank, change, words", [
    ("mp_rank_*_001", lambda d: d["model"].update({PROJ: torch.zeros(H, H)}),
     rf"mp_rank_00_001/.*: {PROJ} is not that of expert-parallel rank 0"),
    ("mp_rank_*_001", lambda d: d["model"].pop(PROJ), rf"mp_rank_00_001/.*: {PROJ} is not that of"),
    ("mp_rank_*_001", lambda d: [d["model"].pop(name) for name in list(d["model"]) if "local_experts.1." in name],
     r"mp_rank_00_001/.*holds 1 experts of a layer, other files 2"),
    ("*", lambda d: setattr(d["args"], "num_experts", 8), r"args say num_experts 8, .*router has 4 rows"),
    ("*", lambda d: setattr(d["args"], "pipeline_model_parallel_size", 2),
     "args say expert_model_parallel_size 2, the rank folders make it 1"),
    ("*", lambda d: setattr(d["args"], "expert_model_parallel_size", 4), "expert_model_parallel_size 4"),
    ("*", lambda d: d["model"].pop("decoder.layers.1.mlp.router.weight"), r"lacks 1 tensors, e\.g\. .*router"),
])  # fmt: skip
def test_files_that_do_not_belong_together_are_refused(
    rank: str, change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    root = experts.write(tmp_path, full_tensors(), **MODEL, ep=2)
    edit(root, rank, change)
    with pytest.raises(UserError, match=words):
        open_rank_files(root)


def test_a_grouped_weight_that_does_not_fit_its_router_is_refused(tmp_path: Path) -> None:
    root = experts.write(tmp_path, full_tensors(), **MODEL, style="grouped")
    edit(root, "*", lambda d: d["model"].update({"decoder.layers.0.mlp.experts.weight1": torch.zeros(H, 3)}))
    with pytest.raises(UserError, match=r"experts\.weight1 \[16, 3\] does not fit the router"):
        open_rank_files(root)


def test_a_missing_expert_folder_is_named(tmp_path: Path) -> None:
    root = experts.write(tmp_path, full_tensors(), **MODEL, tp=2, pp=2, ep=2)
    shutil.rmtree(root / "iter_0000300/mp_rank_01_000_001")
    with pytest.raises(UserError, match=r"mp_rank_01_000_001/.* is missing.*2 x 2 x 2"):
        open_rank_files(root)


def test_an_adapter_beside_the_base_is_read_from_expert_folders(tmp_path: Path) -> None:
    root = experts.write(tmp_path, full_tensors(), **MODEL, ep=2)

    def adapt(document: dict[str, Any], module: str, a: Tensor, b: Tensor) -> None:
        model = document["model"]
        model[f"{module}.base_layer.weight"] = model.pop(f"{module}.weight")
        model |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
        document["args"].lora_alpha = 8

    names = [name for name in expected(full_tensors()) if name.endswith(("linear_proj.weight", "linear_fc2.weight"))]
    wanted: dict[str, Tensor] = {}
    for name in names:
        module, (rows, columns) = name.removesuffix(".weight"), expected(full_tensors())[name].shape
        a, b = torch.randn(4, columns), torch.randn(rows, 4)
        wanted |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        expert = re.search(r"local_experts\.(\d+)", module)
        each = EXPERTS // 2  # of a folder, which counts them from 0
        folder = f"*_{int(expert[1]) // each:03d}" if expert else "*"
        local = re.sub(r"local_experts\.\d+", f"local_experts.{int(expert[1]) % each}", module) if expert else module
        edit(root, folder, lambda d, local=local, a=a, b=b: adapt(d, local, a, b))  # type: ignore[misc]
    is_read(root, full_tensors())
    adapter = open_adapter(root)
    found = {name: adapter.read(name) for name in adapter.shapes}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
