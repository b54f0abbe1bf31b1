"""What a conversation remembers, and the token ids of its next question within the model's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modellink_lora.config.errors import UserError
from modellink_lora.inference.prompt_file import Encoder


@dataclass
class History:
    """Questions and answers, oldest first.

    Args:
        turns: questions remembered, the newest included.
        as_messages: a template puts roles around each text; without one everything is written one after another.
    """

    encoder: Encoder
    turns: int
    as_messages: bool
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, question: str, *, longest: int, tell: Callable[[str], None]) -> list[int]:
        """Ids of the conversation with `question` at its end, at most `longest`; the oldest turns are left out for it.

        Raises:
            UserError: the question alone is too long.
        """
        dropped = 0
        while True:
            past = self.pairs[max(0, len(self.pairs) - self.turns + 1) + dropped :]
            ids = self._encode(past, question)
            if len(ids) <= longest:
                break
            if not past:
                raise UserError(f"this question has {len(ids)} tokens, the model has room for {longest}: shorten it")
            dropped += 1
        if dropped:
            tell(f"the conversation no longer fits into the model: {dropped} of its oldest turns left out")
        self.pairs = list(past)
        return ids

    def add(self, question: str, answer: str) -> None:
        self.pairs.append((question, answer))

    def clear(self) -> None:
        self.pairs.clear()

    def _encode(self, past: Sequence[tuple[str, str]], question: str) -> list[int]:
        if not self.as_messages:
            return self.encoder.text("".join(q + a for q, a in past) + question)
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for pair in past for role, text in zip(roles, pair)]
        return self.encoder.chat([*messages, {"role": "user", "content": question}])
