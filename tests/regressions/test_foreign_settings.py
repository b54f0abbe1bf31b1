"""Settings in rank files, run_config.yaml and params.json of another type or size: one line. Found by fuzzing.

Seen in public as huggingface/transformers#25818: a params.json that held a web page ended in a traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.megatron_dist import run_settings
from modellink_lora.checkpoint.meta_reader import open_meta
from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert
from tests.helpers.made_model import Dimensions, made_model

VALUES: tuple[Any, ...] = (
    "64", 64.5, True, [64], {}, -1, 0, 10**12, 10**30, float("nan"), float("inf"), "", object,
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    convert(made_model(root / "hf", Dimensions(hidden=16, vocab=24)), root / "mg", to="mg", use_mcore_models=True)
    return root / "mg"


@pytest.mark.parametrize("name", [
    "num_attention_heads", "padded_vocab_size", "vocab_size", "position_embedding_type", "normalization",
    "rotary_base", "norm_epsilon", "num_experts", "rope_scaling_type", "hf_model_type",
])  # fmt: skip
def test_args_of_another_type_are_one_line(name: str, ranks: Path, tmp_path: Path) -> None:
    (path,) = ranks.glob("iter_*/mp_rank_00/*.pt")
    document = torch.load(path, weights_only=False)
    root = tmp_path / "mg"
    target = root / path.relative_to(ranks)
    target.parent.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    for value in VALUES:
        setattr(document["args"], name, value if value is not object else None)
        torch.save(document, target)
        try:
            files = open_rank_files(root)
        except UserError as error:
            assert "\n" not in str(error) and str(root) in str(error), (value, str(error))
        else:  # null is absent, and a number may be another one
            found = getattr(files.config, name)
            assert value is object or type(value) is type(found) or (type(found), type(value)) == (float, int), value


# each line holds the one before three times: 3^30 entries in 30 lines
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 3)}]}}" for n in range(1, 31)]
)


@pytest.mark.parametrize("text", ["- 1", "a: [", "\x00", "3", "a: !!python/object:os.system {}", "'" * 9, MERGES])
def test_a_run_config_that_is_damaged_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run_config.yaml: (not valid YAML|expected a mapping)") as error:
        run_settings(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["dim", "n_heads", "norm_eps", "rope_theta", "n_layers"])
@pytest.mark.parametrize("value", ["64", [64], {}, -1, 10**30, 64.5, None, "nan"], ids=repr)
def test_params_json_of_another_type_is_one_line(key: str, value: Any, ranks: Path, tmp_path: Path) -> None:
    model = open_rank_files(ranks)
    convert(ranks, tmp_path / "meta", to="meta")
    path = tmp_path / "meta/params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=key) as error:
        open_meta(tmp_path / "meta", model.config, flag="--load")
    assert "params.json" in str(error.value) and "\n" not in str(error.value)
