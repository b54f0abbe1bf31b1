"""Everything a fine-tuning run is told besides model, layout and adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import LARGEST_SEED, MINUTES_OF_A_YEAR, check_ranges, flag
from modellink_lora.config.npu import plain_operators_flag
from modellink_lora.config.tokenizer import trust_remote_code_flag

DECAY_STYLES = ("linear", "cosine", "constant", "inverse-square-root")


@dataclass(frozen=True)
class SftDataConfig:
    """Instruction data"""

    data_path: tuple[str, ...] = flag((), "prefix given to preprocess_data.py --output-prefix")
    split: str = flag("969, 30, 1", "proportions of training, validation and test samples")
    seq_length: int = flag(0, "longest sample in tokens; longer ones are cut on the right", at_least=2)
    tokenizer_type: str = flag("PretrainedFromHF", "kind of tokenizer", choices=("PretrainedFromHF",))
    tokenizer_name_or_path: str | None = flag(
        None, "folder of the Hugging Face tokenizer; default the one kept with --load"
    )
    use_fast_tokenizer: bool = flag(True, "take the slow tokenizer", name="tokenizer-not-use-fast", inverted=True)
    trust_remote_code: bool = trust_remote_code_flag()
    is_instruction_dataset: bool = flag(False, "the data are instruction sets; implied")
    variable_seq_lengths: bool = flag(False, "pad to the longest sample of a micro-batch instead of --seq-length")
    pad_to_multiple_of: int = flag(
        8, "with --variable-seq-lengths: round padded lengths up to this multiple", at_least=1
    )
    data_check: bool = flag(
        True, "do not compare the data with their checksums, and ids and labels with each other, before training",
        name="no-data-check", inverted=True,
    )  # fmt: skip
    shuffle: bool = flag(True, "keep the order of the file", name="no-shuffle", inverted=True)
    full_shuffle_instruction_dataset: bool = flag(False, "shuffle across epochs instead of within each")
    prompt_type: str | None = flag(None, "template the data were made with; compared with the data's own record")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.data_path:
            raise UserError("--data-path is missing: give the prefix that preprocess_data.py wrote, e.g. ./data/alpaca")
        if len(self.data_path) > 1:
            raise UserError(f"--data-path takes one prefix, {len(self.data_path)} were given; blending is not offered")

    def pad_multiple(self, cut: int) -> int:
        """Padded lengths are multiples of this: the flag's, and what `cut` ranks of sequence parallelism need."""
        return math.lcm(self.pad_to_multiple_of if self.variable_seq_lengths else 1, cut)

    def padded_length(self, cut: int) -> int:
        """Length of the longest samples once they are padded for `cut` ranks of sequence parallelism."""
        return -(-self.seq_length // self.pad_multiple(cut)) * self.pad_multiple(cut)


@dataclass(frozen=True)
class TrainConfig:
    """Training"""

    stage: str = flag("sft", "what is trained", choices=("sft", "dpo", "rm"))
    load: str | None = flag(None, "base checkpoint; absent means random weights")
    lora_load: str | None = flag(None, "adapter to resume, or with --finetune to start from")
    save: str | None = flag(None, "folder for adapter checkpoints, metrics.jsonl and loss.png")
    save_interval: int = flag(
        0, "iterations between saves; 0 saves at the end, and when asked to stop, only", at_least=0
    )
    save_total_limit: int = flag(0, "keep this many of the newest checkpoints, and the best; 0 keeps all", at_least=0)
    save_best: bool = flag(False, "save after every validation that is the best so far")
    async_save: bool = flag(False, "write checkpoints in the background while training goes on")
    finetune: bool = flag(False, "start at iteration 0 with fresh optimizer and schedule")
    no_load_optim: bool = flag(False, "resume with fresh moments, step count and loss scale of the optimizer")
    use_mcore_models: bool | None = flag(None, "the base is in mcore spelling; detected when absent")

    micro_batch_size: int = flag(1, "samples a process handles at once", at_least=1)
    global_batch_size: int = flag(
        0, "samples of one step over all processes; default micro batch x data parallel size", at_least=0
    )
    train_iters: int = flag(0, "steps to train", at_least=1)
    exit_interval: int = flag(0, "save and stop after an iteration that this divides; 0 for never", at_least=0)
    loss_reduction: str = flag(
        "micro-batch",
        "mean of micro-batch means, or weighted by trained tokens",
        choices=("micro-batch", "token"),
    )
    lr: float = flag(0.0, "highest learning rate", above=0)
    min_lr: float = flag(0.0, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: str = flag("linear", "shape of the decay", choices=DECAY_STYLES)
    lr_decay_iters: int | None = flag(None, "steps of the decay; default --train-iters", at_least=1)
    lr_warmup_fraction: float | None = flag(None, "part of the decay steps that warm up", at_least=0, below=1)
    lr_warmup_iters: int = flag(0, "steps that warm up", at_least=0)
    lr_warmup_init: float = flag(0.0, "learning rate at the first step of the warm-up", at_least=0)
    weight_decay: float = flag(0.01, "decoupled weight decay of both LoRA factors", at_least=0)
    clip_grad: float = flag(1.0, "largest gradient norm; 0 turns clipping off", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW beta1", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW beta2", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "AdamW epsilon", above=0)
    bf16: bool = flag(False, "weights and activations in bf16; gradients and masters in fp32")
    fp16: bool = flag(False, "weights and activations in fp16 with dynamic loss scale")
    loss_scale: float | None = flag(None, "constant loss scale of fp16", above=0)
    initial_loss_scale: float = flag(
        2.0**16, "first dynamic loss scale of fp16; a resumed run goes on with its own", above=0
    )
    min_loss_scale: float = flag(1.0, "smallest dynamic loss scale of fp16", above=0)
    loss_scale_window: int = flag(1000, "good steps after which the dynamic loss scale doubles", at_least=1)
    check_nan: bool = flag(
        True, "go on after a loss that is not finite", name="no-check-for-nan-in-loss-and-grad", inverted=True
    )
    use_distributed_optimizer: bool = flag(False, "share optimizer state out over data-parallel replicas")
    overlap_grad_reduce: bool = flag(False, "reduce gradients over replicas while backward still runs")
    overlap_param_gather: bool = flag(
        False, "gather updated parameters while forward already runs; needs the two flags above"
    )
    recompute_granularity: str | None = flag(None, "recompute activations in backward", choices=("full", "selective"))
    recompute_method: str | None = flag(None, "which layers a full recompute takes", choices=("uniform", "block"))
    recompute_num_layers: int | None = flag(
        None, "layers per checkpoint (uniform) or checkpointed layers (block)", at_least=1
    )
    transformer_impl: str = flag(
        "local", "layers of megatron-core's own linears, or of Transformer Engine's (CUDA, 16 bits)",
        choices=("local", "transformer_engine"),
    )  # fmt: skip
    cuda_graph_impl: str = flag(
        "none", "local: replay the forward and backward passes of a step as one CUDA graph; for steps of one shape",
        choices=("none", "local"),
    )  # fmt: skip
    cuda_graph_warmup_steps: int = flag(3, "ordinary steps before the graph is recorded", at_least=1)
    lora_fusion: bool = flag(False, "CCLoRA: the adapter rides in the base's own collectives and matrix products")
    lora_fusion_level: str = flag(
        "auto", "L0 no wider buffers, L1 wider activations, L2 wider weights too; auto decides for each linear",
        choices=("auto", "L0", "L1", "L2"),
    )  # fmt: skip
    lora_fusion_chunks: str = flag(
        "auto", "chunks of tokens, of which one is sent while another is multiplied; auto measures at the start",
        choices=("auto", "1", "2", "4"),
    )  # fmt: skip
    recompute_lora_inputs: bool = flag(
        True, "with --lora-fusion: keep outputs of norms and SwiGLU instead of computing them again in backward",
        name="no-recompute-lora-inputs", inverted=True,
    )  # fmt: skip
    use_mc2: bool = flag(False, "with --lora-fusion on Ascend: fused gather-matmul and matmul-reduce-scatter (MC2)")
    use_symmetric_memory: bool = flag(
        False, "with --lora-fusion on CUDA: the same through PyTorch's symmetric memory, within one host"
    )
    npu_plain_operators: tuple[str, ...] = plain_operators_flag()
    check_weight_hash_across_dp_replicas_interval: int = flag(
        100,
        "steps between comparisons of the bits that several processes hold; 0 compares at saves only",
        at_least=0,
    )
    seed: int = flag(1234, "seed of adapters, data order and dropout", at_least=0, at_most=LARGEST_SEED)
    deterministic: bool = flag(
        False, "only deterministic kernels", name="use-deter-comp", aliases=("deterministic-mode",)
    )

    log_interval: int = flag(100, "steps between log lines", at_least=1)
    log_throughput: bool = flag(False, "add TFLOP/s to the log line")
    eval_interval: int = flag(1000, "steps between validations", at_least=1)
    eval_iters: int = flag(100, "batches of one validation; 0 for none", at_least=0)
    tensorboard_dir: str | None = flag(None, "folder for TensorBoard scalars")
    wandb_project: str | None = flag(None, "Weights & Biases project; needs `pip install wandb`")
    wandb_exp_name: str | None = flag(None, "name of the Weights & Biases run; default the name of --save's folder")
    wandb_save_dir: str | None = flag(None, "folder for Weights & Biases' own files; default --save")
    device: str = flag("auto", "where to run", choices=("auto", "cuda", "npu", "cpu"))
    distributed_timeout_minutes: int = flag(
        30, "how long a collective waits for a missing process", at_least=1, at_most=MINUTES_OF_A_YEAR
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stage != "sft":
            raise UserError(
                f"--stage {self.stage} is not offered: this program fine-tunes on instructions (--stage sft)"
            )
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: choose one")
        if self.fp16 and self.loss_scale is None and self.initial_loss_scale < self.min_loss_scale:
            raise UserError(
                f"--initial-loss-scale {self.initial_loss_scale:g} must be at least --min-loss-scale "
                f"{self.min_loss_scale:g}"
            )
        if self.save and self.load and Path(self.save).resolve() == Path(self.load).resolve():
            raise UserError(f"--save {self.save} is also --load: the adapter would take the base's place; name another")
        for name in ("min_lr", "lr_warmup_init"):
            if getattr(self, name) > self.lr:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at most --lr {self.lr}")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise UserError("--lr-warmup-fraction and --lr-warmup-iters exclude each other: choose one")
        if self.lr_warmup_iters >= (self.lr_decay_iters or self.train_iters):
            raise UserError(f"--lr-warmup-iters {self.lr_warmup_iters} must be below the decay's number of steps")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: without the first "
                "there is nothing to gather, without the second megatron-core's buckets do not exist"
            )
        if (self.save_best or self.save_total_limit or self.async_save) and not self.save:
            raise UserError("--save-best, --save-total-limit and --async-save need --save: name a folder")
        if self.save_best and not self.eval_iters:
            raise UserError("--save-best needs validations, --eval-iters 0 asks for none: give at least 1")
        fusion = {"--lora-fusion-level": self.lora_fusion_level != "auto",
                  "--lora-fusion-chunks": self.lora_fusion_chunks != "auto",
                  "--no-recompute-lora-inputs": not self.recompute_lora_inputs,
                  "--use-symmetric-memory": self.use_symmetric_memory}  # fmt: skip
        if not self.lora_fusion and any(fusion.values()):
            given = ", ".join(name for name, is_given in fusion.items() if is_given)
            raise UserError(f"{given}: of the fused path only; give --lora-fusion as well, or leave it out")
        if self.lora_fusion and self.transformer_impl == "transformer_engine":
            raise UserError(
                "--lora-fusion with --transformer-impl transformer_engine: the fused path multiplies the frozen "
                "weights itself, Transformer Engine's linears do so out of its reach; leave one of the two out"
            )
        unrecordable = {"--fp16": self.fp16, "--recompute-granularity": self.recompute_granularity,
                        "--overlap-grad-reduce": self.overlap_grad_reduce}  # fmt: skip
        if self.cuda_graph_impl != "none" and any(unrecordable.values()):
            given = ", ".join(name for name, is_given in unrecordable.items() if is_given)
            raise UserError(
                f"--cuda-graph-impl {self.cuda_graph_impl} with {given}: what they decide anew in every step a graph "
                "does not see; leave one of the two out"
            )
        if self.recompute_granularity == "full" and (self.recompute_method is None or not self.recompute_num_layers):
            raise UserError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
        if self.recompute_granularity != "full" and self.recompute_method is not None:
            raise UserError("--recompute-method needs --recompute-granularity full")

    @property
    def dtype(self) -> str:
        """Dtype of weights and activations: fp32 unless a flag says otherwise."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def overlaps_products(self) -> bool:
        """Whether linears may run their products beside tensor-parallel collectives."""
        return self.lora_fusion or self.transformer_impl == "transformer_engine"

    def fused_collectives(self, kind: str) -> bool:
        """Whether products and collectives are asked for as one operator on devices of `kind`."""
        return self.lora_fusion and {"npu": self.use_mc2, "cuda": self.use_symmetric_memory}.get(kind, False)

    def batch_size(self, data_parallel_size: int) -> int:
        """Samples of one step. Raises UserError when micro batch and replicas do not divide it."""
        block = self.micro_batch_size * data_parallel_size
        size = self.global_batch_size or block
        if size % block:
            raise UserError(
                f"--global-batch-size {size} is not a multiple of --micro-batch-size {self.micro_batch_size} x "
                f"{data_parallel_size} data-parallel replicas = {block}"
            )
        return size
