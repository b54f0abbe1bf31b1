"""One evaluation from folders to results: which items, which models, in what order, and what is said about them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modellink_lora import __version__
from modellink_lora.checkpoint.store import replacing_file, writing
from modellink_lora.config.document import to_json
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.evaluate import DEFAULT_FOLDER, EvalConfig
from modellink_lora.evaluation import chart, results, scoring
from modellink_lora.evaluation.index import TASKS
from modellink_lora.evaluation.item import Item, Options, Task
from modellink_lora.evaluation.progress import Progress, Record, digest, fingerprint, key_of
from modellink_lora.evaluation.reading import GRAMMAR
from modellink_lora.inference.request import BASE, Sampling

# So many questions of one subject are answered by every model and brought to the disk before the next: what a kill
# costs, against the worked examples in front of them, which are computed once each time.
_SCORED_TOGETHER, _WRITTEN_TOGETHER = 64, 24

Say = Callable[[str], None]
Gather = Callable[[Any], list[Any] | None]
Work = dict[str, list[Item]]


def read_items(config: EvalConfig, model: EngineConfig) -> Work:
    """Task -> its items. Raises UserError for what is wrong with the data, before a model is loaded."""
    options = Options(
        num_shots=config.num_shots, chat=bool(model.prompt_type or model.hf_chat_template),
        language=config.eval_language, most=config.max_eval_samples, instruction=config.instruction_template,
    )  # fmt: skip
    if config.no_chat_template and model.hf_chat_template:
        raise UserError("--no-chat-template and --hf-chat-template exclude each other: give one")
    return {  # absolute: what lies beside a folder is looked for, and beside "." lies nothing
        name: TASKS[name].items(Path(os.path.abspath(path)), options)
        for name, path in zip(config.task, config.task_data_path, strict=True)
    }


def evaluate(
    engine: Any,
    prompter: Any,
    config: EvalConfig,
    *,
    model: EngineConfig,
    work: Work,
    replica: int = 0,
    replicas: int = 1,
    gather: Gather = lambda value: [value],
    say: Say,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Answer the questions with base and tuned model, write the results, and say them. On the leader of each replica.

    Args:
        work: what `read_items` gave.
        replica, replicas: of the model; this one takes every `replicas`-th item.
        gather: brings a value of each replica to the first, which gets them in order, the others None.
        facts: further things to be kept in results.json, such as the parallel layout.
    """
    models = _models(engine, config)
    for note in _notes(engine, config, model, work):
        if replica == 0:
            say(note)
    for name, items in work.items():
        _Run(TASKS[name], items, engine, prompter, config, model, models, dict(facts or {})).go(
            replica, replicas, gather, say
        )


def _models(engine: Any, config: EvalConfig) -> list[str]:
    tuned = [name for name in engine.choices if name != BASE]
    if config.tuned_only and not tuned:
        raise UserError("--tuned-only: there is no adapter; give --lora-load, or leave the flag out")
    return tuned if config.tuned_only else [BASE, *tuned]


def _notes(engine: Any, config: EvalConfig, model: EngineConfig, work: Work) -> Iterator[str]:
    """What is said once: flags that change nothing here, and a default that users of ModelLink may not expect."""
    plain = not (model.prompt_type or model.hf_chat_template or config.no_chat_template)
    if plain and getattr(engine.tokenizer, "chat_template", None):
        yield (
            "prompts are plain text although the tokenizer has a chat template: --hf-chat-template or --prompt-type "
            "puts one around them, --no-chat-template silences this line"
        )
    written = any(config.scoring == "generate" or not item.choices for items in work.values() for item in items)
    for flag, given, effective, why in (
        ("--max-new-tokens", config.max_new_tokens is not None, written, "no answer is written; see --scoring"),
        ("--temperature, --top-p, --top-k", config.sampling()[0] > 0, written, "no answer is written; see --scoring"),
        (
            "--instruction-template",
            config.instruction_template is not None,
            "human_eval" in work,
            "it is of human_eval",
        ),
        ("--allow-code-execution", config.allow_code_execution, "human_eval" in work, "only human_eval runs code"),
    ):
        if given and not effective:
            yield f"{flag} has no effect: {why}"
    fixed = [name for name in work if not TASKS[name].languages]
    if config.eval_language and fixed:
        yield f"--eval-language has no effect on {', '.join(fixed)}"


class _Run:
    """One task of an evaluation."""

    def __init__(
        self, task: Task, items: list[Item], engine: Any, prompter: Any, config: EvalConfig, model: EngineConfig,
        models: list[str], facts: dict[str, Any],
    ) -> None:  # fmt: skip
        self.task, self.items, self.engine, self.prompter = task, items, engine, prompter
        self.config, self.model, self.models, self.facts = config, model, models, facts
        temperature, top_p, top_k = config.sampling()
        self.writing = scoring.Writing(
            always=config.scoring == "generate",
            max_new_tokens=config.max_new_tokens or task.max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=model.seed),
        )
        self.settings = self._settings()
        name = task.name if config.save else f"{task.name}-{digest(self.settings)}"
        self.folder = Path(config.save or DEFAULT_FOLDER) / name

    def go(self, replica: int, replicas: int, gather: Gather, say: Say) -> None:
        first = replica == 0
        started = time.monotonic()
        with contextlib.ExitStack() as held:
            if first:
                held.enter_context(writing(self.folder, flag="--save", tell=say))
            progress = Progress(
                self.folder, self.settings, replica=replica, replicas=replicas, overwrite=self.config.overwrite
            )
            mine = self.items[replica::replicas]
            waiting = [item for item in mine if (item.subject, item.number) not in progress.done]
            before = gather(len(mine) - len(waiting))  # another replica may be at work already: each counts its own
            if before is not None:
                found = f"{sum(before)} answered before, " if sum(before) else ""
                say(
                    f"{self.task.name}: {found}{len(self.items)} questions with {' and '.join(self.models)}, "
                    f"results in {self.folder}"
                )
            self._answer(waiting, progress, bar=first, done=len(mine) - len(waiting), of=len(mine))
            progress.close()
            parts = gather([progress.done[item.subject, item.number] for item in mine])
            if parts is not None:
                by_key = {key_of(record): record for part in parts for record in part}
                records = [by_key[item.subject, item.number] for item in self.items]
                progress.join(records)
                self._finish(records, say, time.monotonic() - started)

    def _answer(self, waiting: Sequence[Item], progress: Progress, *, bar: bool, done: int, of: int) -> None:
        asked = scoring.Answering(self.task, self.engine, self.prompter, self.writing, self.models)
        each = len(self.models)
        with tqdm(
            total=of * each,
            initial=done * each,
            desc=self.task.name,
            unit="answer",
            disable=not bar,
            dynamic_ncols=True,
        ) as shown:
            for subject, group in itertools.groupby(waiting, key=lambda item: item.subject):
                shown.set_postfix_str(subject if subject != self.task.name else "", refresh=False)
                rest = list(group)
                together = _WRITTEN_TOGETHER if scoring.is_written(rest[0], self.writing) else _SCORED_TOGETHER
                while rest:
                    now, rest = rest[:together], rest[together:]
                    answered = asked.answers(now, shown.update)
                    progress.add([_record(item, answers) for item, answers in zip(now, answered, strict=True)])

    def _settings(self) -> dict[str, Any]:
        """What decides the answers; an earlier evaluation is continued only where all of it is the same."""
        config, model = self.config, self.model
        written = any(scoring.is_written(item, self.writing) for item in self.items)
        adapters = {"tuned": model.lora_load} if model.lora_load else {}
        content = hashlib.sha256("".join(item.fingerprint for item in self.items).encode()).hexdigest()
        return {
            "task": self.task.name,
            "items": len(self.items),
            "items_sha256": content,
            "models": self.models,
            "load": model.load,
            "load_fingerprint": fingerprint(model.load),
            "adapters": {name: [path, fingerprint(path)] for name, path in (adapters | model.adapters()).items()},
            "tokenizer": model.tokenizer_name_or_path,
            "dtype": model.dtype,
            "prompt_type": model.prompt_type,
            "hf_chat_template": model.hf_chat_template,
            "max_length": self.engine.max_length,
            "scoring": config.scoring,
            "add_eos_token": list(model.add_eos_token) if written else None,
            "max_new_tokens": self.writing.max_new_tokens if written else None,
            "sampling": dataclasses.asdict(self.writing.sampling) if written else None,
            **({"grammar": GRAMMAR} if written else {}),
        }

    def _finish(self, records: Sequence[Record], say: Say, seconds: float) -> None:
        rows = results.tallies(records, {item.subject: item.category for item in self.items})
        total, main = rows[-1], self.models[1 if BASE in self.models and len(self.models) > 1 else 0]
        say(results.table(rows, main))
        for name in self.models:
            if BASE in self.models and name != BASE:
                say(results.comparison(rows, name))
        for name in self.models:  # programs look for "acc = " in the log: it says one number, that of the tuned model
            says = f"{total.right[name]}/{total.items}={total.share(name):.6f}"
            say(f"{self.task.title} acc = {says}" if name == main else f"{self.task.title} {name} accuracy: {says}")
        cut = sum(any(answer.get("cut") for answer in record["models"].values()) for record in records)
        if cut:
            say(
                f"warning: {cut} of {len(records)} prompts were longer than the {self.engine.max_length} tokens there "
                "is room for and lost their beginning: give fewer --num-shots, or a larger --max-length"
            )
        results.write_csv(rows, self.folder / "results.csv")
        values = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "results": [row.as_json() for row in rows],
            "prompts_cut": cut,
            "settings": self.settings,
            "flags": {type(each).__name__: dataclasses.asdict(each) for each in (self.config, self.model)},
            **self.facts,
            "versions": versions(),
        }
        with replacing_file(self.folder / "results.json") as temporary:
            temporary.write_text(to_json(values, indent=1) + "\n", encoding="utf-8")
        counts = {len(item.choices) for item in self.items}
        chance = 1 / counts.pop() if len(counts) == 1 and counts != {0} else None
        title = f"{self.task.name}, {len(records)} questions" + (f"; {self.model.load}" if self.model.load else "")
        chart.draw(rows, title, self.folder / "accuracy.png", chance=chance)
        say(f"results.csv, results.json, items.jsonl and accuracy.png are in {self.folder}")
        say(f"{self.task.name.upper()} Running Time:, {seconds:.1f} s")


def _record(item: Item, answers: Mapping[str, scoring.Answer]) -> Record:
    return {
        "subject": item.subject,
        "number": item.number,
        "prompt": item.fingerprint,
        "answer": item.answer,
        "models": {name: answer.as_json() for name, answer in answers.items()},
    }


def versions() -> dict[str, str]:
    """Of this program, Python and the libraries that compute."""
    found = {"modellink_lora": __version__, "python": platform.python_version()}
    for name in ("torch", "megatron-core", "transformers", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
