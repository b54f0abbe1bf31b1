"""What inference and evaluation are told about the model: weights, adapters, tokenizer and memory."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import LARGEST_SEED, MINUTES_OF_A_YEAR, check_ranges, flag
from modellink_lora.config.npu import plain_operators_flag
from modellink_lora.config.tokenizer import split_special_tokens_flag, trust_remote_code_flag


@dataclass(frozen=True)
class EngineConfig:
    """Model and memory"""

    load: str | None = flag(None, "base checkpoint: Megatron, or a Hugging Face folder; absent means random weights")
    lora_load: str | None = flag(None, "adapter to run unmerged beside the base: ours, ModelLink's or PEFT's")
    lora_modules: tuple[str, ...] = flag((), "further adapters, each as name=folder")
    tokenizer_type: str = flag("PretrainedFromHF", "kind of tokenizer", choices=("PretrainedFromHF",))
    tokenizer_name_or_path: str | None = flag(
        None, "folder of the Hugging Face tokenizer; default the one kept with --load"
    )
    use_fast_tokenizer: bool = flag(True, "take the slow tokenizer", name="tokenizer-not-use-fast", inverted=True)
    trust_remote_code: bool = trust_remote_code_flag()
    split_special_tokens: bool = split_special_tokens_flag()
    prompt_type: str | None = flag(None, "template around each prompt; default none")
    hf_chat_template: bool = flag(False, "put the tokenizer's own chat template around each prompt")
    add_eos_token: tuple[str, ...] = flag((), "further tokens that end an answer, e.g. '<|im_end|>'")
    max_length: int | None = flag(
        None, "most tokens of prompt and answer together; default the model's positions", at_least=2
    )
    max_batch_size: int = flag(8, "prompts computed at once; each has its rows of the key/value cache", at_least=1)
    use_kv_cache: bool = flag(True, "compute all tokens anew at each step", name="no-kv-cache", inverted=True)
    use_mcore_models: bool | None = flag(None, "the base is in mcore spelling; detected when absent")
    bf16: bool = flag(False, "compute in bf16; default fp32")
    fp16: bool = flag(False, "compute in fp16")
    seed: int = flag(
        1234, "of sampling: the same seed gives the same answers at every layout", at_least=0, at_most=LARGEST_SEED
    )
    device: str = flag("auto", "where to run", choices=("auto", "cuda", "npu", "cpu"))
    npu_plain_operators: tuple[str, ...] = plain_operators_flag()
    distributed_timeout_minutes: int = flag(
        30, "how long a collective waits for a missing process", at_least=1, at_most=MINUTES_OF_A_YEAR
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.prompt_type and self.hf_chat_template:
            raise UserError("--hf-chat-template and --prompt-type exclude each other: give one")
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: give one")
        self.adapters()

    @property
    def dtype(self) -> str:
        """Dtype of weights and activations."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def adapters(self) -> dict[str, str]:
        """Name -> folder of --lora-modules. Raises UserError for one without a name, or named twice."""
        named: dict[str, str] = {}
        for word in self.lora_modules:
            name, equals, folder = word.partition("=")
            if not (name and equals and folder):
                raise UserError(f"--lora-modules {word}: write name=folder")
            if name in named or name == "base" or (name == "tuned" and self.lora_load):
                raise UserError(f"--lora-modules {word}: the name {name} is taken: choose another")
            named[name] = folder
        return named
