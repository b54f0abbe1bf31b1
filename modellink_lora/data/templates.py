"""The prompt templates of `--prompt-type`, one entry each: what stands around every message of a conversation.

A slot is tokenised on its own, so where a text is cut into slots is part of the template: the same text in one piece
can give other ids. `{content}` marks the place of the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from modellink_lora.config.errors import UserError


class Special(Enum):
    """A slot filled from the tokenizer; it stays empty where the tokenizer has no such token."""

    BOS = "bos"
    EOS = "eos"


@dataclass(frozen=True)
class NamedToken:
    """A slot that is one token of the vocabulary, looked up by its text."""

    text: str


Slot = str | Special | NamedToken
Slots = tuple[Slot, ...]

BOS, EOS = Special.BOS, Special.EOS


@dataclass(frozen=True)
class Template:
    """Slots around each kind of message. `prefix` opens a conversation, `separator` every later question."""

    name: str
    user: Slots
    assistant: Slots = ("{content}", EOS)
    system: Slots = ("{content}",)
    prefix: Slots = ()
    separator: Slots = ()
    observation: Slots = ()  # the result of a tool; empty: like a question of the user
    function: Slots = ("{content}", EOS)  # a call of a tool
    default_system: str = ""
    system_inside_user: bool = False  # the system text becomes part of the first question's slot
    answer_opening: str = ""  # the end of `user` that belongs to the answer; a chat template leaves it out on request
    stop_words: tuple[str, ...] = ()  # tokens that end an answer; they must be in the vocabulary
    replace_eos: bool = False  # the first stop word is the tokenizer's end-of-sequence token

    @property
    def text(self) -> str:
        """All that it writes itself."""
        slots = (self.prefix, self.system, self.user, self.observation, self.assistant, self.function, self.separator)
        return "\n".join(slot for group in slots for slot in group if isinstance(slot, str))


_LLAMA3_OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def _llama3(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{{content}}<|eot_id|>{_LLAMA3_OPENING}"


_CHATML_OPENING = "<|im_start|>assistant\n"


def _chatml(role: str) -> str:
    return f"<|im_start|>{role}\n{{content}}<|im_end|>\n{_CHATML_OPENING}"


_CHATML_SYSTEM = "<|im_start|>system\n{content}<|im_end|>\n"

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="default",
            system=("{content}\n",),
            user=("Human: {content}\nAssistant:",),
            separator=("\n",),
            answer_opening="\nAssistant:",
        ),
        Template(name="empty", user=("{content}",), assistant=("{content}",)),
        Template(
            name="alpaca",
            user=("### Instruction:\n{content}\n\n### Response:\n",),
            separator=("\n\n",),
            answer_opening="\n\n### Response:\n",
            default_system=(
                "Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request.\n\n"
            ),
        ),
        Template(
            name="llama2",
            system=("<<SYS>>\n{content}\n<</SYS>>\n\n",),
            system_inside_user=True,
            user=(BOS, "[INST] {content} [/INST]"),
        ),
        Template(
            name="llama3",
            prefix=(BOS,),
            system=("<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",),
            user=(_llama3("user"),),
            observation=(_llama3("tool"),),
            answer_opening=_LLAMA3_OPENING,
            stop_words=("<|eot_id|>",),
            replace_eos=True,
        ),
        Template(
            name="qwen",
            system=(_CHATML_SYSTEM,),
            user=(_chatml("user"),),
            observation=(_chatml("tool"),),
            separator=("\n",),
            answer_opening=_CHATML_OPENING,
            default_system="You are a helpful assistant.",
            stop_words=("<|im_end|>",),
            replace_eos=True,
        ),
        Template(
            name="chatml",
            system=(_CHATML_SYSTEM,),
            user=(_chatml("user"),),
            observation=(_chatml("tool"),),
            separator=("\n",),
            answer_opening=_CHATML_OPENING,
            stop_words=("<|im_end|>", "<|im_start|>"),
            replace_eos=True,
        ),
        Template(name="mistral", prefix=(BOS,), user=("[INST] {content} [/INST]",)),
    )
}


def get_template(name: str | None) -> Template:
    """The template called `name`. Raises UserError with the names there are."""
    names = ", ".join(TEMPLATES)
    if name is None:
        raise UserError(f"--prompt-type is missing: choose the template the model is to be trained with: {names}")
    if name not in TEMPLATES:
        raise UserError(f"--prompt-type {name} is not a template of this version; choose {names}")
    return TEMPLATES[name]
