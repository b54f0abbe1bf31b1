"""Adapters alone travel between PEFT folders, rank files of any layout and our own format without losing a bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.lora_rank_writer import write_lora_rank_files
from modellink_lora.checkpoint.peft import write_peft
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.convert.adapters import export_adapter
from tests.helpers.random_adapters import layouts, models, own_adapters, peft_adapters, write_own, write_peft_folder

FORMATS = ("adapter", "adapter-ranks", "peft")
# the same examples every time; a failing one is not made smaller, which would write thousands of files
few = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def send(adapter: Adapter, to: str, folder: Path, config: ModelConfig, layout: Any) -> Adapter:
    """Write in a format and open the result."""
    if to == "adapter-ranks":
        tp, partition, spelling = layout
        write_lora_rank_files(folder, adapter, tp=tp, partition=partition, spelling=spelling)
    else:
        convert = ConvertConfig(
            lora_load=str(adapter.folder), save_dir=str(folder), load_model_type="mg", save_model_type=to
        )
        export_adapter(convert, adapter, lambda text: None)
    return open_adapter(folder, base=lambda: config)


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        for read in (Adapter.read, Adapter.stored):
            one, other = read(found, name), read(expected, name)
            assert one.dtype == other.dtype and torch.equal(one, other), name


def meaning(meta: AdapterMeta, module: str) -> tuple[int, float]:
    return meta.lora.rank_of(module), meta.lora.scaling_of(module)


@few
@given(data=st.data())
def test_our_adapters_come_back_from_every_format(data: st.DataObject) -> None:
    config = data.draw(models())
    lora, tensors = data.draw(own_adapters(config))
    with tempfile.TemporaryDirectory() as place:
        own = write_own(Path(place) / "0", config, lora, tensors)
        adapter = own
        for step, to in enumerate(data.draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3))):
            adapter = send(adapter, to, Path(place) / f"{step + 1}", config, data.draw(layouts(config.num_layers)))
            assert_same(adapter, own)
            for module in own.modules:
                (r, scaling), (own_r, own_scaling) = (meaning(x.meta, module) for x in (adapter, own))
                assert r == own_r and scaling == pytest.approx(own_scaling, rel=1e-12)
            if to == "peft":
                break  # prompt type, iteration and base are not known there
            assert adapter.meta == own.meta


@few
@given(data=st.data())
def test_adapters_of_peft_come_back_from_every_format_tensor_for_tensor(data: st.DataObject) -> None:
    config = data.draw(models())
    document, tensors = data.draw(peft_adapters(config))
    with tempfile.TemporaryDirectory() as place:
        first = open_adapter(write_peft_folder(Path(place) / "0", document, tensors), base=lambda: config)
        adapter = first
        for step, to in enumerate(data.draw(st.lists(st.sampled_from(FORMATS), max_size=3))):
            adapter = send(adapter, to, Path(place) / f"{step + 1}", config, data.draw(layouts(config.num_layers)))
            assert_same(adapter, first)
        write_peft(Path(place) / "last", adapter, base_model=None)
        found = load_file(Path(place) / "last/adapter_model.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        again = json.loads((Path(place) / "last/adapter_config.json").read_text())
        if adapter.meta.peft:
            assert again == document
        for name in ("r", "lora_alpha"):
            of = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]
            for module in {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in tensors}:
                assert again[of].get(module, again[name]) == document[of].get(module, document[name])


@few
@given(data=st.data())
def test_the_fused_factors_add_what_peft_adds(data: st.DataObject) -> None:
    config = data.draw(models())
    document, tensors = data.draw(peft_adapters(config))
    with tempfile.TemporaryDirectory() as place:
        adapter = open_adapter(write_peft_folder(Path(place) / "0", document, tensors), base=lambda: config)
        for module in adapter.modules:
            a, b = (adapter.read(f"{module}.{factor}").double() for factor in ("lora_A", "lora_B"))
            update = adapter.layout(module).split(b @ a * adapter.meta.lora.scaling_of(module))
            spec_names = [n.removesuffix(".weight") for n in _hf_names(config, module)]
            for name, found in zip(spec_names, update, strict=True):
                expected = _update(document, tensors, name)
                assert torch.allclose(found, torch.zeros(1).double() if expected is None else expected, atol=1e-5)


def _hf_names(config: ModelConfig, module: str) -> tuple[str, ...]:
    from modellink_lora.models.families import family_of

    return family_of(config.hf_model_type).tensor(f"{module}.weight", config).hf


def _update(document: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """What the PEFT library adds to a weight: its own formula, from its own files."""
    try:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    except KeyError:
        return None
    r = document["rank_pattern"].get(name, document["r"])
    alpha = document["alpha_pattern"].get(name, document["lora_alpha"])
    return b @ a * alpha / (r**0.5 if document["use_rslora"] else r)
