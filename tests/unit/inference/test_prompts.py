"""Prompt files and flags of the logits job: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modellink_lora.config.errors import UserError
from modellink_lora.config.logits import LogitsConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.device.cpu import CpuDevice
from modellink_lora.inference.prompt_file import read_prompts


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_a_text_file_holds_a_prompt_on_each_line_that_is_not_blank(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.txt", "one\n\n  zwei\n三\n".encode())) == ["one", "  zwei", "三"]


def test_a_json_prompt_may_have_several_lines(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.json", b'["a\\nb", "c"]')) == ["a\nb", "c"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.json", b'["a"', "not valid JSON"),
        ("p.json", b'{"a": "b"}', "expected (list|str), got|must be a JSON list of texts"),
        ("p.json", b'["a", 1]', "expected (list|str), got|must be a JSON list of texts"),
        ("p.json", b'["a", ""]', "expected (list|str), got|must be a JSON list of texts"),
    ],
)
def test_other_files_are_refused_by_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    "prompt_file, output, flag",
    [("p.csv", "x.safetensors", "--prompt-file"), ("p.txt", "x.pt", "--output")],
)
def test_names_that_do_not_say_their_format_are_refused(prompt_file: str, output: str, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        LogitsConfig(load="mg", prompt_file=prompt_file, output=output)


def test_interleaved_stages_are_for_training() -> None:
    from modellink_lora.inference.logits import prompt_logits

    config = LogitsConfig(load="base", prompt_file="prompts.txt", output="out.safetensors", prompt_type="default")
    layout = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    with pytest.raises(UserError, match="interleaves the stages of training"):
        prompt_logits(config, layout, device=CpuDevice(), torch_device=torch.device("cpu"))
