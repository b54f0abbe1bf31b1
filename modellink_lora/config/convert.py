"""What a conversion reads, where it writes, and in which layout: `convert_ckpt.py`'s flags, new and old spellings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import MOST_WORKERS, check_ranges, flag
from modellink_lora.config.parallel import parse_layer_list
from modellink_lora.config.tokenizer import trust_remote_code_flag

_LOADERS = {"llama2_hf": "hf", "megatron": "mg"}
_SAVE_TYPES = {
    "mg": "mg",
    "megatron": "mg",
    "hf": "hf",
    "save_huggingface_llama": "hf",
    "save_huggingface_qwen": "hf",
    "save_huggingface_chatglm3": "hf",
    "huggingface_bloom": "hf",
    "meta": "meta",
    "peft": "peft",
    "gguf-adapter": "gguf-adapter",
    "adapter": "adapter",
    "adapter-ranks": "adapter-ranks",
}
_ADAPTERS = ("peft", "gguf-adapter", "adapter", "adapter-ranks")  # results that hold the adapter of --lora-load alone


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion"""

    save_dir: str = flag("", "where the result goes; a Hugging Face model goes into SAVE_DIR/mg2hg")
    load_dir: str | None = flag(None, "checkpoint to read: a Hugging Face model folder or a Megatron checkpoint")
    load_model_type: str | None = flag(None, "what --load-dir holds", choices=("hf", "mg"))
    save_model_type: str | None = flag(
        None,
        "what to write: mg (Megatron), hf (Hugging Face), meta (Meta's consolidated.NN.pth and params.json, as many as "
        "--target-tensor-parallel-size); the adapter of --lora-load alone: peft (PEFT's folder), gguf-adapter "
        "(llama.cpp's adapter.gguf), adapter (this program's own format), adapter-ranks (ModelLink's rank files, at "
        "the --target-... sizes)",
        choices=tuple(_SAVE_TYPES),
    )
    model_type_hf: str | None = flag(None, "model family; config.json decides, this is compared with it")
    lora_load: str | None = flag(None, "adapter to merge into the weights, or to export")
    target_tensor_parallel_size: int | None = flag(
        None,
        "tensor parallel size of the result, for meta its number of files; default 1",
        at_least=1,
    )
    target_pipeline_parallel_size: int | None = flag(None, "pipeline stages of the result; default 1", at_least=1)
    target_expert_parallel_size: int | None = flag(
        None,
        "expert parallel size of the result; default 1",
        aliases=("target-expert-model-parallel-size",),
        at_least=1,
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None,
        "interleave the stages of the result: layers of each of its runs, stored as model0, model1, ...",
        at_least=1,
    )
    num_layer_list: str | None = flag(None, "layers of each pipeline stage of the result, e.g. 6,8,8,10")
    params_dtype: str | None = flag(
        None, "dtype of the result; default that of the weights read", choices=("fp32", "bf16", "fp16")
    )
    make_vocab_size_divisible_by: int | None = flag(
        None,
        "pad the vocabulary to a multiple of this times TP; default 1, or as it is where that still divides",
        at_least=1,
    )
    resize_vocab: bool = flag(
        False,
        "from hf: give embedding and output layer as many rows as config.json's vocab_size says; rows above it are cut "
        "off, new ones are the mean of the others",
    )
    use_mcore_models: bool = flag(False, "write megatron-core names, and read them unless --load-from-legacy")
    load_from_legacy: bool = flag(False, "--load-dir holds legacy names")
    save_to_legacy: bool = flag(False, "write legacy names")
    add_qkv_bias: bool = flag(False, "the model has biases on q, k and v; compared with the checkpoint")
    add_dense_bias: bool = flag(False, "it has one on the attention's output; compared with the checkpoint")
    embed_layernorm: bool = flag(False, "it has a norm on the embedding; compared with the checkpoint")
    post_norm: bool = flag(False, "it has norms behind its sublayers; compared with the checkpoint")
    base_model_name_or_path: str | None = flag(None, "base model to name in an exported PEFT adapter")
    svd_rank: int | None = flag(
        None,
        "with peft: cut the update of each projection to this rank by its singular values, and say the error",
        at_least=1,
    )
    w_pack: str | None = flag(
        None,
        "whether q, k and v are one W_pack tensor in the Hugging Face model; the model type decides, this is compared",
        choices=("true", "false", "True", "False"),
    )
    dry_run: bool = flag(False, "print the plan and write nothing")
    list_moves: bool = flag(False, "print every tensor of the plan, not only their kinds")
    workers: int = flag(
        0,
        "threads that read, merge and write; default as many as there are cores, at most 8",
        at_least=0,
        at_most=MOST_WORKERS,
    )
    overwrite: bool = flag(False, "replace a result that is already there; the old one is kept until the new is whole")
    verify: bool = flag(False, "read the result again and compare every tensor with what it was made of")
    merge_report: str | None = flag(
        None, "file for what merging changed in each weight; default SAVE_DIR/merge_report.json"
    )
    verify_logits: str | None = flag(
        None, "after merging, run this prompt (or token ids, e.g. 1,15,27) through base + adapter and the merged model"
    )
    prompt_type: str | None = flag(
        None,
        "template that the adapter was trained with, where it does not say so, or that the model was; its end token "
        "and chat template go into the result",
    )
    trust_remote_code: bool = trust_remote_code_flag()
    loader: str | None = flag(None, "older spelling of --load-model-type", choices=tuple(_LOADERS))
    saver: str | None = flag(None, "older spelling, together with --loader", choices=("megatron",))

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.save_dir:
            raise UserError("--save-dir is missing: say where the result goes")
        if self.loader and self.load_model_type and _LOADERS[self.loader] != self.load_model_type:
            raise UserError(f"--loader {self.loader} contradicts --load-model-type {self.load_model_type}: give one")
        if self.exports_adapter:
            if not self.lora_load:
                raise UserError(f"--save-model-type {self.target} exports an adapter: name it with --lora-load")
        elif not self.load_dir:
            raise UserError("--load-dir is missing: name the checkpoint to convert")
        if self.save_to_legacy and self.load_from_legacy:
            raise UserError("--save-to-legacy and --load-from-legacy together change nothing: give one of them")
        if self.load_from_legacy and self.source == "hf":
            raise UserError("--load-from-legacy is about a Megatron checkpoint, and --load-dir is a Hugging Face model")
        if self.svd_rank and self.target != "peft":
            raise UserError(f"--svd-rank is for --save-model-type peft, not {self.target}")
        if self.verify_logits is not None and self.target not in ("hf", "mg"):
            raise UserError("--verify-logits compares a merged model: it goes with --save-model-type mg or hf")
        in_stages = ("mg", "adapter-ranks")
        for name, kinds, ones in (
            ("num_layer_list", in_stages, None),
            ("num_layers_per_virtual_pipeline_stage", in_stages, None),
            ("target_pipeline_parallel_size", in_stages, 1),
            ("target_tensor_parallel_size", (*in_stages, "meta"), 1),
            ("target_expert_parallel_size", ("mg",), 1),
        ):
            if name == "num_layers_per_virtual_pipeline_stage" and self.tells_interleaving:
                continue
            if self.target not in kinds and (getattr(self, name) or ones) != ones:
                raise UserError(
                    f"--{name.replace('_', '-')} is for --save-model-type {' or '.join(kinds)}, not {self.target}"
                )

    @property
    def source(self) -> str:
        """`hf` or `mg`."""
        return self.load_model_type or _LOADERS[self.loader or "megatron"]

    @property
    def target(self) -> str:
        """`hf`, `mg` or `meta`, or for an adapter alone `peft`, `gguf-adapter`, `adapter` or `adapter-ranks`."""
        if self.save_model_type:
            return _SAVE_TYPES[self.save_model_type]
        if self.saver or self.loader or self.source == "hf":
            return "mg"
        raise UserError("--save-model-type is missing: say mg, hf, meta, peft, gguf-adapter, adapter or adapter-ranks")

    @property
    def exports_adapter(self) -> bool:
        """Whether the result is an adapter without its base."""
        return self.target in _ADAPTERS

    @property
    def keeps_layout(self) -> bool:
        """With the older spelling, a target size left out means that of the source."""
        return self.load_model_type is None and self.loader is not None

    @property
    def merges(self) -> bool:
        """Whether an adapter may be merged: that of --lora-load, or one that lies in a Megatron checkpoint itself."""
        return not self.exports_adapter and (self.lora_load is not None or self.source == "mg")

    @property
    def loads_tokenizer(self) -> bool:
        """Whether the tokenizer may be asked: for the end token of a template, or for --verify-logits."""
        tuned = self.merges or self.prompt_type is not None or self.target in ("peft", "gguf-adapter")
        return self.verify_logits is not None or tuned

    @property
    def without_effect(self) -> dict[str, str]:
        """Flags given that change nothing in this conversion -> why."""
        ranks, legacy = self.target in ("mg", "adapter-ranks"), "it chooses the names of tensors in rank files"
        rows: dict[str, tuple[bool, str]] = {
            "save_to_legacy": (ranks, legacy),
            "use_mcore_models": (ranks or self.source == "mg", legacy),
            "make_vocab_size_divisible_by": (self.target == "mg", "only the vocabulary of a Megatron result is padded"),
            "base_model_name_or_path": (self.target == "peft", "only adapter_config.json of PEFT names the base"),
            "params_dtype": (not self.exports_adapter, "an adapter keeps the dtypes it has"),
            "resize_vocab": (self.source == "hf" and not self.exports_adapter, "only a Hugging Face model is resized"),
            "verify": (not self.exports_adapter, "only models are read again after writing"),
            "list_moves": (not self.exports_adapter, "only the plan of a model lists its tensors"),
            "merge_report": (self.merges, "no adapter is merged"),
            "prompt_type": (self.target != "adapter-ranks", "rank files keep no template"),
            "trust_remote_code": (self.loads_tokenizer, "no tokenizer is loaded"),
            "workers": (not self.exports_adapter, "an adapter is written by one thread"),
        }
        return {
            "--" + name.replace("_", "-"): reason
            for name, (has_effect, reason) in rows.items()
            if getattr(self, name) and not has_effect
        }

    @property
    def tells_interleaving(self) -> bool:
        """Whether --num-layers-per-virtual-pipeline-stage is about the source: the older spelling's loader has it."""
        to_one = self.target == "hf" or self.target_pipeline_parallel_size == 1
        older = self.keeps_layout and self.source == "mg"
        return older and to_one and self.num_layers_per_virtual_pipeline_stage is not None

    @property
    def layer_list(self) -> tuple[int, ...] | None:
        return parse_layer_list(self.num_layer_list) if self.num_layer_list else None

    def spelling(self, source: Literal["mcore", "legacy"] | None) -> Literal["mcore", "legacy"]:
        """`mcore` or `legacy` names of a Megatron result; `source` is the spelling read, None for Hugging Face."""
        if self.save_to_legacy:
            return "legacy"
        if self.use_mcore_models:
            return "mcore"
        return source or "legacy"
