"""Mutated config.json, index and generation_config.json: refused in one line, or the model is still the same one.

The slow part asks transformers: where a mutated folder opens, both must compute the same.

Seen in public as ggml-org/llama.cpp#2793 (`rope_scaling` of null broke the conversion) and ggml-org/llama.cpp#2772 (a
scaling that was not read gave a model that wrote nonsense).
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.checkpoint.hf import INDEX, HfModel
from modellink_lora.config.errors import UserError
from modellink_lora.data.generation_stops import generation_stops
from tests.helpers.made_model import Dimensions, made_model, made_sharded_model

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**12, 10**30, -(10**30), 0.0, 0.5, 1.5, 64.0, 1e308, float("nan"),
    float("inf"), -1e-9, "", "64", "false", "linear", "\0", "../x", "/etc/passwd", "\ud800", "x" * 300, [], [1], ["a"],
    [None], [[[]]], {}, {"a": 1}, {"": None}, {"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": "2"},
)  # fmt: skip
ADDED = ("rope_scaling", "rope_parameters", "head_dim", "sliding_window", "layer_types", "attention_bias", "dtype",
         "quantization_config", "architectures", "partial_rotary_factor", "num_experts", "clip_qkv", "text_config",
         "use_sliding_window", "bos_token_id", "auto_map", "eos_token_id")  # fmt: skip
SIZES = {
    "llama": Dimensions(hidden=16),
    "qwen2": Dimensions(hidden=16, family="qwen2"),
    "mixtral": Dimensions(hidden=16, family="mixtral", experts=4),
}


def mutated(document: dict[str, Any], draw: random.Random) -> str:
    """JSON text of `document` with one to three faults."""
    changed = json.loads(json.dumps(document))
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice([*changed, *ADDED])
        kind = draw.random()
        if kind < 0.15:
            changed.pop(key, None)
        elif kind < 0.25 and isinstance(changed.get(key), dict) and changed[key]:
            changed[key][draw.choice(list(changed[key]))] = draw.choice(HOSTILE)
        else:
            changed[key] = draw.choice(HOSTILE)
    text = json.dumps(changed)
    if draw.random() < 0.1:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(("", "{", "]", '"', "\0", "9" * 5000, "\\ud800", "[" * 20_000)) + text[at + 1 :]
    return text


def opened(folder: Path) -> HfModel | None:
    """The model, or None after a refusal of one line that names the folder."""
    try:
        model = HfModel(folder)
        for name in model.names():
            model.stored(name)
        return model
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip(), repr(str(error))
        return None


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model(tmp_path_factory.mktemp(request.param), SIZES[request.param])


def test_a_mutated_config_json_is_refused_or_opens(model: Path) -> None:
    draw = random.Random(model.name[:5])
    path = model / "config.json"
    original = path.read_text()
    try:
        outcomes = []
        for _ in range(70):
            path.write_text(mutated(json.loads(original), draw), encoding="utf-8", errors="surrogatepass")
            outcomes.append(opened(model) is not None)
    finally:
        path.write_text(original)
    assert 3 < sum(outcomes) < 60, "the mutations are too mild or too wild to show anything"


def test_a_mutated_index_is_refused_or_means_the_same(tmp_path: Path) -> None:
    draw = random.Random(1)
    made_sharded_model(tmp_path, SIZES["llama"], tensors_a_file=9)
    path = tmp_path / INDEX
    document = json.loads(path.read_text())
    keys, files = list(document["weight_map"]), sorted(set(document["weight_map"].values()))
    for _ in range(40):
        changed = json.loads(json.dumps(document))
        for _ in range(draw.choice((1, 2))):
            key = draw.choice(keys)
            kind = draw.random()
            if kind < 0.3:
                changed["weight_map"].pop(key, None)
            elif kind < 0.5:
                changed["weight_map"][key] = draw.choice(files)
            elif kind < 0.9:
                changed["weight_map"][key] = draw.choice(HOSTILE)
            else:
                changed[draw.choice(("weight_map", "metadata"))] = draw.choice(HOSTILE)
                break
        path.write_text(json.dumps(changed))
        model = opened(tmp_path)
        assert model is None or set(model.folder.names()) == set(keys)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_ids_that_end_an_answer_are_read_or_refused(name: str, tmp_path: Path) -> None:
    for value in HOSTILE:
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}), encoding="utf-8", errors="surrogatepass")
        try:
            found = generation_stops(tmp_path)
        except UserError as error:
            assert "eos_token_id" in str(error) or "surrogate" in str(error)
            assert name in str(error)
            continue
        assert found == ([] if value is None else value if isinstance(value, list) else [value])
        assert all(type(token) is int for token in found)


@pytest.mark.slow
def test_where_a_mutated_folder_opens_transformers_computes_the_same(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from modellink_lora.models.rope import inverse_frequencies

    draw = random.Random(model.name[:5] + "slow")
    original = json.loads((model / "config.json").read_text())
    folder = tmp_path / "mutated"
    shutil.copytree(model, folder)
    compared = 0
    for _ in range(800):
        (folder / "config.json").write_text(mutated(original, draw), encoding="utf-8", errors="surrogatepass")
        ours = opened(folder)
        if ours is None:
            continue
        try:
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except Exception:  # transformers is stricter about what neither of us reads
            continue
        frequencies = theirs.model.rotary_emb.inv_freq
        assert torch.allclose(inverse_frequencies(ours.config), frequencies, rtol=1e-5), (
            folder / "config.json"
        ).read_text()
        assert ours.config.norm_epsilon == theirs.model.norm.variance_epsilon
        assert theirs.config.vocab_size == ours.config.vocab_size
        assert theirs.config.num_attention_heads == ours.config.num_attention_heads
        compared += 1
    assert compared > 40
