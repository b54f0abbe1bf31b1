"""Our engine as a model of EleutherAI's lm-eval: its tasks, prompts and scores, our forward passes.

Text becomes tokens, and what is too long loses its beginning, by the rules of lm-eval's own Hugging Face backend
(lm_eval/models/huggingface.py), so that scores are those that it gets on the merged model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from modellink_lora.config.document import read_document
from modellink_lora.config.errors import UserError
from modellink_lora.config.harness import MODEL
from modellink_lora.inference.request import BASE, Choice, Request, Sampling, default_choice
from modellink_lora.inference.session import Served

_MAX_GEN_TOKS = 256  # of tasks that do not say, as in the Hugging Face backend
_SHAPING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def register(open_model: Callable[[], EngineLM]) -> None:
    """Enter the model in lm-eval's table; it is opened when lm-eval asks for it, after its own checks."""

    class Registered(EngineLM):
        @classmethod
        def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> EngineLM:
            return open_model()

    register_model(MODEL)(Registered)


class EngineLM(TemplateLM):
    """The engine under one choice of adapter.

    Args:
        seed: of sampled answers; each request has one of its own.
        add_bos_token, prefix_token_id: what texts begin with, where the tokenizer's own way is not wanted.
    """

    def __init__(
        self, served: Served, choice: Choice, *, seed: int = 0, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.engine, self.choice, self.seed, self._about = served.engine, choice, seed, served.about
        self.tokenizer = served.prompter.tokenizer
        self._stop_ids = served.prompter.stop_ids
        self._defaults = _generation_defaults(Path(self.tokenizer.name_or_path))
        self.max_length = self.engine.max_length
        self._add_bos, self._prefix = add_bos_token, prefix_token_id

    # What lm-eval asks about the tokenizer.

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id if self._prefix is None else self._prefix
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_gen_toks(self) -> int:
        return _MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template; one that knows no system message gets none."""

        def text(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        try:
            return text(chat_history)
        except TemplateError:
            return text([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. A text that begins with the prefix token, as one from a chat template may, gets no second one."""
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        return self._encode(string, special)

    def _encode_prompt(self, string: str) -> list[int]:
        """Token ids of a prompt to continue, for which the Hugging Face backend looks for the BOS token only."""
        return self._encode(string, False if has_bos_prefix(string, self.tokenizer.bos_token) else self._add_bos)

    def _encode(self, string: str, special: bool | None) -> list[int]:
        given = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **given))

    # What it asks the model.

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of continuations after contexts; `loglikelihood` of the base calls it."""
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        with _bar(len(pairs), "scoring with the engine", disable_tqdm) as progress:
            scores = self.engine.score(pairs, choice=self.choice, progress=progress)
        return [(score.total, score.greedy) for score in scores]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The pair without what is too much at its beginning; the last token is only predicted, so it needs no room."""
        if len(continuation) > self.max_length:
            raise UserError(f"lm-eval asks for the probability of {len(continuation)} tokens at once, the model sees "
                            f"{self.max_length}: this task does not suit it, or raise --max-length")  # fmt: skip
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of the model's length that share one token."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            ):  # fmt: skip
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to, and without, the first of the task's stop texts."""
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        asked = []
        for number, request in enumerate(requests):
            prompt, given = request.args
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            stop = [text for text in handle_stop_sequences(settings.pop("until", None), eos=eos) if text]
            limit = settings.pop("max_gen_toks")
            if limit >= self.max_length:
                raise UserError(f"the task asks for answers of {limit} tokens, the model sees {self.max_length}: add "
                                "--gen_kwargs max_gen_toks=.. with fewer")  # fmt: skip
            ids = tuple(self._encode_prompt(prompt)[-(self.max_length - limit) :])
            asked.append(
                Request(ids, limit, self._sampling(settings, number), self._stop_ids, tuple(stop), self.choice)
            )  # fmt: skip
        with _bar(len(asked), "answering with the engine", disable_tqdm) as progress:
            answers = self.engine.generate(asked, progress=progress)
        return [answer.text for answer in answers]

    def _sampling(self, settings: dict[str, Any], number: int) -> Sampling:
        sample = settings.pop("do_sample", False)
        unknown = sorted(name for name in settings if name not in (*_SHAPING, "num_beams"))
        if unknown or settings.get("num_beams", 1) != 1:
            raise UserError(
                f"the task asks for generation with {unknown[0] if unknown else 'num_beams'}, which is not available "
                f"here: this model takes {', '.join(_SHAPING)}"
            )
        chosen = {**self._defaults, **settings}
        penalty = float(chosen.get("repetition_penalty", 1.0))
        if not sample:
            return Sampling(repetition_penalty=penalty)
        return Sampling(
            float(chosen.get("temperature", 0.0)), int(chosen.get("top_k", 0)), float(chosen.get("top_p", 1.0)),
            float(chosen.get("min_p", 0.0)), penalty, self.seed + number,
        )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"model_adapter": self.choice.adapter, **{f"model_{name}": value for name, value in self._about.items()}}


def choice_of(served: Served, adapter: str | None) -> Choice:
    """The adapter called `adapter`, by default that of --lora-load. Raises UserError for a name nobody has."""
    known = (BASE, *served.engine.choices)
    name = adapter or default_choice(served.engine.choices).adapter
    if name not in known:
        raise UserError(f"--adapter {name}: no adapter is called so; choose {', '.join(known)}")
    return Choice(name)


def _generation_defaults(folder: Path) -> Mapping[str, Any]:
    """What generation_config.json beside the tokenizer says of shaping; transformers obeys it, so that scores do."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    found = dataclasses.asdict(read_document(path, _Shaping))
    return {name: value for name, value in found.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Shaping:
    """Of `_SHAPING` what is taken from the file; a temperature is the task's affair."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@contextmanager
def _bar(total: int, title: str, disabled: bool) -> Iterator[Callable[[int], Any]]:
    with tqdm(total=total, desc=title, disable=disabled) as bar:
        yield bar.update
