"""From what a person writes to token ids: a template around it, or the tokenizer's own, and what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.data.generation_stops import generation_stops
from modellink_lora.data.prompt import Conversation, Message, encode_prompt
from modellink_lora.data.templates import get_template

_ROLES = {"user": "user", "assistant": "assistant", "tool": "observation", "observation": "observation",
          "function": "function"}  # fmt: skip


class Prompter:
    """Makes prompts of one kind.

    Args:
        prompt_type: name of a template; None for none.
        hf_chat_template: put the tokenizer's chat template around prompts.
        folder: of the tokenizer; generation_config.json or config.json there may name more tokens that end an answer.
        stop_words: further tokens that do, by their text.
    """

    def __init__(
        self, tokenizer: Any, *, prompt_type: str | None, hf_chat_template: bool, folder: Path,
        stop_words: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.tokenizer, self.prompt_type, self.hf_chat_template = tokenizer, prompt_type, hf_chat_template
        self._template = get_template(prompt_type) if prompt_type else None
        if hf_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(f"--hf-chat-template: the tokenizer in {folder} has none; give a --prompt-type instead")
        words = [*(self._template.stop_words if self._template else ()), *stop_words]
        self.stop_ids = frozenset({tokenizer.eos_token_id, *generation_stops(folder), *map(self._one_token, words)})

    @property
    def has_template(self) -> bool:
        return self._template is not None or self.hf_chat_template

    def text(self, prompt: str) -> list[int]:
        """A prompt as one message of the user, or as it is where there is no template."""
        return self.chat([{"role": "user", "content": prompt}]) if self.has_template else self.plain(prompt)

    def plain(self, text: str) -> list[int]:
        """The tokenizer's own encoding, special tokens included."""
        return self.tokenizer.encode(text)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages of roles system, user, assistant and tool, the last one asking; the answer is to follow.

        Raises:
            UserError: no template, or messages that do not fit it.
        """
        if self.hf_chat_template:
            try:
                return list(
                    self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
                )
            except Exception as error:  # templates raise what they like
                raise UserError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error
        if self._template is None:
            raise UserError("messages need a template: give --prompt-type or --hf-chat-template")
        return encode_prompt(_conversation(messages), self._template, self.tokenizer)

    def _one_token(self, word: str) -> int:
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        found = self.tokenizer.get_vocab().get(word, ids[0] if len(ids) == 1 else None)
        if found is None:
            raise UserError(f"--add-eos-token {word}: is {len(ids)} tokens to this tokenizer, not one; to end answers "
                            "at a text give it to --stop")  # fmt: skip
        return found


def _conversation(messages: Sequence[Mapping[str, str]]) -> Conversation:
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if len(system) > 1 or (system and messages[0]["role"] != "system"):
        raise UserError("a conversation has one system message at most, and begins with it")
    unknown = sorted({message["role"] for message in rest} - set(_ROLES))
    if unknown:
        raise UserError(f"no role is called {', '.join(unknown)}: choose system, user, assistant or tool")
    roles = [_ROLES[message["role"]] for message in rest]
    if len(roles) % 2 == 0 or any((role in ("user", "observation")) != (i % 2 == 0) for i, role in enumerate(roles)):
        raise UserError(f"messages must ask and answer in turn and end with a question; found {', '.join(roles)}")
    return Conversation(tuple(Message(role, m["content"]) for role, m in zip(roles, rest)), system[0] if system else "")
