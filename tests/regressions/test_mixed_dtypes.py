"""Each tensor keeps the dtype it has in the file, through every format and back; what is rounded is listed.

Seen in public as NVIDIA-NeMo/Automodel #3193: tensors that must stay in fp32 were cast with the rest.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model

HEAD = "lm_head.weight"


def mixed(folder: Path, *, family: str = "llama", experts: int = 0) -> Path:
    """A bf16 model with norms, router, the q of layer 0 in fp32, and an fp16 head."""
    made_model(folder, Dimensions(family=family, experts=experts, hidden=16, vocab=24, dtype=torch.bfloat16))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if re.search(r"norm|mlp\.gate\.|moe\.gate\.|layers\.0\.self_attn\.q_proj", name):
            tensors[name] = torch.randn(tensor.shape, generator=generator)  # values that bf16 does not have
    tensors[HEAD] = torch.randn(tensors[HEAD].shape, generator=generator).half()
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(a: Path, b: Path, *, but: str = "$^") -> None:
    x, y = hf_tensors(a), hf_tensors(b)
    assert x.keys() == y.keys()
    for name in x:
        if not re.search(but, name):
            assert x[name].dtype == y[name].dtype, name
        assert torch.equal(x[name].float(), y[name].float()), name


def test_from_hugging_face_to_hugging_face_every_dtype_is_kept(tmp_path: Path) -> None:
    source = mixed(tmp_path / "hf")
    told = convert(source, tmp_path / "out", to="hf", verify=True)
    same(tmp_path / "out/mg2hg", source)
    assert "the result is bf16 (fp32 for" in told and "fp16 for 1 tensor (lm_head.weight)" in told
    assert "verified" in told and "rounded" not in told


@pytest.mark.parametrize("layout", [{}, {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}])
@pytest.mark.parametrize("experts", [0, 4])
def test_there_over_rank_files_and_back(layout: dict[str, int], experts: int, tmp_path: Path) -> None:
    source = mixed(tmp_path / "hf", family="mixtral" if experts else "llama", experts=experts)
    told = convert(source, tmp_path / "mg", to="mg", use_mcore_models=True, verify=True, **layout)
    assert "float32 of" in told
    files = open_rank_files(tmp_path / "mg")
    assert files.read("decoder.final_layernorm.weight").dtype == torch.float32
    assert files.read("output_layer.weight").dtype == torch.float16 and files.dtype == torch.bfloat16
    convert(tmp_path / "mg", tmp_path / "back", to="hf", verify=True)
    # q, k and v are one tensor in rank files, whose dtype holds all three
    same(tmp_path / "back/mg2hg", source, but=r"layers\.0\.self_attn\.[kv]_proj")


def test_metas_files_hold_each_dtype(tmp_path: Path) -> None:
    source = hf_tensors(mixed(tmp_path / "hf"))
    convert(tmp_path / "hf", tmp_path / "meta", to="meta", target_tensor_parallel_size=2, verify=True)
    found = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    assert torch.equal(found["norm.weight"], source["model.norm.weight"])
    assert (found["norm.weight"].dtype, found["output.weight"].dtype) == (torch.float32, torch.float16)
    assert found["layers.1.feed_forward.w1.weight"].dtype == torch.bfloat16


def test_a_merged_weight_keeps_its_dtype_and_so_do_the_others(tmp_path: Path) -> None:
    source = mixed(tmp_path / "hf")
    adapter = random_adapter(tmp_path / "adapter", source, targets=("linear_proj",))
    convert(source, tmp_path / "out", to="hf", lora_load=str(adapter), verify=True)
    a, b = hf_tensors(source), hf_tensors(tmp_path / "out/mg2hg")
    assert {name: tensor.dtype for name, tensor in a.items()} == {name: tensor.dtype for name, tensor in b.items()}
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed and all(name.endswith("o_proj.weight") for name in changed)


def test_what_params_dtype_rounds_is_listed_with_count_and_names(tmp_path: Path) -> None:
    source = mixed(tmp_path / "hf")
    told = convert(source, tmp_path / "out", to="hf", params_dtype="bf16")
    warnings = [line for line in told.splitlines() if "rounded from" in line]
    assert any("float32 to bfloat16: 6 tensors (" in line and "final_layernorm" in line for line in warnings), warnings
    assert any("float16 to bfloat16: 1 tensor (output_layer.weight)" in line for line in warnings)
    assert {tensor.dtype for tensor in hf_tensors(tmp_path / "out/mg2hg").values()} == {torch.bfloat16}
    told = convert(source, tmp_path / "wide", to="hf", params_dtype="fp32")
    assert "rounded" not in told


def test_one_quantized_tensor_among_others_is_refused_by_name(tmp_path: Path) -> None:
    source = mixed(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name}: weights of dtype torch.float8_e4m3fn are not supported"):
        convert(source, tmp_path / "out", to="hf")


def test_what_training_and_inference_round_is_told_for_their_summary(tmp_path: Path) -> None:
    from modellink_lora.models.build import fill, rounding_notes

    convert(mixed(tmp_path / "hf"), tmp_path / "mg", to="mg", use_mcore_models=True)
    files = open_rank_files(tmp_path / "mg")
    names = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
    parameters = {name: torch.empty_like(files.read(name), dtype=torch.bfloat16) for name in names}
    model: Any = SimpleNamespace(model_config=files.config, named_parameters=parameters.items)
    context: Any = SimpleNamespace(pp_rank=0, tp_rank=0, tp_size=1)
    rounded = fill(model, files, files.family, context, files.partition)
    assert rounded == {names[1]: torch.float32, names[2]: torch.float16}
    assert rounding_notes(rounded, "bf16") == [
        "rounded from float32 to bf16: 1 tensor (decoder.final_layernorm.weight)",
        "rounded from float16 to bf16: 1 tensor (output_layer.weight)",
    ]
    assert torch.equal(parameters[names[1]], files.read(names[1]).bfloat16())
