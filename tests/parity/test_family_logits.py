"""Every family: a model from its own weights and ours give equal logits at TP1, TP2 (with and without SP) and PP2.

The other model is transformers' own class or, where there is none, tests/helpers/reference_models.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.reference_models import KINDS, reference_logits, reference_model
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import hf_to_megatron

TOLERANCE = 1e-5  # of the greatest logit, fp32
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3-scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear-scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "dynamic-scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "gemma": ("gemma", {"tied": True}),
    "gemma2": ("gemma2", {"tied": True, "attn_implementation": "eager"}),
    "glm": ("glm", {}),
    "glm4-0414": ("glm4", {}),
    "bloom": ("bloom", {"tied": True, "std": 0.15}),  # wide enough to tell one GELU from the other
    "mixtral": ("mixtral", {}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-normed": ("qwen3_moe", {"norm_topk_prob": True, "tied": True}),
    "bloom-12-heads": ("bloom", {"num_attention_heads": 12, "hidden_size": 96}),
}
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3)).tolist()


def our_logits(
    roots: dict[str, str], parallel: dict[str, Any], changes: dict[str, dict[str, Any]] | None = None
) -> dict[str, list[torch.Tensor]]:
    """Logits of the base in each of `roots` on this world's layout; `changes` are made to settings after opening.

    Those of the training model and behind them, without sequence parallelism, those of inference on its weights.
    """
    from modellink_lora.config.adapter import LoraConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.inference.logits import forward_logits
    from modellink_lora.parallel.context import make_context
    from modellink_lora.parallel.random import seed_everything
    from modellink_lora.training.base import open_base
    from modellink_lora.training.setup import set_up

    device = get_device("cpu")
    context = make_context(ParallelConfig(**parallel), torch.device("cpu"))
    seed_everything(1, context, device)
    result = {}
    for name, root in roots.items():
        base = open_base(root, {}, tp=context.tp_size, seed=1, use_mcore_models=None)
        if changes:
            base = dataclasses.replace(base, config=dataclasses.replace(base.config, **changes[name]))
        setup = set_up(base, LoraConfig(), None, context, device, dtype="fp32", seed=1, overrides={})
        logits = forward_logits(setup.chunks[0], IDS, context)
        if not parallel.get("sequence_parallel"):
            logits += served_logits(setup, context, device)
        result[name] = logits if context.is_main else []
    return result


def served_logits(setup: Any, context: Any, device: Any) -> list[torch.Tensor]:
    """Logits of both rows of IDS, as a prompt of 24 or 31 tokens, five single tokens and the rest; on the leader."""
    from modellink_lora.inference.executor import Executor
    from modellink_lora.inference.request import PLAIN
    from modellink_lora.inference.rows import Rows
    from modellink_lora.inference.stage import Stage

    layers = [f"decoder.layers.{n}" for n in setup.partition.layers(context.pp_rank, 0)]
    executor = Executor(Stage(setup.chunks[0], layers, context, device), context, say=lambda line: None)
    if not context.is_main:
        executor.follow()
        return []
    rows = Rows(executor, max_length=64, use_cache=True)
    rows.reserve(2, 64)
    pieces: list[list[torch.Tensor]] = [[], []]
    done = [0, 0]
    for step in (24, *[1] * 5, 40):
        ends = [min(40, done[row] + step + (7 * row if not done[row] else 0)) for row in range(2)]
        wanted = [(row, at, None) for row in range(2) for at in range(done[row], ends[row])]
        logits = rows.compute([(row, IDS[row][: ends[row]]) for row in range(2)], PLAIN, wanted)
        for (row, _, _), one in zip(wanted, logits, strict=True):
            pieces[row].append(one)
        done = ends
    executor.dismiss()
    return [torch.stack(row) for row in pieces]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[torch.Tensor]]]:
    """Name -> converted checkpoint and the other model's logits."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("families")
    result = {}
    for name, (family, settings) in MODELS.items():
        hf = tiny_model(family, folder / f"{name}-hf", **settings)
        attention = settings.get("attn_implementation")
        model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0] for row in IDS]
        result[name] = (hf_to_megatron(hf, folder / f"{name}-mg"), logits)
    for name in KINDS:
        hf = reference_model(name, folder / f"{name}-hf")
        logits = [reference_logits(name, hf, row) for row in IDS]
        result[name] = (hf_to_megatron(hf, folder / f"{name}-mg"), logits)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(layout: str, models: dict[str, tuple[Path, list[torch.Tensor]]]) -> None:
    world_size, parallel = LAYOUTS[layout]
    roots = {name: str(root) for name, (root, _) in models.items()}
    found = run(our_logits, world_size=world_size, roots=roots, parallel=parallel)[0]
    for name, (_, expected) in models.items():
        assert len(found[name]) == (2 if parallel.get("sequence_parallel") else 4)
        for f, e in zip(found[name], expected * 2, strict=False):
            error = float((f - e).abs().max() / e.abs().max())
            assert error < TOLERANCE, f"{name} at {layout}: {error:.1e}"


SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gemma", {"add_rmsnorm_offset": False}),
    ("gemma", {"input_embeds_norm": False}),
    ("gemma", {"gelu_tanh": False}),
    ("gemma2", {"post_norm": False}),
    ("gemma2", {"attn_logit_softcapping": 0.0}),
    ("gemma2", {"final_logit_softcapping": 0.0}),
    ("gemma2", {"query_pre_attn_scalar": 0.0}),
    ("glm", {"rotary_percent": 1.0}),
    ("glm", {"rotary_interleaved": False}),
    ("bloom", {"embed_layernorm": False}),
    ("bloom", {"position_embedding_type": "rope"}),
    ("bloom", {"gelu_tanh": False}),
    ("baichuan-13b", {"position_embedding_type": "rope"}),
    ("baichuan2-7b", {"normalize_head": False}),
    ("minicpm", {"scale_emb": 1.0}),
    ("minicpm", {"scale_depth": 0.0}),
    ("minicpm", {"dim_model_base": 0}),
    ("llama-biases", {"add_mlp_bias": False}),
    ("llama-biases", {"add_dense_bias": False}),
    ("mixtral", {"moe_router_pre_softmax": True}),
    ("mixtral", {"moe_router_topk": 3}),
    ("qwen2-moe", {"moe_router_pre_softmax": False}),
    ("qwen2-moe", {"moe_shared_expert_gate": False}),
    ("qwen2-moe", {"moe_shared_expert_gate": False, "moe_shared_expert_intermediate_size": 0}),
    ("qwen3-moe", {"qk_layernorm": False}),
)


def test_each_setting_changes_the_logits(models: dict[str, tuple[Path, list[torch.Tensor]]]) -> None:
    roots = {f"{name} {change}": str(models[name][0]) for name, change in SETTINGS}
    changes = {f"{name} {change}": change for name, change in SETTINGS}
    found = run(our_logits, world_size=1, roots=roots, parallel={}, changes=changes)[0]
    for name, change in SETTINGS:
        expected = models[name][1][0]
        error = float((found[f"{name} {change}"][0] - expected).abs().max() / expected.abs().max())
        assert error > 5 * TOLERANCE, f"{name} would pass with {change}: {error:.1e}"


def test_each_rope_setting_changes_the_logits(models: dict[str, tuple[Path, list[torch.Tensor]]]) -> None:
    plain = models["llama"][1][0]
    for name in ("llama-theta", "llama3-scaling", "linear-scaling"):
        error = float((models[name][1][0] - plain).abs().max() / plain.abs().max())
        assert error > 100 * TOLERANCE, f"{name} would pass with the setting ignored"
