"""A PEFT adapter of chosen rank: each projection's update cut to its largest singular values.

The nearest matrix of rank n in the Frobenius norm (Eckart and Young 1936). Letters: R rank of the factors, n of the
result; B is [out, R], A [R, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.peft import settings_of, whole_tensors, write_peft_files
from modellink_lora.config.errors import UserError


def write_truncated(folder: Path, adapter: Adapter, n: int, *, base_model: str | None) -> dict[str, float]:
    """Write `adapter` at rank `n` into `folder`; the relative error of each projection's update."""
    tensors: dict[str, Tensor] = {}
    errors = {}
    for projection, a, b, scaling in _updates(adapter):
        if n > min(a.shape[1], b.shape[0]):
            raise UserError(f"--svd-rank {n}: {projection} is {b.shape[0]} x {a.shape[1]}, which has no such rank")
        low_b, low_a, errors[projection] = truncated(b.double() * scaling, a.double(), n)
        tensors[f"base_model.model.{projection}.lora_A.weight"] = low_a.float()
        tensors[f"base_model.model.{projection}.lora_B.weight"] = low_b.float()
    settings = settings_of(
        dict.fromkeys(errors, n), dict.fromkeys(errors, float(n)), r=n, alpha=float(n),
        num_layers=adapter.meta.model.num_layers, base_model=base_model,
    )  # fmt: skip
    if adapter.meta.peft:
        settings["modules_to_save"] = adapter.meta.peft.settings.get("modules_to_save")
        tensors |= whole_tensors(adapter)
    write_peft_files(folder, tensors, settings)
    return errors


def truncated(b: Tensor, a: Tensor, n: int) -> tuple[Tensor, Tensor, float]:
    """B [out, n], A [n, in] nearest to `b` `a`, and by how much of its Frobenius norm they miss it.

    The product is never made: with b = Q S and a^T = P T it has the singular values of S T^T, [R, R]. They are shared
    evenly between the two factors.
    """
    q, s = torch.linalg.qr(b)
    p, t = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(s @ t.T)  # [R, R] or smaller
    kept = values[:n].sqrt()
    low_b, low_a = q @ u[:, : len(kept)] * kept, kept[:, None] * v[: len(kept)] @ p.T
    missing = n - len(kept)  # asked for more than the update has
    low_b = torch.cat([low_b, low_b.new_zeros(low_b.shape[0], missing)], dim=1)
    low_a = torch.cat([low_a, low_a.new_zeros(missing, low_a.shape[1])])
    whole = values.square().sum().sqrt().item()
    return low_b, low_a, values[n:].square().sum().sqrt().item() / whole if whole else 0.0


def _updates(adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(Hugging Face module, A [R, in], B [out, R], scaling) of each projection that is adapted."""
    origin = adapter.meta.peft
    for module in adapter.modules:
        names = adapter.projections(module)
        a, b = adapter.read(f"{module}.lora_A"), adapter.read(f"{module}.lora_B")
        adapted = origin.blocks[module] if origin else [True] * len(names)
        for name, part, is_adapted in zip(names, adapter.layout(module).split(b), adapted, strict=True):
            if is_adapted:
                yield name, a, part, adapter.meta.lora.scaling_of(module)
