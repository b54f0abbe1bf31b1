"""Where a tuned model was taught to stop, written into the files beside its weights.

Other programs stop at eos_token_id of generation_config.json and at the tokenizer's eos_token, and ask with the
tokenizer's chat_template; all three are the base's own until they are fitted to the template of the training. Ids,
vocabulary and weights are not touched.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.companions import companions as companions_of
from modellink_lora.checkpoint.companions import copy_companions
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.document import parse_document, read_document, to_json
from modellink_lora.config.errors import UserError
from modellink_lora.data.chat_template import Ending, best_chat_template, differences, ending_of
from modellink_lora.data.generation_stops import generation_stops
from modellink_lora.data.templates import TEMPLATES, Template, get_template
from modellink_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
CHAT, OLD_CHAT, MORE_CHAT = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
# files of a tokenizer, among those beside the weights
_TOKENIZER_FILES = re.compile(
    r"(tokeni[sz]|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|tekken|chat_template|"
    r"additional_chat_templates/).*|.*\.(model|tiktoken)"
)

Document = dict[str, Any]


@dataclass(frozen=True)
class Taught:
    """Where answers end, and how the files beside the weights change to say so.

    Args:
        lines: what the user is told.
        by: what says so.
        files: name -> new text; None: the file is left out.
        tokenizer_class: of transformers.
    """

    lines: tuple[str, ...] = ()
    by: str = ""
    ending: Ending = field(default_factory=Ending)
    files: Mapping[str, str | None] = field(default_factory=dict)
    tokenizer_class: str = ""

    @contextlib.contextmanager
    def beside(self, companions: Path | None) -> Iterator[Path | None]:
        """A folder with the files of `companions` as they are to be; `companions` itself where nothing changes."""
        if companions is None or not self.files:
            yield companions
            return
        with tempfile.TemporaryDirectory(prefix="modellink_lora_") as name:
            copy_companions(companions, Path(name))
            for file, text in self.files.items():
                path = Path(name) / file
                if text is None:
                    path.unlink(missing_ok=True)
                else:
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(text, encoding="utf-8")
            yield Path(name)

    def write_tokenizer(self, companions: Path, target: Path) -> None:
        """Write the tokenizer and its chat templates into `target`, a folder without a model."""
        with self.beside(companions) as folder:
            assert folder is not None
            for name in sorted({TOKENIZER, *filter(_TOKENIZER_FILES.fullmatch, companions_of(folder))}):
                text = (folder / name).read_bytes() if (folder / name).is_file() else b"{}"
                if name == TOKENIZER:
                    text = _naming_its_class(text, self.tokenizer_class)
                with replacing_file(target / name) as temporary:
                    temporary.write_bytes(text)


def taught(companions: Path, prompt_type: str, *, trust_remote_code: bool) -> Taught:
    """How the files in `companions`, those of a base, change for a model trained with the template `prompt_type`.

    Raises:
        UserError: no such template, or the tokenizer is missing, damaged, of another model, or code that may not run.
    """
    template = get_template(prompt_type)
    tokenizer = load_tokenizer(companions, prompt_type=prompt_type, trust_remote_code=trust_remote_code)
    ending, files = ending_of(template, tokenizer), _Files(companions)
    ends = _fit_ends(files, ending, tokenizer)
    chat, *warnings = _fit_chat_template(files, template, tokenizer)
    by = f"--prompt-type {prompt_type}"
    line = f"note: answers end with {_in_words(ending)} ({by}); {ends}; {chat}"
    loaded = _reloaded(files, trust_remote_code)
    if words := [word for word in template.stop_words if word not in loaded.get_added_vocab()]:
        files.make_special(words)
        loaded = _reloaded(files, trust_remote_code)
    _check_end(ending, loaded)
    if differences(template, loaded, None) != differences(template, tokenizer, files.changed.get(CHAT)):
        raise UserError(f"{companions}: transformers does not take the chat template from {CHAT}")
    return Taught((line, *warnings), by, ending, files.changed, type(tokenizer).__name__)


def taught_by_tokenizer(companions: Path, folder: Path, *, trust_remote_code: bool) -> Taught:
    """The same for an adapter that has the tokenizer it was trained with in its `folder`, as many of PEFT do.

    Raises:
        UserError: one of the tokenizers cannot be loaded, or they have different vocabularies.
    """
    tokenizer, own = (load_tokenizer(place, trust_remote_code=trust_remote_code) for place in (folder, companions))
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(own):
        raise UserError(f"{folder}: its tokenizer has another vocabulary than the one of the base")
    ending, files = Ending(tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.eos_token), _Files(companions)
    ends = _fit_ends(files, ending, tokenizer)
    chat, former = _named(tokenizer.chat_template), _named(own.chat_template)
    said = "chat_template stays the base's own"
    if chat != former and "default" in chat:
        files.set_chat_template(chat.pop("default"), _as_former(former) | chat)
        said = "chat_template is that of the same tokenizer"
    _check_end(ending, _reloaded(files, trust_remote_code))
    by = f"the tokenizer in {folder}"
    line = f"note: answers end with {_in_words(ending)} ({by}); {ends}; {said}"
    return Taught((line,), by, ending, files.changed, type(tokenizer).__name__)


def fit_endings(
    convert: ConvertConfig, adapter: Adapter | None, companions: Path | None, say: Callable[[str], None]
) -> Taught:
    """What changes in the files beside the weights, which are in `companions`, and say it. Never fails a conversion."""
    prompt_type, folder = _said_by(convert, adapter)
    if prompt_type is None and folder is None:
        if adapter:
            say(f"note: {adapter.folder} does not say which template it was trained with: end tokens and chat template "
                "stay the base's; --prompt-type gives those of a template")  # fmt: skip
        return Taught()
    try:
        found = _found(convert, prompt_type, folder, companions)
    except UserError as error:
        by = f"--prompt-type {prompt_type} does" if prompt_type else f"the tokenizer in {folder} says"
        say(f"warning: the model was taught to end answers as {by}, but the files that tell other programs stay the "
            f"base's, because the tokenizer cannot be fitted to it: {_reason(error)}")  # fmt: skip
        return Taught()
    for line in found.lines:
        say(line)
    return found


def tell_stop(
    convert: ConvertConfig, adapter: Adapter | None, companions: Path | None, say: Callable[[str], None], *, how: str
) -> Taught | None:
    """Name the token that ends answers, for a result that cannot say it itself. What may go along; None if unknown.

    Args:
        how: what to do with the token.
    """
    prompt_type, folder = _said_by(convert, adapter)
    if prompt_type is None and folder is None:
        if adapter:
            say(f"note: {adapter.folder} does not say which template it was trained with, and so not which token ends "
                "its answers; --prompt-type names it")  # fmt: skip
        return None
    try:
        found = _found(convert, prompt_type, folder, companions)
    except UserError as error:
        template = TEMPLATES.get(prompt_type or "")
        token = template.stop_words[0] if template and template.replace_eos else "the eos token of its tokenizer"
        say(f"note: answers end with {token} ({f'--prompt-type {prompt_type}' if prompt_type else folder}): {how}; "
            f"neither its id nor tokenizer and chat template are given, because {_reason(error)}")  # fmt: skip
        return None
    say(f"note: answers end with {_in_words(found.ending)} ({found.by}): {how}")
    for line in found.lines[1:]:
        say(line)
    return found


def _said_by(convert: ConvertConfig, adapter: Adapter | None) -> tuple[str | None, Path | None]:
    """Name of the template, else the adapter's folder if it has a tokenizer; UserError for a flag without template."""
    if convert.prompt_type is not None:
        get_template(convert.prompt_type)
    prompt_type = adapter.meta.prompt_type if adapter else convert.prompt_type
    brings = adapter is not None and prompt_type is None and (adapter.folder / TOKENIZER).is_file()
    return prompt_type, adapter.folder if adapter and brings else None


def _found(convert: ConvertConfig, prompt_type: str | None, folder: Path | None, companions: Path | None) -> Taught:
    if companions is None:
        raise UserError("no --load-dir with config.json and a tokenizer is there")
    if prompt_type is not None:
        return taught(companions, prompt_type, trust_remote_code=convert.trust_remote_code)
    assert folder is not None
    return taught_by_tokenizer(companions, folder, trust_remote_code=convert.trust_remote_code)


def _reason(error: UserError) -> str:
    return str(error).removeprefix("--tokenizer-name-or-path ")


def _in_words(ending: Ending) -> str:
    if ending.token_id is not None:
        return f"{ending.token} (id {ending.token_id})"
    if ending.text:
        return f"the text {to_json(ending.text)}, which is no single token: give it as a stop text"
    return "nothing of the template's own"


class _Files:
    """The documents of a model folder, and those of them that change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed: dict[str, str | None] = {}

    def read(self, name: str) -> Document | None:
        if text := self.changed.get(name):
            return parse_document(text, dict[str, Any], where=name)
        return read_document(self.folder / name, dict[str, Any]) if (self.folder / name).is_file() else None

    def update(self, name: str, document: Document) -> None:
        if document != self.read(name):
            self.changed[name] = to_json(document, indent=2) + "\n"

    def set_ends(self, end: int, tokenizer: Any) -> list[int]:
        """Add `end` to the ids that end an answer, and give the folder the eos_token of `tokenizer`; those ids."""
        settings, special = self.read(TOKENIZER) or {}, self.read(TOKENS_MAP)
        own = {_content(document.get("eos_token")) for document in (settings, special or {})} - {""}
        vocabulary = tokenizer.get_vocab()
        ends = [end, *generation_stops(self.folder), *(vocabulary[token] for token in own if token in vocabulary)]
        ends = list(dict.fromkeys(ends))
        config, generation = self.read(CONFIG) or {}, self.read(GENERATION)
        if generation is None:
            ids = ("bos_token_id", "pad_token_id")
            generation = {name: config[name] for name in ids if config.get(name) is not None}
        if set(ends) != set(_ids(generation.get("eos_token_id"))):
            generation.pop("_from_model_config", None)  # older versions of transformers then ask config.json instead
            self.update(GENERATION, {**generation, "eos_token_id": ends})
        stated = config.get("eos_token_id")
        if config and end not in _ids(stated):
            # llama.cpp's converter reads a number only, and a list where it was one stays one
            self.update(CONFIG, {**config, "eos_token_id": ends if isinstance(stated, list) else end})
        if own != {tokenizer.eos_token}:
            self.update(TOKENIZER, {**settings, "eos_token": tokenizer.eos_token})
            if special is not None:
                self.update(TOKENS_MAP, {**special, "eos_token": tokenizer.eos_token})
        return ends

    def make_special(self, words: Sequence[str]) -> None:
        """Have `words` taken as tokens that are in the vocabulary, but not among those cut out of a text."""
        settings = self.read(TOKENIZER) or {}
        # version 4 of transformers takes no list under the newer name
        newer = isinstance(settings.get("extra_special_tokens"), list)
        key = "extra_special_tokens" if newer else "additional_special_tokens"
        self.update(TOKENIZER, {**settings, key: [*(settings.get(key) or []), *words]})

    def set_chat_template(self, text: str, others: Mapping[str, str]) -> None:
        """Make `text` the chat template, and `others` the further ones, by name."""
        for path in (self.folder / MORE_CHAT).glob("*"):
            self.changed[f"{MORE_CHAT}/{path.name}"] = None
        self.changed |= {f"{MORE_CHAT}/{name}.jinja": other for name, other in others.items()}
        self.changed[CHAT] = text
        if (self.folder / OLD_CHAT).is_file():
            self.changed[OLD_CHAT] = None
        # llama.cpp's converter prefers this key to the file
        settings = self.read(TOKENIZER) or {}
        self.update(TOKENIZER, {key: value for key, value in settings.items() if key != "chat_template"})


def _fit_chat_template(files: _Files, template: Template, tokenizer: Any) -> Iterator[str]:
    """Make the chat template that of the training unless it gives the same ids; what was done, and warnings."""
    own = tokenizer.chat_template
    if own and not differences(template, tokenizer, None)[0]:
        yield "chat_template stays the base's own, which gives the ids of the template"
        return
    best = best_chat_template(template, tokenizer)
    others = _as_former(_named(own))
    files.set_chat_template(best.text, others)
    beside = f", the base's own is kept as {MORE_CHAT}/{', '.join(others)}.jinja" if others else ""
    yield f"chat_template is that of the template{beside}"
    if best.differing:
        yield (
            f"warning: in {best.differing} of {best.tried} conversations tried, the chat template gives other ids than "
            f"training with --prompt-type {template.name}: it is tokenised as one text, and this tokenizer joins what "
            "training keeps apart; inference.py and its server give the ids of training"
        )


def _fit_ends(files: _Files, ending: Ending, tokenizer: Any) -> str:
    """Make `ending` an end token of the folder; what was done."""
    if ending.token_id is None:
        return "end tokens stay the base's"
    ends = files.set_ends(ending.token_id, tokenizer)
    return f"eos_token_id {ends} in {GENERATION}, eos_token {tokenizer.eos_token} of the tokenizer"


def _named(templates: Any) -> dict[str, str]:
    """The chat templates of a tokenizer by name; an only one is called default."""
    return dict(templates) if isinstance(templates, dict) else {"default": templates} if templates else {}


def _as_former(templates: Mapping[str, str]) -> dict[str, str]:
    """Names of `templates` under which none is taken unasked, as default and tool_use are."""
    return {re.sub(r"[^\w.-]", "_", f"base_{name}").removesuffix("_default"): text for name, text in templates.items()}


def _reloaded(files: _Files, trust_remote_code: bool) -> Any:
    """The tokenizer that the changed files make."""
    with Taught(files=files.changed).beside(files.folder) as folder:
        assert folder is not None
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def _check_end(ending: Ending, loaded: Any) -> None:
    if ending.token_id not in (None, loaded.eos_token_id):
        raise UserError(f"transformers takes {loaded.eos_token} as the end token, whatever {TOKENIZER} says")


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _content(token: Any) -> str:
    """The text of a token as tokenizer_config.json writes it: the text, or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _naming_its_class(text: bytes, name: str) -> bytes:
    """tokenizer_config.json for a folder without the config.json by which transformers would find the class."""
    document = parse_document(text, dict[str, Any], where=TOKENIZER)
    if document.get("tokenizer_class") or document.get("auto_map"):
        return text
    # the name that version 5 of transformers gave to its class for any tokenizer.json is unknown to version 4
    name = "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name
    return to_json({**document, "tokenizer_class": name}, indent=2).encode() + b"\n"
