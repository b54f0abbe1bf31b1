"""The same fine-tuning by transformers + PEFT in one process: what every layout of ours is compared with.

In the reference, the projections that our fused layers join (q, k, v and gate, up) hold the same `Parameter` as
lora_A, because a fused layer has one A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FUSED = {
    "self_attention.linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention.linear_proj": ("self_attn", ("o_proj",)),
    "mlp.linear_fc1": ("mlp", ("gate_proj", "up_proj")),
    "mlp.linear_fc2": ("mlp", ("down_proj",)),
}


class SampleFirst(torch.nn.Module):
    """Our dropout on tensors [b, s, f], as transformers lays them out."""

    def __init__(self, p: float, site: int) -> None:
        from modellink_lora.models.dropout import Dropout

        super().__init__()
        self.dropout = Dropout(p, rank=0, cut=None)
        self.dropout.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x.transpose(0, 1)).transpose(0, 1)


def train(
    hf: Path, batches: list[list[dict[str, torch.Tensor]]], *, r: int, alpha: float, lr: float, seed: int,
    shared_a: bool = True, dropout: float = 0.0,
) -> tuple[list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Losses of each step and the final adapter in our names and layouts.

    Args:
        batches: micro-batches of each step, as `data.batches.collate` makes them.
        dropout: on the adapters' inputs, with our masks in place of PEFT's own.
        shared_a: False gives every projection an A of its own: a different model, for the test of the test.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from modellink_lora.models.families import family_of
    from modellink_lora.parallel.random import kaiming_uniform, set_samples, site_key

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa")
    names = [p for _, projections in FUSED.values() for p in projections]
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=names, lora_dropout=0.0))
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        for ours, (block, projections) in FUSED.items():
            modules = [getattr(getattr(layer, block), p) for p in projections]
            name = f"decoder.layers.{index}.{ours}.lora_A"
            first = modules[0].lora_A["default"].weight
            mask = SampleFirst(dropout, site_key(seed, f"decoder.layers.{index}.{ours}.dropout"))
            for which, module in enumerate(modules):
                a = module.lora_A["default"]
                if shared_a and which:
                    a.weight = first
                module.lora_dropout["default"] = mask
                with torch.no_grad():
                    own = name if shared_a else f"{name}.{which}"
                    a.weight.copy_(kaiming_uniform(own, tuple(a.weight.shape), seed=seed))
    trained = [p for p in model.parameters() if p.requires_grad]  # parameters() names a shared one once
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    model.train()
    losses = []
    for step in batches:
        optimizer.zero_grad()
        total = 0.0
        for batch in step:
            set_samples(batch["samples"])
            logits = model(input_ids=batch["tokens"]).logits
            token = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none"
            )
            mask = batch["loss_mask"].flatten()
            loss = (token * mask).sum() / mask.sum() / len(step)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(total)
    config = model.config.to_dict()
    family = family_of(config["model_type"])
    ours_config = family.read_config(config)
    tensors: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        for ours, (block, projections) in FUSED.items():
            modules = [getattr(getattr(layer, block), p) for p in projections]
            name = f"decoder.layers.{index}.{ours}"
            layout = family.tensor(f"{name}.weight", ours_config).layout
            tensors[f"{name}.lora_A"] = modules[0].lora_A["default"].weight.detach()
            tensors[f"{name}.lora_B"] = layout.fuse([m.lora_B["default"].weight.detach() for m in modules])
    return losses, tensors
