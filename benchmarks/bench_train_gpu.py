"""LoRA training steps of a model of Llama-2-7B's dimensions on one GPU, beside PEFT on the same machine.

    python -m benchmarks.bench_train_gpu

bf16, r 16 on all linears, random weights made on the device, full samples, AdamW, no recomputation. A step is forward,
backward and update. The peers follow one another, each built, warmed up, timed and freed, and all of them again in
`--passes`; a peer's time is the median of all its steps. Writes benchmarks/results/train-gpu.json: seconds, tokens/s,
share of the peak (MFU), peak memory, and ratios to PEFT. `--device cpu` runs the same code on a tiny model, to check
it: its times mean nothing and are not written.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import facts, quiet, version_of, write
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.config.train import TrainConfig

RANK, ALPHA, LR = 16, 32.0, 1e-4
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
OURS = {  # peer: flags of ours
    "local": {},
    "local, --lora-fusion": {"lora_fusion": True},
    "local, --cuda-graph-impl local": {"cuda_graph_impl": "local", "cuda_graph_warmup_steps": 1},
    "transformer_engine": {"transformer_impl": "transformer_engine"},
}
PEFT = {"PEFT": True, "PEFT, 16-bit adapters": False}  # peer: its adapters in fp32, as it makes them by default
TINY = dict(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128,
            vocab_size=256, max_position_embeddings=128)  # fmt: skip


@dataclass(frozen=True)
class DeviceWeights:
    """Random weights made where they are needed; the same bits on no two machines."""

    config: ModelConfig
    device: torch.device

    def read(self, name: str) -> Tensor:
        from modellink_lora.models.shapes import full_shape

        shape = full_shape(name, self.config)
        make = torch.ones if "norm" in name else torch.randn
        return make(shape, device=self.device, dtype=torch.bfloat16) * (1.0 if "norm" in name else 0.02)

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        return self.read(name)


def llama(options: argparse.Namespace) -> ModelConfig:
    from modellink_lora.models.presets import preset

    if options.device == "cuda":
        return preset("llama-2-7b")
    return ModelConfig(
        **TINY, swiglu=True, normalization="RMSNorm", position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A model and what trains it."""

    model: torch.nn.Module
    trained: int  # parameters
    step: Callable[[], float]  # gives the loss

    def free(self) -> None:
        """megatron-core's hooks hold its model in a cycle that Python's collector does not see."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)


def ours(flags: dict[str, Any], model: ModelConfig, tokens: Tensor, device: Any, here: torch.device) -> Peer:
    """A training step of this project, from the parts that `posttrain_gpt.py` is made of."""
    from modellink_lora.adapters.fused import Fusion
    from modellink_lora.adapters.targets import adapted_linears
    from modellink_lora.models.build import DTYPES
    from modellink_lora.models.families import family_of
    from modellink_lora.parallel.context import make_context
    from modellink_lora.parallel.random import seed_everything
    from modellink_lora.reporting.telemetry import Telemetry
    from modellink_lora.training.base import Base
    from modellink_lora.training.graphs import passes_of
    from modellink_lora.training.optimizer import make_optimizer, wrap_data_parallel
    from modellink_lora.training.setup import set_up
    from modellink_lora.training.step import train_step

    train = TrainConfig(train_iters=1, lr=LR, bf16=True, micro_batch_size=len(tokens), **flags)
    context = make_context(ParallelConfig(), here)
    seed_everything(train.seed, context, device)
    base = Base(model, family_of("llama"), DeviceWeights(model, here), None)
    lora = LoraConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS)
    setup = set_up(
        base, lora, None, context, device, dtype=train.dtype, seed=train.seed,
        overrides={"calculate_per_token_loss": True}, fusion=Fusion(device) if train.lora_fusion else None,
        transformer_impl=train.transformer_impl,
    )  # fmt: skip
    chunks = wrap_data_parallel(train, setup.chunks, device)
    optimizer = make_optimizer(train, chunks)
    for chunk in chunks:
        chunk.train()
    telemetry = Telemetry(
        device, context, model_config=setup.chunks[0].config, dtype=DTYPES[train.dtype],
        flops=lambda lengths: 0.0, log_interval=1000,
    )  # fmt: skip
    batch = {
        "tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones_like(tokens, dtype=torch.float32),
        "position_ids": torch.arange(tokens.shape[1], device=here).expand_as(tokens).contiguous(),
        "samples": torch.arange(len(tokens), device=here),
    }  # fmt: skip

    passes = passes_of(train, device, print)

    def step() -> float:
        done = train_step(
            chunks, optimizer, [batch], context, device, loss_reduction="micro-batch", telemetry=telemetry,
            inspect=lambda totals: None, stop=lambda: None, passes=passes,
        )  # fmt: skip
        return done.totals.loss

    trained = sum(x.parameters for x in adapted_linears(base.family, model, lora))
    return Peer(torch.nn.ModuleList(chunks), trained, step)


def peft(wide_adapters: bool, model: ModelConfig, tokens: Tensor, device: Any, here: torch.device) -> Peer:
    """A step of transformers' Llama with PEFT's adapters, written as its users write it."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads, num_key_value_heads=model.num_query_groups,
        vocab_size=model.vocab_size, max_position_embeddings=model.max_position_embeddings,
        attn_implementation="sdpa", use_cache=False, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with here:
            network = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM")
    wrapped = get_peft_model(network, settings, autocast_adapter_dtype=wide_adapters).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01, fused=here.type == "cuda")

    def step() -> float:
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(loss)

    return Peer(wrapped, sum(p.numel() for p in trained), step)


def timed(step: Callable[[], float], device: Any, *, warm_up: int, steps: int) -> tuple[list[float], int, list[float]]:
    """Seconds of each step, peak bytes while they ran, and the losses of all steps."""
    losses = [step() for _ in range(warm_up)]
    device.synchronize()
    device.reset_peak_memory()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(step())
        device.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, device.memory().get("max allocated", 0), losses


def measure(options: argparse.Namespace, device: Any, here: torch.device) -> dict[str, Any]:
    """What each peer needed, or why it did not run."""
    from modellink_lora.config.errors import UserError
    from modellink_lora.planning.flops import lora_step_flops

    model = llama(options)
    batch, length = options.micro_batch_size, options.seq_length
    tokens = torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(here)
    builders: dict[str, Callable[[], Peer]] = {
        **{name: lambda f=flags: ours(f, model, tokens, device, here) for name, flags in OURS.items()},
        **{name: lambda w=wide: peft(w, model, tokens, device, here) for name, wide in PEFT.items()},
    }
    found: dict[str, Any] = {name: {"seconds": [], "peak": 0} for name in builders}
    for number in range(options.passes):
        for name, build in builders.items():
            if "absent" in found[name]:
                continue
            peer = None
            try:
                peer = build()
                seconds, peak, losses = timed(peer.step, device, warm_up=options.warm_up, steps=options.steps)
            except (UserError, ImportError, torch.OutOfMemoryError) as error:
                found[name] = {"absent": " ".join(str(error).split())}
                print(f"left out, {name}: {found[name]['absent']}", flush=True)
            else:
                row = found[name]
                row["seconds"] += seconds
                row["peak"], row["trained"], row["losses"] = max(row["peak"], peak), peer.trained, losses
                print(f"pass {number + 1}, {name}: {statistics.median(seconds):.4f} s a step", flush=True)
            if peer:
                peer.free()
            del peer
            gc.collect()
            torch.cuda.empty_cache()
    peak_flops = device.peak_flops(torch.bfloat16)
    for row in found.values():
        if "absent" in row:
            continue
        median = statistics.median(row["seconds"])
        flops = lora_step_flops(model, row["trained"], [length] * batch)
        row |= {"median": median, "tokens_per_second": tokens.numel() / median, "peak_gib": row.pop("peak") / 2**30,
                "mfu": flops / median / peak_flops if peak_flops else None}  # fmt: skip
    for row in found.values():
        if "median" in row and "median" in found["PEFT"]:
            row["speed_to_peft"] = found["PEFT"]["median"] / row["median"]
    return {"model": {"name": "Llama-2-7B" if options.device == "cuda" else "tiny",
                      "parameters": model.parameter_count()},
            "micro_batch_size": batch, "seq_length": length, "r": RANK, "peers": found}  # fmt: skip


def report(result: dict[str, Any]) -> None:
    for name, row in result["peers"].items():
        if "median" in row:
            mfu = f", MFU {100 * row['mfu']:.1f} %" if row["mfu"] else ""
            print(f"{name}: {row['tokens_per_second']:,.0f} tokens/s{mfu}, peak {row['peak_gib']:.1f} GiB, "
                  f"{row.get('speed_to_peft', float('nan')):.2f} x PEFT", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, help="default 4096; on a CPU 16")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first that counts")
    parser.add_argument("--steps", type=int, default=10, help="steps that count, in each pass")
    parser.add_argument("--passes", type=int, default=2)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch sees none here; nothing was measured (--device cpu only checks the code)")
        return
    options.seq_length = options.seq_length or (4096 if options.device == "cuda" else 16)
    from modellink_lora.device import get_device
    from modellink_lora.parallel.context import start_processes

    quiet()
    begun = facts()
    device = get_device(options.device)
    here = device.activate(0)
    with tempfile.NamedTemporaryFile() as meeting:
        start_processes(
            device.backend, rank=0, world_size=1, init_method=f"file://{meeting.name}-meeting", timeout_minutes=10
        )
        result = measure(options, device, here)
        dist.destroy_process_group()
    report(result)
    if options.device == "cuda":
        begun["versions"] |= {"transformer-engine": version_of("transformer-engine"), "apex": version_of("apex")}
        write("train-gpu", {**result, "device": device.describe()}, begun)
    else:
        print("the code ran; times on a CPU mean nothing here and are not written")


if __name__ == "__main__":
    main()
