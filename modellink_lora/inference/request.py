"""What a caller asks of the engine and what it gets back. Pure: tokens in, tokens out, no text and no tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from modellink_lora.config.errors import UserError

BASE = "base"  # the model without any adapter
TUNED = "tuned"  # the adapter of --lora-load


@dataclass(frozen=True)
class Choice:
    """Which adapter runs beside the base, and how strongly: W x + scale * (alpha / r) B A x."""

    adapter: str = BASE
    scale: float = 1.0


PLAIN = Choice()


def default_choice(adapters: Collection[str], scale: float = 1.0) -> Choice:
    """The adapter of --lora-load if it is one of `adapters`, else the base."""
    return Choice(TUNED, scale) if TUNED in adapters else PLAIN


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The order is that of transformers: penalty, temperature, top-k, top-p, min-p.

    Args:
        temperature: 0 takes the most likely token; nothing is drawn then.
        top_k: keep that many of the most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: keep tokens of at least this share of the best one's probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen (arXiv:1909.05858).
        seed: of the random numbers, one for each token in turn, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Args:
        ids: the prompt, at least one token.
        stop_ids: tokens that end the answer; they are not part of it.
        stop: texts that end the answer; they are not part of it.
        top_logprobs: report that many of the most likely tokens beside each chosen one.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    choice: Choice = PLAIN
    top_logprobs: int = 0


@dataclass(frozen=True)
class Token:
    """One token of an answer as it comes.

    Args:
        text: what can be shown now; empty while a character, or what may become a stop text, is incomplete.
        logprob: natural logarithm of the model's own probability, before any shaping of the distribution.
        top: (id, logprob) of the most likely tokens.
        finish: why the answer ends with this token: "stop" or "length"; None while it goes on.
        counted: whether the token is part of the answer; one of `stop_ids` is not.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    counted: bool = True


class NotFinite(UserError):
    """The logits of a model are NaN or infinite, so no answer follows from them.

    Args:
        what: where in the answer, and what to check.
        prompt: which one, in words; "" where there is only one.
        index: of the prompt among those that were asked together.
    """

    def __init__(self, what: str, *, prompt: str = "", index: int = 0) -> None:
        super().__init__(f"{prompt}, {what}" if prompt else what)
        self.what, self.index = what, index


def not_finite(at: str, choice: Choice, dtype: str) -> NotFinite:
    """The error for logits computed in `dtype`; `at` says at which token."""
    adapter = "" if choice.adapter == BASE else f", the adapter {choice.adapter} (at strength {choice.scale:g})"
    also = ", which overflows above 65504 (take bf16 or fp32)" if dtype == "fp16" else ""
    return NotFinite(
        f"{at}: the model's logits are NaN or infinite, so there is no answer: check the checkpoint{adapter} and the "
        f"dtype {dtype}{also}"
    )


@dataclass
class Completion:
    """A whole answer.

    Args:
        ids: tokens of the answer, without the one that ended it.
        finish: "stop" or "length".
        score: of a beam: its total log-probability over length ** length_penalty.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    tokens: list[Token] = field(default_factory=list)
    score: float | None = None


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after a context.

    Args:
        logprobs: of each token of the continuation.
        greedy: whether each of them was the most likely one.
    """

    logprobs: Sequence[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)
