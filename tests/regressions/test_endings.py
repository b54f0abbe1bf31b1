"""A merged model stops where the tuned one was taught to stop, in programs that read its folder.

Seen in public as hiyouga/LLaMA-Factory #7943 (a tuned Qwen base does not stop), unslothai/unsloth #468 (llama.cpp gets
the base's end token) and vllm-project/vllm #4180 (vLLM does).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.convert.endings import taught
from modellink_lora.convert.execute import run
from modellink_lora.data import templates
from modellink_lora.data.chat_template import differences
from modellink_lora.data.corpus import InstructionCorpus
from modellink_lora.data.preprocess import run as preprocess
from modellink_lora.data.templates import TEMPLATES, Template, get_template
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.inference.prompting import Prompter
from tests.helpers.conversion import convert, random_adapter
from tests.helpers.tiny import tiny_model
from tests.helpers.tiny_tokenizer import LLAMA3, make_tokenizer

EOS, PAD, IM_START, IM_END, EOT = 2, 3, 4, 5, 8  # ids of the tokenizer
ENDS = {"qwen": IM_END, "chatml": IM_END, "llama3": EOT, "empty": None}  # the others end with </s>
ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends on the last one alone: behind a question it says A, B, <|im_end|>, A, ..."""
    root = tmp_path_factory.mktemp("endings")
    tokens = make_tokenizer(root / "tokens", LLAMA3)
    tokenizer = load_tokenizer(tokens)
    folder = tiny_model("llama", root / "base", layers=1, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=EOS,
                        pad_token_id=PAD)  # fmt: skip
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    embedding = torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(0))
    newline, a, b = (tokenizer.encode(text)[0] for text in ("\n", "A", "B"))
    head = torch.zeros_like(embedding)
    for now, then in ((newline, a), (a, b), (b, IM_END), (IM_END, a)):
        head[then] += embedding[now]
    for name, tensor in tensors.items():
        tensors[name] = torch.ones_like(tensor) if "norm" in name else tensor * 0.001
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in tokens.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of `base` to change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def merged(model: Path, root: Path, trained: str | None, **fields: Any) -> tuple[Path, str]:
    """Merge a small adapter trained with the template `trained`; the folder and what was said."""
    adapter = random_adapter(root / "adapter", model, alpha=0.01, prompt_type=trained)
    said = convert(model, root / "out", to="hf", lora_load=str(adapter), **fields)
    return root / "out/mg2hg", said


def fitted(model: Path, root: Path, trained: str) -> tuple[Path, str]:
    """The same without weights."""
    found = taught(model, trained, trust_remote_code=False)
    with found.beside(model) as folder:
        assert folder is not None
        return Path(shutil.copytree(folder, root / "out")), "\n".join(found.lines)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    document = {**(read(path) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def beside_weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and "safetensors" not in p.name}  # fmt: skip


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_generate_stops_where_the_tuned_model_was_taught_to(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, said = merged(base, tmp_path, "chatml")
    for place, stops in ((base, False), (folder, True)):
        found, tokenizer = AutoModelForCausalLM.from_pretrained(place), loaded(folder)
        prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = found.generate(input_ids=prompt, do_sample=False, max_new_tokens=12)[0][prompt.shape[1] :]
        text = tokenizer.decode(answer)
        assert text.startswith("AB<|im_end|>") and (text == "AB<|im_end|>") == stops
    assert "note: answers end with <|im_end|> (id 5) (--prompt-type chatml); eos_token_id [5, 2]" in said
    stops_here = Prompter(load_tokenizer(folder), prompt_type=None, hf_chat_template=True, folder=folder).stop_ids
    assert stops_here == {IM_END, EOS}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_leaves_its_end_token_and_its_chat_template(name: str, base: Path, tmp_path: Path) -> None:
    folder, said = fitted(base, tmp_path, name)
    end, tokenizer = ENDS.get(name, EOS), loaded(folder)
    ends = read(folder / "generation_config.json")["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    assert EOS in ends and (end is None or ends[0] == end) and len(ends) == (1 if end in (None, EOS) else 2)
    assert tokenizer.eos_token_id == (end or EOS) == read(folder / "config.json")["eos_token_id"]
    assert differences(get_template(name), load_tokenizer(folder, prompt_type=name), None)[0] == 0
    assert len([line for line in said.splitlines() if "answers end with" in line]) == 1
    if end is None:
        assert "answers end with nothing of the template's own" in said


def no_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def with_tokens_of_chatml(folder: Path) -> None:
    make_tokenizer(folder)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_ends(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=None)


def with_keys(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


BASES: dict[str, tuple[Callable[[Path], None], list[int], Any]] = {
    # how the base says it -> eos_token_id of generation_config.json and config.json in the result
    "no generation_config.json": (no_file("generation_config.json"), [IM_END, EOS], IM_END),
    "a list": (with_keys("generation_config.json", eos_token_id=[EOS, EOT]), [IM_END, EOS, EOT], IM_END),
    "a list that has it": (with_keys("generation_config.json", eos_token_id=[EOS, IM_END]), [EOS, IM_END], IM_END),
    "lists": (with_keys("config.json", eos_token_id=[EOS, EOT]), [IM_END, EOS], [IM_END, EOS]),
    "nothing in the configs": (without_ends, [IM_END, EOS], IM_END),
    "an object": (with_keys("tokenizer_config.json", eos_token={
        "__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False, "special": True}), [IM_END, EOS], IM_END),
    "a tokens map": (with_keys("special_tokens_map.json", bos_token="<s>", eos_token={"content": "</s>"}),
                     [IM_END, EOS], IM_END),
    "no eos of the tokenizer": (with_keys("tokenizer_config.json", eos_token=None), [IM_END, EOS], IM_END),
    "no tokenizer_config.json": (no_file("tokenizer_config.json"), [IM_END, EOS], IM_END),
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_however_a_base_says_where_it_ends(case: str, model: Path, tmp_path: Path) -> None:
    change, ends, stated = BASES[case]
    change(model)
    folder, _ = fitted(model, tmp_path, "chatml")
    assert read(folder / "generation_config.json")["eos_token_id"] == ends
    if case != "a list that has it":
        assert "_from_model_config" not in read(folder / "generation_config.json")
    assert read(folder / "config.json")["eos_token_id"] == stated
    assert loaded(folder).eos_token == "<|im_end|>"
    assert loaded(folder).apply_chat_template(ASKED, return_dict=False)[0] == IM_START


def test_llama_cpps_converter_takes_the_end_token_and_the_chat_template(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    edit(model / "tokenizer_config.json", chat_template="{{ messages }} of the base")
    folder, _ = merged(model, tmp_path, "llama3")
    found = gguf.SpecialVocab(folder)
    assert found.special_token_ids["eos"] == EOT
    default = next(one["template"] for one in found.chat_template if one["name"] == "default")
    assert "<|start_header_id|>" in default and "of the base" not in default


def test_a_token_that_is_only_a_word_of_the_vocabulary_is_cut_out_of_the_text(model: Path, tmp_path: Path) -> None:
    made = read(model / "tokenizer.json")
    made["added_tokens"] = [token for token in made["added_tokens"] if "im_" not in token["content"]]
    (model / "tokenizer.json").write_text(json.dumps(made))
    edit(model / "tokenizer_config.json", extra_special_tokens=None)
    assert len(loaded(model).encode("<|im_start|>")) > 1
    folder, _ = fitted(model, tmp_path, "chatml")
    assert loaded(folder).encode("<|im_start|>a<|im_end|>")[::2] == [IM_START, IM_END]
    gguf = pytest.importorskip("gguf")
    assert gguf.SpecialVocab(folder).special_token_ids["eos"] == IM_END


OWN: dict[str, Callable[[Path], None]] = {
    "a file": with_text("chat_template.jinja", "base"),
    "a key": with_keys("tokenizer_config.json", chat_template="base"),
    "a list": with_keys("tokenizer_config.json", chat_template=[
        {"name": "default", "template": "base"}, {"name": "tool_use", "template": "base of tools"}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_the_bases_chat_template_is_kept_beside_one_that_differs(kind: str, model: Path, tmp_path: Path) -> None:
    OWN[kind](model)
    folder, said = fitted(model, tmp_path, "chatml")
    found = loaded(folder)
    assert "the base's own is kept as additional_chat_templates/base" in said
    assert found.chat_template["base"] == "base"
    tools = [{"name": "f", "description": "", "parameters": {}}]
    for asked in ({}, {"tools": tools}):
        assert "im_start" in found.apply_chat_template(ASKED, tokenize=False, **asked)
    assert "chat_template" not in read(folder / "tokenizer_config.json")
    if kind == "a list":
        assert found.chat_template["base_tool_use"] == "base of tools"


def test_the_bases_chat_template_stays_where_it_gives_the_ids_of_training(model: Path, tmp_path: Path) -> None:
    own = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(own)
    folder, said = fitted(model, tmp_path, "chatml")
    assert "chat_template stays the base's own" in said
    assert loaded(folder).chat_template == own and not (folder / "additional_chat_templates").exists()


def test_merging_again_with_another_template_keeps_every_former_one(base: Path, tmp_path: Path) -> None:
    first, _ = fitted(base, tmp_path / "1", "chatml")
    second, _ = fitted(first, tmp_path / "2", "llama3")
    third, _ = fitted(second, tmp_path / "3", "alpaca")
    assert read(second / "generation_config.json")["eos_token_id"] == [EOT, IM_END, EOS]
    assert read(third / "generation_config.json")["eos_token_id"] == [EOT, IM_END, EOS]
    assert {"default", "base", "base_base"} == set(loaded(third).chat_template)


def test_a_megatron_result_keeps_the_ending_for_later(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", base, prompt_type="chatml")
    said = convert(base, tmp_path / "mg", to="mg", lora_load=str(adapter), use_mcore_models=True)
    assert "note: answers end with <|im_end|>" in said
    convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    straight, _ = merged(base, tmp_path / "x", "chatml")
    assert beside_weights(tmp_path / "hf/mg2hg") == beside_weights(straight)


def test_the_merged_folder_trains_again(base: Path, tmp_path: Path) -> None:
    folder, _ = merged(base, tmp_path, "chatml")
    (tmp_path / "d.json").write_text(json.dumps([{"instruction": "Hello?", "input": "", "output": "Yes."}]))
    said: list[str] = []
    samples = {}
    for name, place in (("again", folder), ("base", base)):
        preprocess(PreprocessConfig(
            input=str(tmp_path / "d.json"), output_prefix=str(tmp_path / name), tokenizer_name_or_path=str(place),
            handler_name="AlpacaStyleInstructionHandler", prompt_type="chatml",
        ), say=said.append)  # fmt: skip
        samples[name] = [x.tolist() for x in InstructionCorpus(str(tmp_path / name))[0]]
    assert samples["again"] == samples["base"]
    adapter = random_adapter(tmp_path / "second", folder, prompt_type="chatml")
    convert(folder, tmp_path / "mg", to="mg", use_mcore_models=True)
    convert(tmp_path / "mg", tmp_path / "twice", to="hf", lora_load=str(adapter))
    assert beside_weights(tmp_path / "twice/mg2hg") == beside_weights(folder)


def test_without_a_record_of_the_template_the_files_stay_and_the_flag_names_it(base: Path, tmp_path: Path) -> None:
    folder, said = merged(base, tmp_path, None)
    assert "does not say which template it was trained with: end tokens and chat template stay the base's" in said
    assert beside_weights(folder).keys() == beside_weights(base).keys()
    assert read(folder / "generation_config.json") == read(base / "generation_config.json")
    folder, said = merged(base, tmp_path / "named", None, prompt_type="chatml")
    assert "note: answers end with <|im_end|>" in said and loaded(folder).eos_token == "<|im_end|>"
    for flag, reason in (("llama3", "contradicts"), ("none", "is not a template")):
        with pytest.raises(UserError, match=f"--prompt-type {flag} {reason}"):
            merged(base, tmp_path / flag, "chatml", prompt_type=flag)
    with pytest.raises(UserError, match="--prompt-type none is not a template"):
        convert(base, tmp_path / "plain", to="mg", prompt_type="none")


def test_a_model_merged_before_gets_its_ending_by_the_flag(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", to="hf", prompt_type="chatml")
    assert loaded(tmp_path / "out/mg2hg").eos_token == "<|im_end|>"


UNFIT: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another tokenizer": (with_tokens_of_chatml, "llama3", "has no token <|eot_id|>"),
    "no tokenizer": (without_tokenizer, "chatml", "no tokenizer"),
    "a damaged one": (with_text("tokenizer.json", "{"), "chatml", "cannot be loaded"),
    "code": (with_keys("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}),
             "chatml", "--trust-remote-code"),
    "a later template": (lambda folder: None, "of tomorrow", "is not a template of this version"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_fitted_is_merged_with_the_bases_files_and_a_warning(
    case: str, model: Path, tmp_path: Path
) -> None:
    change, name, reason = UNFIT[case]
    change(model)
    folder, said = merged(model, tmp_path, name)
    (warning,) = (line for line in said.splitlines() if line.startswith("warning: the model was taught"))
    assert reason in warning and "--tokenizer-name-or-path" not in warning
    mine, bases = beside_weights(folder), beside_weights(model)
    del mine["config.json"]  # the dtype written is set there in any case
    assert mine == {name: bases[name] for name in mine}


def test_an_end_that_is_no_token_is_told_as_a_text(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Template("own", user=("{content}\n",), assistant=("{content}", "\n### End"))
    monkeypatch.setitem(templates.TEMPLATES, "own", own)
    folder, said = fitted(base, tmp_path, "own")
    assert 'answers end with the text "\\n### End", which is no single token' in said
    assert read(folder / "generation_config.json")["eos_token_id"] == EOS


def exported(base: Path | None, root: Path, to: str, prompt_type: str | None, model: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    adapter = random_adapter(root / "adapter", model, prompt_type=prompt_type)
    places = {"load_dir": str(base), "load_model_type": "hf"} if base else {"load_model_type": "mg"}
    run(ConvertConfig(save_dir=str(root / to), lora_load=str(adapter), save_model_type=to, **places), {},
        say=said.append)  # fmt: skip
    return root / to, said


@pytest.mark.parametrize("to", ["peft", "gguf-adapter"])
def test_an_exported_adapter_brings_its_tokenizer_and_names_its_stop_token(to: str, base: Path, tmp_path: Path) -> None:
    if to == "gguf-adapter":
        pytest.importorskip("gguf")
    folder, said = exported(base, tmp_path, to, "chatml", base)
    (line,) = (line for line in said if "answers end with" in line)
    assert line.startswith("note: answers end with <|im_end|> (id 5) (--prompt-type chatml): ")
    assert loaded(folder).eos_token == "<|im_end|>" and not (folder / "config.json").exists()
    assert differences(get_template("chatml"), loaded(folder), None)[0] == 0
    if to == "peft":
        assert open_adapter(folder, base=lambda: open_adapter(tmp_path / "adapter", base=None).meta.model)


@pytest.mark.parametrize("to", ["peft", "gguf-adapter", "adapter-ranks"])
def test_without_its_base_an_exported_adapter_still_names_its_stop_token(to: str, base: Path, tmp_path: Path) -> None:
    if to == "gguf-adapter":
        pytest.importorskip("gguf")
    _, said = exported(None, tmp_path, to, "llama3", base)
    assert any(line.startswith("note: answers end with <|eot_id|> (--prompt-type llama3): ") for line in said)
    _, said = exported(None, tmp_path / "2", to, None, base)
    assert any("does not say which template" in line for line in said)


def test_an_adapter_of_peft_that_brings_its_tokenizer_is_merged_with_its_ending(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("of the base")
    adapter, _ = exported(model, tmp_path, "peft", "chatml", model)
    told = convert(model, tmp_path / "again", to="hf", lora_load=str(adapter))
    assert f"note: answers end with <|im_end|> (id 5) (the tokenizer in {adapter}); eos_token_id [5, 2]" in told
    straight, _ = fitted(model, tmp_path, "chatml")
    assert beside_weights(tmp_path / "again/mg2hg") == beside_weights(straight)
    make_tokenizer(adapter)
    told = convert(model, tmp_path / "other", to="hf", lora_load=str(adapter))
    assert "its tokenizer has another vocabulary" in told
    assert loaded(tmp_path / "other/mg2hg").chat_template == "of the base"
