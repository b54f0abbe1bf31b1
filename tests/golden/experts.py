"""Writes mixtures of experts key by key as Megatron does, in folders `mp_rank_TT[_PPP][_EEE]`.

A second implementation of the format, on purpose: it imports nothing of the program under test, only torch. It takes
full tensors in the names and shapes of one process, deals the experts out, and cuts everything else for each tensor
rank into every expert folder. Letters: E experts, h hidden, f width of an expert.

    python tests/golden/experts.py --full full.pt --heads 4 --groups 2 --topk 2 --tp 2 --pp 2 --ep 2 --out DIR

`full.pt` is a dictionary: `decoder.layers.0.mlp.router.weight` [E, h], `decoder.layers.0.mlp.experts.w1` [E, 2f, h]
with gate above up, `decoder.layers.0.mlp.experts.w2` [E, h, f], `decoder.layers.0.mlp.shared_expert_gate.weight` [1, h]
and so on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROW = ("self_attention.linear_proj", "mlp.shared_experts.linear_fc2")
COLUMN = ("self_attention.linear_qkv", "embedding.word_embeddings", "output_layer")
STYLES = ("one by one", "grouped", "numbered")  # how the experts of a file are kept


def write(
    root: Path, full: dict[str, Tensor], *, heads: int, groups: int, topk: int, tp: int = 1, pp: int = 1, ep: int = 1,
    style: str = "one by one", gate_as_parameter: bool = False,
) -> Path:  # fmt: skip
    """Write the checkpoint and its tracker below `root`; returns `root`.

    Args:
        gate_as_parameter: name the shared expert's gate as megatron-core's module does, not as ModelLink.
    """
    layers = 1 + max(int(name.split(".")[2]) for name in full if name.startswith("decoder.layers."))
    experts = full["decoder.layers.0.mlp.router.weight"].shape[0]
    each, per_stage = experts // ep, layers // pp
    for t in range(tp):
        for p in range(pp):
            for e in range(ep):
                model: dict[str, Tensor | None] = {}
                for name, tensor in full.items():
                    if name.startswith("decoder.layers."):
                        _, _, number, rest = name.split(".", 3)
                        if int(number) // per_stage != p:
                            continue
                        local = f"decoder.layers.{int(number) % per_stage}."
                        if rest.startswith("mlp.experts."):
                            mine = [shard(x, rest, t, tp) for x in tensor[e * each : (e + 1) * each]]
                            model |= kept(f"{local}mlp.experts.", mine, rest[-1], style)
                            continue
                        if gate_as_parameter and rest == "mlp.shared_expert_gate.weight":
                            rest = "mlp.shared_experts.gate_weight"
                        model[local + rest] = shard(tensor, rest, t, tp)
                        if "linear" in rest and rest.endswith(".weight"):
                            model[local + rest.replace(".weight", "._extra_state")] = None
                    elif p == (0 if name.startswith("embedding.") else pp - 1):
                        model[name] = shard(tensor, name, t, tp)
                folder = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
                path = root / "iter_0000300" / folder / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                args = arguments(full, layers, heads, groups, topk, tp, pp, ep)
                torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 300, "model": model}, path)
    (root / "latest_checkpointed_iteration.txt").write_text("300")
    return root


def shard(tensor: Tensor, name: str, t: int, tp: int) -> Tensor:
    """Rank t's share, as a tensor of its own."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    if module in ("mlp.experts.w1", "mlp.shared_experts.linear_fc1"):
        gate, up = tensor.chunk(2)
        part = torch.cat([gate.chunk(tp)[t], up.chunk(tp)[t]])
    elif module in (*ROW, "mlp.experts.w2"):
        part = tensor.chunk(tp, dim=1)[t]
    else:
        part = tensor.chunk(tp)[t] if module in COLUMN else tensor
    return part.clone(memory_format=torch.contiguous_format)


def kept(prefix: str, mine: list[Tensor], which: str, style: str) -> dict[str, Tensor | None]:
    """The experts of one file, of which `mine` are the shards of fc1 (`which` "1") or fc2 ("2")."""
    if style == "grouped":  # for grouped matrix products: [E, in, out] in memory, seen as [h, E 2f] and [E f, h]
        blocks = torch.stack([x.t() for x in mine]).contiguous()
        hidden = mine[0].shape[1] if which == "1" else mine[0].shape[0]
        return {f"{prefix}weight{which}": blocks.view(hidden, -1) if which == "1" else blocks.view(-1, hidden)}
    found: dict[str, Tensor | None] = {}
    for number, tensor in enumerate(mine):
        if style == "numbered":
            found[f"{prefix}linear_fc{which}.weight{number}"] = tensor
        else:
            found[f"{prefix}local_experts.{number}.linear_fc{which}.weight"] = tensor
            found[f"{prefix}local_experts.{number}.linear_fc{which}._extra_state"] = None
    return found


def arguments(
    full: dict[str, Tensor], layers: int, heads: int, groups: int, topk: int, tp: int, pp: int, ep: int
) -> argparse.Namespace:
    """The training arguments that matter to a reader, with the values that Megatron's parser gives them."""
    embedding, layer = full["embedding.word_embeddings.weight"], "decoder.layers.0."
    return argparse.Namespace(
        num_layers=layers, hidden_size=embedding.shape[1], num_attention_heads=heads, num_query_groups=groups,
        group_query_attention=groups != heads, ffn_hidden_size=full[layer + "mlp.experts.w2"].shape[2],
        kv_channels=full[layer + "self_attention.linear_proj.weight"].shape[1] // heads, max_position_embeddings=128,
        vocab_size=None, padded_vocab_size=embedding.shape[0], make_vocab_size_divisible_by=1, normalization="RMSNorm",
        norm_epsilon=1e-6, swiglu=True, position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0,
        untie_embeddings_and_output_weights="output_layer.weight" in full, add_bias_linear=False,
        add_qkv_bias=layer + "self_attention.linear_qkv.bias" in full, use_mcore_models=True,
        params_dtype=torch.float32,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep,
        num_experts=full[layer + "mlp.router.weight"].shape[0], moe_router_topk=topk,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_grouped_gemm=False, model_type=None,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("full", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    for flag in ("heads", "groups", "topk"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    for flag in ("tp", "pp", "ep"):
        parser.add_argument(f"--{flag}", type=int, default=1)
    parser.add_argument("--style", choices=STYLES, default=STYLES[0])
    given = vars(parser.parse_args(argv))
    print(write(given.pop("out"), torch.load(given.pop("full"), weights_only=True), **given))


if __name__ == "__main__":
    main()
