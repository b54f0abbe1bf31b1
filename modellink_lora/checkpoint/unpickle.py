"""Reading pickled checkpoints without running what is in them: only what is listed here is constructed."""

from __future__ import annotations

import io
import pickle
import re
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from modellink_lora.checkpoint.archive import examine
from modellink_lora.checkpoint.pickle_limits import check_keys, check_size, container, some_bytes, text
from modellink_lora.config.errors import UserError


class Inert:
    """Stands in for an object of a library that is not needed to read weights; it holds nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numpy dtype of plain numbers. numpy's own takes a state from the pickle with which it reads foreign memory."""

    def __init__(self, name: Any, *args: Any) -> None:
        if not re.fullmatch(r"[<>|=]?[biufc?]\d*", text(name)):
            raise UserError(f"contains the numpy type {name!r}, which weights do not need: the file is refused unread")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: Any, data: Any) -> Any:
    if not (isinstance(kind, _Dtype) and isinstance(data, bytes)):
        raise UserError("contains a numpy number of no numpy type: the file is refused unread")
    return np.frombuffer(data, kind.dtype)[0]


def _rebuild_npu_tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, npu_info: Any = None
) -> Tensor:
    """What torch_npu stores for a tensor of an Ascend device: a torch tensor plus the chip's memory format."""
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("argparse", "Namespace"): Namespace,
    ("collections", "OrderedDict"): container(OrderedDict, pairs=True),
    ("collections", "defaultdict"): container(defaultdict, pairs=True),
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): Inert,
    ("_io", "BytesIO"): Inert,  # how Transformer Engine stores the scaling state of fp8 kernels
    ("numpy", "ndarray"): Inert,  # random states; nothing that is read from a checkpoint is a numpy array
    ("numpy", "dtype"): _Dtype,
    # numpy 1 and 2 keep these two in modules of different names
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Inert for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,  # torch 0.3
    **{("builtins", t.__name__): t for t in (complex, slice, int, float, bool)},
    **{("builtins", t.__name__): container(t) for t in (list, tuple)},
    **{("builtins", t.__name__): container(t, hashed=True) for t in (set, frozenset)},
    ("builtins", "dict"): container(dict, pairs=True),
    ("builtins", "str"): text,
    ("builtins", "unicode"): text,  # protocol 2 has the names of Python 2
    ("builtins", "long"): int,
    ("builtins", "bytes"): some_bytes,
    ("builtins", "bytearray"): some_bytes,
}  # fmt: skip
# Members of args or of optimizer state that come from these libraries are of no use here.
_INERT_LIBRARIES = (
    "megatron", "modellink", "mindspeed", "mindspeed_llm", "ascendspeed", "torch_npu", "transformer_engine", "apex",
    "signal", "pathlib",
)  # fmt: skip
_WITH_STATE = (dict, Namespace, Inert, _Dtype)  # what a pickle may give a state to


class RestrictedUnpickler(pickle._Unpickler):
    """pickle's unpickler with an allow-list.

    The one written in Python, whose steps can be overridden: a state is given to objects only, never to a class or a
    function, of which there is one for the whole process.
    """

    records: Mapping[str, int] | None = None  # sizes in bytes of an archive's records; None where there is no archive
    left: int = 0  # bytes that the storages still to come may have where there is no archive
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    stack: list[Any]  # in the steps below, what came after the last mark

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: set[str | int] = set()  # keys of storages

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

    def load_setitem(self) -> None:
        check_keys(self.stack[-2:-1], also=(Inert,))
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        check_keys(self.stack[::2], also=(Inert,))
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        check_keys(self.stack[::2], also=(Inert,))
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        check_keys(self.stack, also=(Inert,))
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        check_keys(self.stack, also=(Inert,))
        super().load_frozenset()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_build(self) -> None:
        owner = self.stack[-2]
        if not isinstance(owner, _WITH_STATE):
            name = getattr(owner, "__name__", type(owner).__name__)
            raise UserError(f"changes {name}, which weights do not need: the file is refused unread")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def load_binpersid(self) -> None:
        kind, element, key, _location, numel, *_view = self.stack[-1]
        check_keys([self.stack[-1][2:]])  # torch looks them up
        if kind != "storage" or not (isinstance(key, (str, int)) and isinstance(numel, int)):
            raise UserError("contains something else than storages of tensors: the file is refused unread")
        said = numel * (1 if element is torch.UntypedStorage else element.dtype.itemsize)
        if self.records is None:
            self.left -= 0 if key in self.seen else said
            self.seen.add(key)
            if said < 0 or self.left < 0:
                raise UserError("damaged: its tensors are said to have more bytes than the file")
        elif said != (held := self.records.get(f"data/{key}")):
            raise UserError(f"damaged: a tensor of {said} bytes is said to be in data/{key}, which has {held}")
        super().load_binpersid()  # type: ignore[misc]

    dispatch[pickle.BINPERSID[0]] = load_binpersid


def _member(owner: Any, name: str) -> Inert:
    """What Python 3.11.2 and its neighbours store for a member of an enum: getattr(class, name)."""
    if not (isinstance(owner, type) and issubclass(owner, Inert)):
        raise UserError(f"contains getattr of {text(name)!r}, which weights do not need: the file is refused unread")
    return owner(name)


def _encode_latin1(value: str, encoding: str) -> bytes:
    """numpy spells bytes as _codecs.encode(text, 'latin1'); other codecs have no business here."""
    if encoding != "latin1":
        raise UserError(
            f"contains _codecs.encode with {text(encoding)!r}, which weights do not need: the file is refused"
        )
    return text(value).encode("latin1")


def load_rank_file(path: Path) -> dict[str, Any]:
    """The top-level dictionary of a `model_optim_rng.pt`, tensors mapped from disk.

    Raises:
        UserError: the file is missing or damaged, or contains anything that is not on the allow-list.
    """
    return _dictionary(load(path), str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `pytorch_model.bin`, an `adapter_model.bin` or a `consolidated.NN.pth`.

    Mapped from disk; files of the format before torch 1.6 are read into memory. Raises UserError as `load_rank_file`.
    """
    document = _dictionary(load(path), str(path))
    if odd := [name for name, value in document.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise UserError(f"{path}: {odd[0]!r} is no named tensor; save the model's state_dict alone")
    return document


def load_common_state(data: bytes, path: Path) -> dict[str, Any]:
    """The dictionary that `data`, found in `path`, holds in a list of one. Raises UserError as `load_rank_file`."""
    document = load(data, where=str(path))
    return _dictionary(document[0] if isinstance(document, list) and len(document) == 1 else document, str(path))


def load(source: Path | bytes, *, where: str | None = None) -> Any:
    """What `torch.save` put into a file or into bytes, checksums compared. Raises UserError as `load_rank_file`.

    Args:
        where: the file that bytes come from.
    """
    where = where or str(source)
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"{source}: no such file")
    try:
        records = examine(source)
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        unpickler = type("Unpickler", (RestrictedUnpickler,), {"records": records, "left": size})
        # what torch.load expects of a pickle module; it looks at the name as well
        module = SimpleNamespace(__name__=__name__, Unpickler=unpickler, load=_note)
        opened = source if isinstance(source, Path) else io.BytesIO(source)
        mapped = isinstance(source, Path) and records is not None
        found = torch.load(opened, map_location="cpu", weights_only=False, pickle_module=module, mmap=mapped)
        check_size(found)
        return found
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # torch and pickle raise a dozen types for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: damaged, cut short or not a checkpoint ({reason})") from None


def _note(file: Any, **options: Any) -> Any:
    """What the older format keeps beside its tensors: numbers, the writer's system, the keys of its storages."""
    found = RestrictedUnpickler(file, **options).load()
    check_size(found)
    check_keys(found if isinstance(found, list) else ())
    return found


def _dictionary(document: Any, where: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise UserError(f"{where}: holds a {type(document).__name__}, expected the dictionary of a checkpoint")
    return document
