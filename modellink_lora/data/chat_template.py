"""A template as other programs read it: a Jinja chat template, and the token that ends an answer.

Training tokenises every slot on its own; other programs render one text and tokenise that. `best_chat_template` looks
for the text whose ids are those of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modellink_lora.config.document import to_json
from modellink_lora.data.prompt import Conversation, Message, encode_prompt
from modellink_lora.data.templates import NamedToken, Slot, Slots, Special, Template
from modellink_lora.data.text_encoder import TextEncoder

# `describe_tools` and `call_text` of data/tools.py in Jinja
_TOOLS = """\
{%- macro described(function) -%}
  {{- "> Tool Name: " ~ function["name"] ~ "\\nTool Description: " ~ (function["description"] or "") -}}
  {{- "\\nTool Args:\\n" -}}
  {%- set parameters = function["parameters"] or {} -%}
  {%- for name, about in (parameters["properties"] or {}).items() -%}
    {{- "  - " ~ name ~ " (" ~ (about["type"] or "any") -}}
    {%- if about["items"] and about["items"]["type"] -%}{{- " of " ~ about["items"]["type"] -}}{%- endif -%}
    {%- if name in (parameters["required"] or []) -%}{{- ", required" -}}{%- endif -%}
    {{- "): " ~ (about["description"] or "") -}}
    {%- if about["enum"] -%}{{- "; one of " ~ about["enum"] | tojson -}}{%- endif -%}
    {{- "\\n" -}}
  {%- endfor -%}
{%- endmacro -%}
{%- macro called(call) -%}
  {%- set function = call["function"] or call -%}
  {%- set given = function["arguments"] -%}
  {{- "Action: " ~ function["name"] ~ "\\nAction Input: " ~ (given if given is string else given | tojson) -}}
{%- endmacro -%}
{%- if tools -%}
  {%- set told = namespace(text="These tools can be called:\\n", names="") -%}
  {%- for tool in tools -%}
    {%- set function = tool["function"] or tool -%}
    {%- set told.text = told.text ~ described(function) -%}
    {%- set told.names = told.names ~ ("" if loop.first else ", ") ~ function["name"] -%}
  {%- endfor -%}
  {%- set told.text = told.text ~ "To call one, answer with exactly these two lines:\\nAction: the name of the tool,"
      ~ " one of " ~ told.names ~ "\\nAction Input: the arguments as one JSON object,"
      ~ " such as {\\"city\\": \\"Oslo\\", \\"days\\": 2}\\n" -%}
{%- endif -%}
"""

_CONVERSATION = """\
{%- set turn = namespace(system=DEFAULT_SYSTEM, first=true, asks=true) -%}
{%- for message in messages -%}
  {%- if message["role"] == "system" and message["content"] and loop.first -%}
    {%- set turn.system = message["content"] -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {%- if turn.system and turn.system[-1:] != "\\n" -%}{%- set turn.system = turn.system ~ "\\n" -%}{%- endif -%}
  {%- set turn.system = turn.system ~ told.text -%}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = message["role"] -%}
  {%- set content = message["content"] or "" -%}
  {%- if content is not string -%}{{- raise_exception("a message has text and nothing else") -}}{%- endif -%}
  {%- if role == "system" -%}
    {%- if not loop.first -%}
      {{- raise_exception("a conversation has one system message at most, and begins with it") -}}
    {%- endif -%}
  {%- elif role not in ["user", "tool", "observation", "assistant", "function"] -%}
    {{- raise_exception("no role is called " ~ role ~ ": choose system, user, assistant or tool") -}}
  {%- elif (role in ["user", "tool", "observation"]) != turn.asks -%}
    {{- raise_exception("messages must ask and answer in turn, beginning with a question") -}}
  {%- elif turn.asks -%}
    {%- if role == "user" -%}
QUESTION    {%- else -%}
RESULT    {%- endif -%}
    {%- if not loop.last or add_generation_prompt -%}{{- OPENING -}}{%- endif -%}
    {%- set turn.first = false -%}
    {%- set turn.asks = false -%}
  {%- else -%}
    {%- if message["tool_calls"] -%}
      {%- set calls = namespace(text=content) -%}
      {%- for call in message["tool_calls"] -%}
        {%- set calls.text = calls.text ~ ("\\n" if calls.text else "") ~ called(call) -%}
      {%- endfor -%}
      {%- set content = calls.text -%}
      {{- FUNCTION -}}
    {%- elif role == "function" -%}
      {{- FUNCTION -}}
    {%- else -%}
      {{- ASSISTANT -}}
    {%- endif -%}
    {%- set turn.asks = true -%}
  {%- endif -%}
{%- endfor -%}
"""

_TRIED_CONTENTS = ("What is 2 + 2?", "It is 4.", "And in Paris?", "(b) is right", "1, 2", "巴黎", "Thanks!", "Yes.")


@dataclass(frozen=True)
class Glue:
    """What stands before a slot of text where a tokenizer begins every text of its own with a space."""

    after_text: str = ""
    after_token: str = ""


_GLUES = tuple(Glue(after_text, after_token) for after_token in ("", " ") for after_text in ("", " "))


@dataclass(frozen=True)
class Ending:
    """What an answer ends with: a token, or a text that is no single token, or nothing."""

    token: str | None = None
    token_id: int | None = None
    text: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and in how many of the conversations tried it gives other ids than training."""

    text: str
    differing: int
    tried: int


def ending_of(template: Template, tokenizer: Any) -> Ending:
    """What training appends to an answer. The tokenizer was fitted to the template (`load_tokenizer`)."""
    place = next(i for i, slot in enumerate(template.assistant) if isinstance(slot, str) and "{content}" in slot)
    slot = template.assistant[place]
    assert isinstance(slot, str)
    behind = [end for end in (slot.partition("{content}")[2], *template.assistant[place + 1 :]) if end]
    if not behind:
        return Ending()
    text, first = _rendered(behind, tokenizer), behind[0]
    if isinstance(first, str):
        ids = tokenizer.encode(first, add_special_tokens=False)
        token, is_one = tokenizer.convert_ids_to_tokens(ids[0]), len(ids) == 1
        return Ending(token, ids[0], text) if is_one or token in tokenizer.get_added_vocab() else Ending(text=text)
    named = first.text if isinstance(first, NamedToken) else tokenizer.eos_token
    return Ending(named, tokenizer.convert_tokens_to_ids(named), text)


def best_chat_template(template: Template, tokenizer: Any) -> ChatTemplate:
    """The chat template of `template` whose ids under `tokenizer` differ the least from those of training."""
    found = []
    for glue in _GLUES:
        text = chat_template(template, tokenizer, glue)
        differing, tried = differences(template, tokenizer, text)
        if not differing:
            return ChatTemplate(text, 0, tried)
        found.append(ChatTemplate(text, differing, tried))
    return min(found, key=lambda one: one.differing)


def differences(template: Template, tokenizer: Any, text: str | None) -> tuple[int, int]:
    """In how many conversations the prompt of a chat template has other ids than that of training, and of how many.

    Args:
        text: the chat template; None is the tokenizer's own.
    """
    encoder = TextEncoder(tokenizer, split_special_tokens=True, template_text=template.text)
    differing = tried = 0
    for messages, conversation in _conversations():
        try:
            ids = tokenizer.apply_chat_template(
                messages, chat_template=text, add_generation_prompt=True, return_dict=False
            )
        except Exception:  # templates raise what they like
            ids = None
        differing += ids != encode_prompt(conversation, template, encoder)
        tried += 1
    return differing, tried


def _conversations() -> Iterator[tuple[list[dict[str, str]], Conversation]]:
    for system in ("", "Answer briefly."):
        for length in (1, 3, 7):
            roles = ("user", "assistant")
            turns = [Message(roles[i % 2], text) for i, text in enumerate(_TRIED_CONTENTS[:length])]
            first = [Message("system", system)] if system else []
            shown = [{"role": message.role, "content": message.content} for message in (*first, *turns)]
            yield shown, Conversation(tuple(turns), system)


def chat_template(template: Template, tokenizer: Any, glue: Glue = Glue()) -> str:  # frozen
    """`template` in Jinja: the messages of `data/prompt.py`, and tools as `data/tools.py` writes them.

    Special tokens are written by their text, so that another eos_token of the tokenizer changes nothing.
    """
    write = _Writer(template, tokenizer, glue)
    pieces = {
        "DEFAULT_SYSTEM": _quoted(template.default_system),
        "QUESTION": write.question(template.user),
        "RESULT": write.question(template.observation or template.user),
        "OPENING": _quoted(template.answer_opening),
        "FUNCTION": write.joined(template.function, after=template.user[-1:]),
        "ASSISTANT": write.joined(template.assistant, after=template.user[-1:]),
    }
    text = _CONVERSATION
    for name, piece in pieces.items():
        text = text.replace(name, piece)
    return f"{{#- --prompt-type {template.name} -#}}\n{_TOOLS}{text}"


@dataclass(frozen=True)
class _Writer:
    """Slots as Jinja expressions."""

    template: Template
    tokenizer: Any
    glue: Glue

    def question(self, asked: Slots) -> str:
        """Jinja that writes what stands before an answer: the three cases of `data/prompt.py`."""
        template = self.template
        opening = template.answer_opening
        last = asked[-1]
        assert isinstance(last, str) and last.endswith(opening), "the opening is the end of the question"
        asked = (*asked[:-1], last.removesuffix(opening))
        if template.system_inside_user:
            inside = "".join(slot for slot in template.system if isinstance(slot, str))
            content = self._text(inside, "turn.system") + " ~ content"
            with_system = self.joined((*template.prefix, *asked), content=f"({content})")
        else:
            before = self.joined((*template.prefix, *template.system), content="turn.system")
            with_system = f"{before} ~ {self.joined(asked, after=(*template.prefix, *template.system))}"
        later = self.joined((*template.separator, *asked), after=template.assistant)
        return (
            f"      {{%- if turn.first and turn.system -%}}{{{{- {with_system} -}}}}\n"
            f"      {{%- elif turn.first -%}}{{{{- {self.joined((*template.prefix, *asked))} -}}}}\n"
            f"      {{%- else -%}}{{{{- {later} -}}}}\n"
            "      {%- endif -%}\n"
        )

    def joined(self, slots: Slots, *, after: Slots = (), content: str = "content") -> str:
        """A Jinja expression of the text of `slots`, which stands behind the text of `after`."""
        parts, before = [], _rendered(after, self.tokenizer)
        for slot in slots:
            text = _rendered((slot,), self.tokenizer)
            if not text:
                continue
            if before and not self._begins_with_token(text):
                glue = self.glue.after_token if self._ends_with_token(before) else self.glue.after_text
                parts += [_quoted(glue)] if glue else []
            parts.append(self._text(text, content))
            before = text
        return " ~ ".join(parts) or '""'

    def _text(self, text: str, content: str) -> str:
        before, found, behind = text.partition("{content}")
        parts = [_quoted(before) if before else "", content if found else "", _quoted(behind) if behind else ""]
        return " ~ ".join(filter(None, parts)) or '""'

    def _begins_with_token(self, text: str) -> bool:
        return any(text.startswith(token) for token in self.tokenizer.get_added_vocab())

    def _ends_with_token(self, text: str) -> bool:
        return any(text.endswith(token) for token in self.tokenizer.get_added_vocab())


def _rendered(slots: Sequence[Slot], tokenizer: Any) -> str:
    """The text of `slots`, with `{content}` in its place and tokens by their text."""
    named: Mapping[Special, str | None] = {Special.BOS: tokenizer.bos_token, Special.EOS: tokenizer.eos_token}
    texts: Sequence[str | None] = [
        slot if isinstance(slot, str) else slot.text if isinstance(slot, NamedToken) else named[slot] for slot in slots
    ]
    return "".join(filter(None, texts))


def _quoted(text: str) -> str:
    """A string of Jinja, which knows the escapes of JSON."""
    return to_json(text)
