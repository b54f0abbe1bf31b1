"""What a model folder holds beside its weights, and which of it goes along when the model is converted or merged.

Tokenizers come in many files, some of them the publisher's Python or a vocabulary of an unusual name, so everything is
taken that is not weights. Nothing of it is executed or looked into here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
    ".npy", ".tflite", ".pkl", ".pickle", ".distcp", ".tar", ".zip", ".gz", ".tmp", ".incomplete", ".lock", ".ot",
    ".nemo", ".pdparams",
)  # fmt: skip
# README: a model card describes the base and its scores, not what it becomes. adapter_*: transformers would load it.
_NOT_TAKEN = (
    "*.index.json", "*.index.*.json", "*.ckpt.*", "consolidated*", "adapter_*", "README*", "merge_report.json",
    "trainer_state.json",
)  # fmt: skip
# files that are read wherever a link leads; people link one tokenizer into several model folders
_READ_BY_NAME = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json", "tekken.json",
}  # fmt: skip
_FOLDERS = ("additional_chat_templates",)  # of the subfolders, which transformers reads
_LARGEST = 256 << 20  # bytes; the largest vocabularies have a tenth of it


def companions(folder: Path) -> list[str]:
    """Names, relative to `folder`, of the files beside the weights; config.json is one of them."""
    places = [folder, *(folder / name for name in _FOLDERS if (folder / name).is_dir())]
    found = [path for place in places for path in place.iterdir() if _is_companion(path, folder)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files beside the weights of a model folder, contents only; names of those found."""
    names = companions(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def _is_companion(path: Path, folder: Path) -> bool:
    if path.name.startswith(".") or path.name.lower().endswith(_WEIGHTS) or any(map(path.match, _NOT_TAKEN)):
        return False
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return False
    # links of files and of subfolders lead into the folder, or into the blobs of a download cache; any other may lead
    # to somebody's private file
    real = path.resolve()
    inside = real.is_relative_to(folder.resolve()) or real.parent.name == "blobs"
    return inside or (path.parent == folder and path.name in _READ_BY_NAME)
