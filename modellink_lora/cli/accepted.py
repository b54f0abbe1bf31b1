"""Megatron and ModelLink training flags that no config field owns: those taken without effect, those refused.

A flag belongs to ACCEPTED only while leaving it out cannot change what is computed: it chooses a kernel, a schedule of
communication or a place in memory. Everything else that this version does not do is in REFUSED, with the way out.
"""

from __future__ import annotations

from modellink_lora.cli.flags import Accepted, only
from modellink_lora.cli.option import Option, options_of
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig

_FUSED = "this version computes it with PyTorch's own operations, which give the same result"
_AUTOMATIC = "on Ascend fused operators are used wherever they can be; --npu-plain-operators leaves them out"
_SWITCHES = {
    "use-flash-attn": "attention runs through the device's fused kernel wherever it can",
    "attention-softmax-in-fp32": "the attention kernels keep the softmax in fp32 in any case",
    "use-fused-rmsnorm": _AUTOMATIC,
    "use-fused-swiglu": _AUTOMATIC,
    "use-fused-rotary-pos-emb": _AUTOMATIC,
    "no-rope-fusion": _FUSED,
    "no-bias-gelu-fusion": _FUSED,
    "no-bias-swiglu-fusion": _FUSED,
    "no-bias-dropout-fusion": _FUSED,
    "no-masked-softmax-fusion": _FUSED,
    "no-gradient-accumulation-fusion": "gradients are not accumulated inside the matrix kernel here",
    "recompute-lora-inputs": "on by default under --lora-fusion; --no-recompute-lora-inputs turns it off",
    "jit-compile": "a speed switch of Ascend kernels",
    "moe-grouped-gemm": "a kernel for all experts at once; here they are computed one after another",
    "moe-permutation-async-comm": "it moves communication in time, not in value",
    "no-async-tensor-model-parallel-allreduce": "it moves a reduction in time, not in value",
    "swap-attention": "it moves activations to host memory; the --recompute flags save memory",
    "reuse-fp32-param": "it restores the fp32 weights bit by bit from bf16 and a residual; here both are kept",
    "no-load-rng": "dropout follows from the seed and the sample, so there are no random states to load",
    "use-rotary-position-embeddings": (
        "the checkpoint says which positions the model has; without --load give --position-embedding-type rope"
    ),
    "group-query-attention": "--num-query-groups or the checkpoint says how many groups there are",
    "disable-bias-linear": "the checkpoint says which linears have biases; without --load --add-*-bias do",
    "no-shared-storage": "every process prepares the data for itself, nothing is passed over a shared disk",
    "exit-on-missing-checkpoint": "a --load or --lora-load that holds no checkpoint always ends the run",
}
_GRAPHS = "give --cuda-graph-impl local, which records the passes of a whole step"

_WITH_VALUE = {
    "tokenizer-model": Accepted(1, "the tokenizer is read from --tokenizer-name-or-path"),
    "num-workers": Accepted(1, "batches are assembled in the training process; only loading speed differs"),
    "local-rank": Accepted(1, "the launcher also says it in the environment, which is read"),
    "local_rank": Accepted(1, "the launcher also says it in the environment, which is read"),
    "distributed-backend": Accepted(1, "the device decides: nccl on CUDA, hccl on Ascend, gloo on the CPU"),
    "context-parallel-algo": Accepted(1, "it chooses how --context-parallel-size above 1 communicates"),
    "lora-register-forward-hook": Accepted(
        "+", "under recomputation the first input requires a gradient whenever adapters are trained"
    ),
    "tokenizer-padding-side": only("right", "samples are padded on the right, the only side training supports"),
    "context-parallel-size": only(
        1, "context parallelism is not available; use --sequence-parallel and a larger --tensor-model-parallel-size"
    ),
    "expert-model-parallel-size": only(
        1, "training keeps all experts on every process; a checkpoint of any expert parallel size is read"
    ),
    "moe-token-dispatcher-type": Accepted(1, "it chooses how tokens travel, not what is computed"),
    "moe-router-load-balancing-type": Accepted(
        1, "the router is frozen and no balancing loss is added", only=("none", "aux_loss")
    ),
    "moe-aux-loss-coeff": Accepted(1, "the router is frozen: no balancing loss is added", only=("0", "0.0")),
    "ckpt-format": only("torch", "checkpoints are written as mp_rank_XX/model_optim_rng.pt; remove the flag"),
    "cuda-graph-scope": Accepted(1, "with --cuda-graph-impl local the passes of a whole step are recorded"),
    "optimizer": only("adam", "AdamW is the only optimizer; remove the flag"),
}

ACCEPTED: dict[str, Accepted] = {name: Accepted(0, reason) for name, reason in _SWITCHES.items()} | _WITH_VALUE

REFUSED: dict[str, str] = {
    "enable-cuda-graph": _GRAPHS,
    "external-cuda-graph": _GRAPHS,
    "reset-position-ids": (
        "training on packed samples with positions that restart is not available; preprocess without --pack and use "
        "--variable-seq-lengths"
    ),
    "is-pairwise-dataset": "preference training (DPO, reward models) is not available; use an instruction data set",
    "lora-modules-to-save": (
        "training further modules in full beside the adapter is not available; adapt more layers with "
        "--lora-target-modules instead"
    ),
    "tokenizer-kwargs": "set the option in tokenizer_config.json of the folder given to --tokenizer-name-or-path",
    "load-checkpoint-loosely": (
        "a tensor that is missing from a checkpoint, or unknown, always ends the run; convert the checkpoint with "
        "convert_ckpt.py, or correct the model flags"
    ),
}


# What follows is for the jobs that only run a model. Scripts of ModelLink hand them the flags of training too.
_TRAINING = "a setting of training; nothing is trained here"
_RUNNING = {
    "use-kv-cache": Accepted(0, "the key/value cache is on by default; --no-kv-cache turns it off"),
    "inference-batch-times-seqlen-threshold": Accepted(1, "the engine splits its work by itself"),
    "seq-length": Accepted(1, "--max-length, and else the model's positions, limit prompt and answer together"),
    "micro-batch-size": Accepted(1, "--max-batch-size says how many prompts are computed at once"),
    "global-batch-size": Accepted(1, "--max-batch-size says how many prompts are computed at once"),
    "no-load-optim": Accepted(0, "optimizer states are never read here"),
    "no-load-rng": Accepted(0, "random states are never read here; --seed sets those of sampling"),
    "tokenizer-padding-side": Accepted(1, "results do not depend on how a batch is padded"),
    "transformer-impl": Accepted(1, "the weights are multiplied by an engine of its own, whatever trained the adapter"),
    "enable-cuda-graph": Accepted(0, "the engine launches its kernels one by one"),
    "external-cuda-graph": Accepted(0, "the engine launches its kernels one by one"),
    "lora-fusion": Accepted(0, "an adapter is always added before the base's all-reduce here"),
    "reset-position-ids": Accepted(0, "it concerns packed samples of training"),
}
_OWNED_ELSEWHERE = {"save"}  # evaluation's results


def _taken(option: Option) -> Accepted:
    return Accepted(0 if option.kind is bool else "+" if option.many else 1, _TRAINING)


_ENGINE_FLAGS = {spelling for option in options_of(EngineConfig) for spelling in option.spellings}
INFERENCE_ACCEPTED: dict[str, Accepted] = {
    name: row
    for name, row in (
        {spelling: _taken(o) for c in (TrainConfig, SftDataConfig) for o in options_of(c) for spelling in o.spellings}
        | ACCEPTED
        | _RUNNING
    ).items()
    if name not in _ENGINE_FLAGS | _OWNED_ELSEWHERE
}

INFERENCE_REFUSED: dict[str, str] = {name: reason for name, reason in REFUSED.items() if name not in INFERENCE_ACCEPTED}
