"""Reading Megatron's pickled rank files without running what is in them: only what is listed here is constructed."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from modellink_lora.config.errors import UserError


class Inert:
    """Stands in for an object of a library that is not needed to read weights; it holds nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_npu_tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, npu_info: Any = None
) -> torch.Tensor:
    """What torch_npu stores for a tensor of an Ascend device: a torch tensor plus the chip's memory format."""
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)


# numpy 1 and 2 keep these two functions in modules of different names; values know their own.
_NUMPY: dict[str, Any] = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}

_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("argparse", "Namespace"): Namespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): Inert,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", name): found for core in ("core", "_core") for name, found in _NUMPY.items()},
    **{("builtins", t.__name__): t for t in (set, frozenset, complex, bytearray, slice, list, dict, tuple, int, float,
                                             bool, str, bytes)},
}  # fmt: skip
# Members of args or of optimizer state that come from these libraries are of no use here.
_INERT_LIBRARIES = (
    "megatron", "modellink", "mindspeed", "mindspeed_llm", "ascendspeed", "torch_npu", "transformer_engine", "apex",
    "signal", "pathlib",
)  # fmt: skip


class RestrictedUnpickler(pickle.Unpickler):
    """pickle.Unpickler with an allow-list."""

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # pickle protocol 2, which torch.save writes
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "torch_npu" and name == "_rebuild_npu_tensor":
            return _rebuild_npu_tensor
        if module == "_codecs" and name == "encode":
            return _encode_latin1
        if module == "builtins" and name == "getattr":
            return _member
        if module.split(".")[0] in _INERT_LIBRARIES:
            return Inert
        raise UserError(f"contains {module}.{name}, which weights do not need: the file is refused unread")


def _member(owner: Any, name: str) -> Inert:
    """What Python 3.11.2 and its neighbours store for a member of an enum: getattr(class, name)."""
    if not (isinstance(owner, type) and issubclass(owner, Inert)):
        raise UserError(f"contains getattr of {name!r}, which weights do not need: the file is refused unread")
    return owner(name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """numpy spells bytes as _codecs.encode(text, 'latin1'); other codecs have no business here."""
    if encoding != "latin1":
        raise UserError(f"contains _codecs.encode with {encoding!r}, which weights do not need: the file is refused")
    return text.encode("latin1")


# What torch.load expects of a pickle module; it looks at the name as well.
_PICKLE_MODULE = SimpleNamespace(
    __name__=__name__,
    Unpickler=RestrictedUnpickler,
    load=lambda file, **kwargs: RestrictedUnpickler(file, **kwargs).load(),
)


def load_rank_file(path: Path) -> dict[str, Any]:
    """The top-level dictionary of a `model_optim_rng.pt`, tensors mapped from disk.

    Raises UserError when the file is damaged or contains anything that is not on the allow-list.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _dictionary(_load(path, path, mmap=True), path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a `.bin` or `.pt` file that holds a state_dict and nothing else.

    Raises UserError when the file is damaged or contains anything else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or contains something which weights do not need: it is refused") from None
    except Exception as error:  # torch and pickle raise a dozen types for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, cut short or not a file of tensors alone ({reason})") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UserError(f"{path}: expected a dictionary of tensors alone")
    return {str(name): tensor for name, tensor in found.items()}


def load_common_state(data: bytes, path: Path) -> dict[str, Any]:
    """The dictionary that `data`, found in `path`, holds in a list of one. Raises UserError as `load_rank_file`."""
    document = _load(io.BytesIO(data), path)
    return _dictionary(document[0] if isinstance(document, list) and len(document) == 1 else document, path)


def _load(source: Any, path: Path, **options: Any) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=False, pickle_module=_PICKLE_MODULE, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # torch and pickle raise a dozen types for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, cut short or not a checkpoint ({reason})") from None


def _dictionary(document: Any, path: Path) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}, expected the dictionary of a Megatron checkpoint")
    return document
