"""From what a person writes to token ids: a template around it, or the tokenizer's own, and what ends an answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.data.generation_stops import generation_stops
from modellink_lora.data.prompt import Conversation, Message, encode_prompt, without_end
from modellink_lora.data.templates import get_template
from modellink_lora.data.text_encoder import NotText, Piece, TextEncoder

_ROLES = {"user": "user", "assistant": "assistant", "tool": "observation", "observation": "observation",
          "function": "function"}  # fmt: skip


class Prompter:
    """Makes prompts of one kind.

    Args:
        prompt_type: name of a template; None for none.
        hf_chat_template: put the tokenizer's chat template around prompts.
        folder: of the tokenizer; generation_config.json or config.json there may name more tokens that end an answer.
        stop_words: further tokens that do, by their text.
        split_special_tokens: a prompt that spells a special token stays text; only templates write special tokens.
        say: told once that a prompt does.
    """

    def __init__(
        self, tokenizer: Any, *, prompt_type: str | None, hf_chat_template: bool, folder: Path,
        stop_words: Sequence[str] = (), split_special_tokens: bool = True, say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.prompt_type, self.hf_chat_template = tokenizer, prompt_type, hf_chat_template
        self._template = get_template(prompt_type) if prompt_type else None
        if hf_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(f"--hf-chat-template: the tokenizer in {folder} has none; give a --prompt-type instead")
        known = self._template.text if self._template else _source(tokenizer) if hf_chat_template else ""
        self._encoder = TextEncoder(tokenizer, split_special_tokens=split_special_tokens, template_text=known)
        self._say = say
        words = [*(self._template.stop_words if self._template else ()), *stop_words]
        self.stop_ids = frozenset({tokenizer.eos_token_id, *generation_stops(folder), *map(self._one_token, words)})

    @property
    def has_template(self) -> bool:
        return self._template is not None or self.hf_chat_template

    def text(self, prompt: str) -> list[int]:
        """A prompt as one message of the user, or as it is where there is no template."""
        return self.chat([{"role": "user", "content": prompt}]) if self.has_template else self.plain(prompt)

    def plain(self, text: str) -> list[int]:
        """The tokenizer's own encoding, with the special tokens that it puts around a text."""
        return self._told(lambda: self._encoder.whole(text))

    def answer(self, text: str) -> list[int]:
        """An answer to a conversation, without the end token."""
        return self._told(lambda: self._encoder.text(text))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages of roles system, user, assistant and tool, the last one asking; the answer is to follow.

        Raises:
            UserError: no template, or messages that do not fit it.
        """
        if self.hf_chat_template:
            return self._told(lambda: self._by_chat_template([dict(message) for message in messages]))
        template = self._template
        if template is None:
            raise UserError("messages need a template: give --prompt-type or --hf-chat-template")
        return self._told(lambda: encode_prompt(_conversation(messages), template, self._encoder))

    def _told(self, encode: Callable[[], list[int]]) -> list[int]:
        try:
            ids = encode()
        except NotText as error:
            raise UserError(f"{error}; --no-split-special-tokens makes it that token") from None
        if self._encoder.met and self._say:
            said = "it stays text; --no-split-special-tokens makes it that token"
            if not self._encoder.split_special_tokens:
                said = "it became that token (--no-split-special-tokens)"
            self._say(f"note: text of a prompt spells a special token ({', '.join(sorted(self._encoder.met))}): {said}")
            self._say = None
        self._encoder.met.clear()
        return ids

    def _by_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        """What a template renders shows no longer who wrote what, so spellings of special tokens in the messages are
        replaced before and put back after; the text must be the one that is rendered without that."""
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = without_end(message["content"], self._encoder.eos_token)
        if not any(self._encoder.spells(message["content"]) for message in messages):
            return self._rendered(messages, tokenize=True)
        mark = next(mark for n in itertools.count() if (mark := f"spelled{n}x") not in str(messages))
        hidden: list[str] = []

        def hide(text: str) -> str:
            hidden.append(text)
            return f"{mark}{len(hidden) - 1}x"

        marked = []
        for message in messages:
            content = message["content"]
            if self._encoder.spells(content):
                parts = self._encoder.cut(content)
                # a spelling may be seen only once the tokenizer has normalised the text
                content = "".join(hide(part) if n % 2 else part for n, part in enumerate(parts))
                content = content if len(parts) > 1 else hide(content)
            marked.append({**message, "content": content})
        parts = re.split(f"{mark}([0-9]+)x", self._rendered(marked, tokenize=False))
        pieces = [Piece(hidden[int(part)], by_user=True) if n % 2 else Piece(part) for n, part in enumerate(parts)]
        if "".join(piece.text for piece in pieces) != self._rendered(messages, tokenize=False):
            raise UserError("the chat template changes text of these messages that spells special tokens, so that it "
                            "cannot be kept as text; --no-split-special-tokens makes it those tokens")  # fmt: skip
        return self._encoder.slot(pieces)

    def _rendered(self, messages: list[dict[str, str]], *, tokenize: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=tokenize, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates raise what they like
            raise UserError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error

    def _one_token(self, word: str) -> int:
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        found = self.tokenizer.get_vocab().get(word, ids[0] if len(ids) == 1 else None)
        if found is None:
            raise UserError(f"--add-eos-token {word}: is {len(ids)} tokens to this tokenizer, not one; to end answers "
                            "at a text give it to --stop")  # fmt: skip
        return found


def _source(tokenizer: Any) -> str:
    """Text of the tokenizer's chat template, which may be several by name."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)


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
