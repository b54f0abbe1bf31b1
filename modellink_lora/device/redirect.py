"""The one place that changes third-party modules: makes megatron-core, written for CUDA, run on CPU and NPU.

Every `megatron.core.*` module gets a stand-in for the name `torch` in which `torch.cuda` is the device's own interface
and factories called with `device="cuda"` build on the device. The real `torch` module stays as it is, so
`torch.cuda.is_available()` remains honest for every other library. Two methods cannot be reached that way and are
changed for callers inside megatron.core only. The files are those of every version that was tried.

| redirected                           | because of, among others                                                |
|--------------------------------------|-------------------------------------------------------------------------|
| torch.cuda.current_device            | rotary_pos_embedding.py, mappings.py, p2p_communication.py              |
| torch.cuda.synchronize, empty_cache  | p2p_communication.py, timers.py                                         |
| torch.cuda streams, events, nvtx     | param_and_grad_buffer.py, timers.py, moe/token_dispatcher.py            |
| torch.cuda rng functions, tracker    | tensor_parallel/random.py                                               |
| factories with device="cuda"         | schedules.py, clip_grads.py, optimizer.py                               |
| Tensor.type() without arguments      | clip_grads.py, optimizer.py compare with "torch.cuda.*Tensor"           |
| Tensor.cuda()                        | language_module.py (tied embeddings over pipeline stages)               |
| rotary embedding, where asked for    | rope_utils.py goes to the device's own operator                         |
| torch.compile                        | jit.py makes it the fuser; a compile of many seconds for tiny gains     |
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from modellink_lora.config.errors import UserError
from modellink_lora.megatron.versions import check_version, installed

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "as_tensor",
              "empty_like", "zeros_like", "ones_like", "full_like")  # fmt: skip

# Imported before the stand-in is handed out, so that a later lazy import finds nothing unprepared.
_MODULES = (
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.tensor_parallel.random",
)
_REPLACED = ("_get_cuda_rng_state", "_set_cuda_rng_state", "CudaRNGStatesTracker")  # of tensor_parallel.random


@dataclass(frozen=True)
class Redirect:
    """What stands for CUDA: a device type, an object for `torch.cuda`, and how tensors get there."""

    device_type: str
    cuda: Callable[[], Any]  # called at install time, when the device library is loaded
    own_tracker: bool  # the default CPU generator is the device's: megatron's tracker would warn at every fork


def install(redirect: Redirect, *, rotary: Callable[..., torch.Tensor] | None = None) -> None:
    """Give every imported megatron-core module the stand-in. Calling again covers modules imported since.

    Args:
        rotary: (x [s, b, n, d], angles, interleaved=, reference=) -> x turned, in place of megatron-core's.
    Raises:
        UserError: megatron-core is missing, of a version that was not tried, or lacks what is replaced.
    """
    check_version()
    import torch._inductor.config as inductor  # seconds, which megatron-core spends on it in any case

    inductor.compile_threads = 1  # nothing is compiled; yet torch 2.7 starts a worker for every core at once
    for name in _MODULES:
        importlib.import_module(name)
    if hasattr(torch.compiler, "set_stance"):
        torch.compiler.set_stance("force_eager")
    cuda = redirect.cuda()
    stand_in = _stand_in(redirect, cuda)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            vars(module)["torch"] = stand_in
    _redirect_random(redirect, cuda)
    _redirect_tensor_methods(redirect)
    if rotary is not None:
        _redirect_rotary(rotary)


class _Overlay(types.ModuleType):
    """A module that answers some names itself and asks `below` for all others."""

    def __init__(self, below: Any, names: dict[str, Any]) -> None:
        super().__init__(getattr(below, "__name__", "overlay"))
        vars(self)["_below"] = below
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_below"], name)


def _stand_in(redirect: Redirect, cuda: Any) -> _Overlay:
    def here(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def build(*args: Any, **kwargs: Any) -> Any:
            if torch.device(kwargs.get("device") or "cpu").type == "cuda":
                kwargs["device"] = cuda.current_device()
                kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return build

    return _Overlay(torch, {"cuda": cuda, **{name: here(getattr(torch, name)) for name in _FACTORIES}})


def _redirect_random(redirect: Redirect, cuda: Any) -> None:
    import megatron.core.tensor_parallel.random as random

    missing = [name for name in _REPLACED if not hasattr(random, name)]
    if missing:  # an assignment would create the name, and CUDA would be called all the same
        raise UserError(
            f"megatron-core {installed()} in {random.__file__} has no {missing[0]}, which has to be replaced for "
            f"{redirect.device_type}: install megatron-core anew from a release that docs/versions.md lists"
        )
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: cuda.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: cuda.set_rng_state(state)
    if redirect.own_tracker and not hasattr(random.CudaRNGStatesTracker, "on_default_generator"):
        random.CudaRNGStatesTracker = _default_generator_tracker(random)


def _default_generator_tracker(random: Any) -> type:
    class Tracker(random.CudaRNGStatesTracker):  # type: ignore[name-defined,misc]
        """Named random states on the CPU's default generator."""

        on_default_generator = True

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            generator = torch.default_generator
            outside = generator.get_state()
            generator.set_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = generator.get_state()
                generator.set_state(outside)

    return Tracker


def _redirect_tensor_methods(redirect: Redirect) -> None:
    if getattr(torch.Tensor.type, "redirected", False):
        return
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def megatron_calls() -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core.")

    @functools.wraps(original_type)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if not args and not kwargs and megatron_calls():
            return "torch.cuda." + answer.rsplit(".", 1)[1]
        return answer

    @functools.wraps(original_cuda)
    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(redirect.device_type) if megatron_calls() else original_cuda(self, *args, **kwargs)

    tensor_type.redirected = True  # type: ignore[attr-defined]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = tensor_cuda  # type: ignore[method-assign,assignment]


def _redirect_rotary(rotary: Callable[..., torch.Tensor]) -> None:
    import megatron.core.models.common.embeddings.rope_utils as rope

    original = getattr(rope._apply_rotary_pos_emb_bshd, "__wrapped__", rope._apply_rotary_pos_emb_bshd)

    @functools.wraps(original)
    def turned(
        t: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        def plain(x: torch.Tensor) -> Any:
            return original(x, freqs, rotary_interleaved, *args, **kwargs)

        # whatever else it is told (another order of channels, a factor) changes the result
        if any(value for value in (*args, *kwargs.values()) if value is True or value != 1.0):
            return plain(t)
        return rotary(t, freqs, interleaved=rotary_interleaved, reference=plain)

    rope._apply_rotary_pos_emb_bshd = turned


class _Stream:
    """A stream or event of a device on which everything has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...

    def nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = nothing

    def record_event(self, *args: Any, **kwargs: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True


def _cpu_cuda() -> _Overlay:
    generator = torch.default_generator

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    state = {
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
        "manual_seed": lambda seed: generator.manual_seed(seed),
    }
    return _Overlay(
        torch.cuda,
        {
            **state,
            "random": _Overlay(torch.cuda.random, state),
            "nvtx": _Overlay(torch.cuda.nvtx, {"range_push": nothing, "range_pop": nothing}),
            "current_device": lambda: torch.device("cpu"),
            "synchronize": nothing,
            "empty_cache": nothing,
            "set_device": nothing,
            "current_stream": _Stream,
            "default_stream": _Stream,
            "Stream": _Stream,
            "Event": _Stream,
            "stream": lambda stream: contextlib.nullcontext(),
        },
    )


def _npu_cuda() -> _Overlay:
    npu = torch.npu  # type: ignore[attr-defined]

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    state = {
        "get_rng_state": lambda device="cuda": npu.get_rng_state(),  # its own default would be "npu"
        "set_rng_state": lambda state, device="cuda": npu.set_rng_state(state),
    }
    return _Overlay(
        npu,
        {
            **state,
            "random": _Overlay(npu.random, state),
            "nvtx": _Overlay(torch.cuda.nvtx, {"range_push": nothing, "range_pop": nothing}),
        },
    )


CPU = Redirect("cpu", _cpu_cuda, own_tracker=True)
NPU = Redirect("npu", _npu_cuda, own_tracker=False)
