"""A pretended GPU: all tensor code runs on it on any machine, and what a real one refuses, it refuses.

    with pretended_gpu() as gpu:
        model.to("cuda")
        ...

A tensor "on" it is a ``PretendedTensor``, which says ``cuda:0`` of itself and keeps its numbers in a CPU tensor inside;
whatever PyTorch does with it comes through ``__torch_dispatch__``, where places are compared by CUDA's rules:

- tensors of one operation are on one device; a CPU tensor without dimensions may mix in where operations are
  elementwise, and CPU tensors may be the indices in ``x[indices]`` of a tensor on the GPU (but not the reverse);
- ``.to``, ``.cpu``, ``copy_`` copy; ``.numpy()`` refuses; ``item``, ``tolist``, ``nonzero`` and masks wait for the GPU;
- a copy that does not block is not there before an event or stream is waited for: until then its place on the CPU
  holds NaN (or the largest integer), and pinned memory that it reads may not change;
- an operation that PyTorch has on CPUs alone is refused.

PyTorch's own ``FakeTensor`` has no numbers, and fails at ``x[0]`` in builds without CUDA; a backend under PrivateUse1
would have another name than ``cuda``, so the code that asks for that name would not run.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import PreTrainedModel

GPU = torch.device("cuda", 0)
MEMORY = 2**33  # bytes, which it says it has
ATEN = torch.ops.aten
# Beside the elementwise ones, operations that take a CPU tensor without dimensions as the value they fill in.
FILLING = {ATEN.masked_fill, ATEN.masked_fill_, ATEN.fill, ATEN.fill_, ATEN.where, ATEN.index_put, ATEN.index_put_}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_}
# What must know numbers, so that the CPU waits for the GPU.
WAITING = {
    *(ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.bincount, ATEN.is_nonzero),
    *(ATEN._unique2, ATEN.unique_consecutive, ATEN.unique_dim, ATEN.repeat_interleave, ATEN.allclose),
}


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        wrapped = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        wrapped.inner = inner
        return wrapped

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().dispatch(function, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, s: Any) -> None:
        """Memory here is not used again while a stream works on it."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendedTensor({self.inner!r})"


class PretendedStream:
    """Work that was given to the GPU in order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = GPU
        self.given, self.pending = 0, []  # so many copies in all; (number, how it ends) of those not waited for

    def synchronize(self) -> None:
        self.finish(self.given)

    def finish(self, upto: int) -> None:
        """End the copies whose number is at most ``upto``."""
        while self.pending and self.pending[0][0] <= upto:
            self.pending.pop(0)[1]()

    def wait_event(self, event: PretendedEvent) -> None:
        """Work on the GPU waits for work on the GPU: the order of calls is one that keeps to that."""

    def wait_stream(self, stream: PretendedStream) -> None:
        """As ``wait_event``."""

    def record_event(self, event: PretendedEvent | None = None) -> PretendedEvent:
        event = event or PretendedEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self.pending


class PretendedEvent:
    """A mark in a stream; its time is a count of seconds that grows by one with every mark."""

    marks = 0

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing, self.stream, self.at, self.time = enable_timing, None, 0, 0

    def record(self, stream: PretendedStream | None = None) -> None:
        self.stream = stream or _current().stream
        self.at = self.stream.given
        PretendedEvent.marks += 1
        self.time = PretendedEvent.marks

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.finish(self.at)

    def wait(self, stream: PretendedStream | None = None) -> None:
        """As ``PretendedStream.wait_event``."""

    def query(self) -> bool:
        self.synchronize()  # it was quick
        return True

    def elapsed_time(self, later: PretendedEvent) -> float:
        """In milliseconds."""
        assert self.enable_timing and later.enable_timing, "Both events must be created with argument 'enable_timing'."
        return 1000.0 * (later.time - self.time)


class PretendedGPU:
    """What happens on the pretended GPU.

    Attributes
    ----------
    stream : the current one.
    ran : how often each operation ran there, by its name.
    waits : the operations for which the CPU waited for the GPU, in order.
    """

    def __init__(self) -> None:
        self.default_stream = self.stream = PretendedStream()
        self.ran: Counter[str] = Counter()
        self.waits: list[str] = []
        self._pinned: dict[int, Tensor] = {}  # by the address of their memory, which is kept so that it stays theirs

    def dispatch(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one of PyTorch's operations where its arguments, or ``device=``, say."""
        packet, name = function.overloadpacket, function._schema.name
        if function._can_decompose():  # in inference mode, which leaves that to us
            with _EveryOperation():
                return function.decompose(*args, **kwargs)
        if packet is ATEN._to_copy:
            return self._converted(function, args, kwargs)
        if packet is ATEN.copy_:
            return self._copied(*args, **kwargs)
        if packet is ATEN._pin_memory:
            return self._pin(args[0].clone())
        if packet is ATEN.is_pinned:
            return not isinstance(args[0], PretendedTensor) and self._is_pinned(args[0])
        if packet is torch.ops.prim.device:
            return GPU
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(isinstance(tensor, PretendedTensor) for tensor in tensors)
        pin = bool(kwargs.pop("pin_memory", False))
        asked = kwargs.get("device")
        if on_gpu:
            _check_places(function, args, kwargs)
            self.ran[name] += 1
            if packet in WAITING or (packet in INDEXING and _has_mask(args[1])):
                self._wait_for(name)
        if asked is not None and not _is_meta(asked):
            to_gpu = torch.device(asked).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        else:
            to_gpu = on_gpu
        if to_gpu:
            _check_kernel(function)
        if function is ATEN.mm.dtype:  # GPUs alone sum products of half precision in single precision
            result = ATEN.mm(_inner(args[0]).to(args[2]), _inner(args[1]).to(args[2]))
        else:
            result = function(*_inner(args), **_inner(kwargs))
        if pin:
            return self._pin(result)
        return _rewrapped(function, result, args, kwargs) if to_gpu else result

    def _converted(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        source: Tensor = args[0]
        asked = kwargs.pop("device", None)
        from_gpu = isinstance(source, PretendedTensor)
        to_gpu = from_gpu if asked is None else torch.device(asked).type == "cuda"
        if asked is not None and _is_meta(asked):
            return function(*_inner(args), **kwargs, device=asked)
        blocks = not kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        converted = function(*_inner(args), **kwargs)
        if from_gpu and not to_gpu:
            self.ran["copy to the CPU"] += 1
            if blocks:
                self._wait_for("copy to the CPU")
                return converted
            return self._arrives_later(self._pin(converted))
        if to_gpu and not from_gpu:
            self._leaves(source, blocks)
        return PretendedTensor(converted) if to_gpu else converted

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        from_gpu, to_gpu = isinstance(source, PretendedTensor), isinstance(target, PretendedTensor)
        later = from_gpu and not to_gpu and non_blocking and self._is_pinned(target)
        if from_gpu and not to_gpu and not later:
            self._wait_for("copy to the CPU")
        if to_gpu and not from_gpu and source.device.type == "cpu":
            self._leaves(source, not non_blocking)
        ATEN.copy_(_inner(target), _inner(source))
        if later:
            self._arrives_later(target)
        return target

    def _arrives_later(self, target: Tensor) -> Tensor:
        """``target`` on the CPU, which holds its numbers only when the copy is waited for."""
        numbers = target.clone()
        target.fill_(torch.nan if target.is_floating_point() else torch.iinfo(target.dtype).max)
        self._give(lambda: target.copy_(numbers))
        return target

    def _leaves(self, source: Tensor, blocks: bool) -> None:
        """``source`` is read for the GPU: later, where it is pinned and nobody waits."""
        self.ran["copy to the GPU"] += 1
        if blocks or not self._is_pinned(source):
            return
        numbers = source.clone()

        def arrive() -> None:
            if not torch.equal(numbers.nan_to_num(), source.nan_to_num()):
                raise RuntimeError("pinned memory was written before its copy to the GPU was done")

        self._give(arrive)

    def _give(self, end: Callable[[], Any]) -> None:
        self.stream.given += 1
        self.stream.pending.append((self.stream.given, end))

    def _wait_for(self, name: str) -> None:
        self.waits.append(name)
        self.stream.synchronize()

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


class _EveryOperation(TorchDispatchMode):
    """Sees the operations of no tensor on the GPU, too: those that make one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().dispatch(function, args, dict(kwargs or {}))


class _NumberedDevices(TorchFunctionMode):
    """Says ``cuda:0`` where ``cuda`` is said: PyTorch would ask its missing CUDA which one that is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.to, Tensor.cuda):
            args = tuple(_numbered(argument) for argument in args)
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        if function is Tensor.cuda:
            return args[0].to(GPU, *args[2:], **{n: v for n, v in kwargs.items() if n != "device"})
        return function(*args, **kwargs)


def _numbered(device: Any) -> Any:
    if isinstance(device, (str, torch.device)) and str(device) == "cuda":
        return GPU
    return device


_active: list[PretendedGPU] = []


def _current() -> PretendedGPU:
    assert _active, "a tensor on the pretended GPU lives inside pretended_gpu() alone"
    return _active[-1]


def _inner(arguments: Any) -> Any:
    return tree_map_only(PretendedTensor, lambda tensor: tensor.inner, arguments)


def _is_meta(device: Any) -> bool:
    return torch.device(device).type == "meta"


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _check_places(function: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError where CUDA would: tensors on two devices that may not mix."""
    packet = function.overloadpacket
    if packet in INDEXING:
        target, indices = args[:2]
        if not isinstance(target, PretendedTensor):
            if any(isinstance(index, PretendedTensor) for index in indices):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            args = (target, *args[2:])
        args = (target, *args[2:])  # where the indices of a tensor there are does not matter
    written = [
        leaf
        for argument, given in _by_argument(function, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(given)
    ]
    may_mix = torch.Tag.pointwise in function.tags or packet in FILLING
    for tensor in tree_leaves((args, kwargs)):
        if not isinstance(tensor, Tensor) or isinstance(tensor, PretendedTensor):
            continue
        if may_mix and tensor.dim() == 0 and not any(tensor is other for other in written):
            continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
            f"{tensor.device}! (in {function})"
        )


def _by_argument(function: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for number, argument in enumerate(function._schema.arguments):
        if not argument.kwarg_only and number < len(args):
            yield argument, args[number]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _rewrapped(function: Any, result: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result on the GPU; what was written is the argument itself, and not another tensor on its numbers."""
    written = [
        leaf
        for argument, given in _by_argument(function, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(given)
        if isinstance(leaf, PretendedTensor)
    ]
    for tensor in written:
        assert tensor.shape == tensor.inner.shape, f"{function} changes a shape in place, which is not pretended here"

    def wrap(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        for given in written:
            if given.inner is tensor:
                return given
        return PretendedTensor(tensor)

    # What is seen of a tensor made outside inference mode is such a one, too.
    seen = [given for argument, given in _by_argument(function, args, kwargs) if argument.alias_info is not None]
    outside = any(isinstance(tensor, Tensor) and not tensor.is_inference() for tensor in seen)
    with torch.inference_mode(torch.is_inference_mode_enabled() and not outside):
        return tree_map(wrap, result)


@functools.cache
def _only_on_cpus() -> frozenset[str]:
    """The operations, ``name.overload``, that have a kernel for CPUs and none for GPUs."""
    import torchgen

    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    names = set()
    for entry in entries:
        keys = {key.strip() for keys in entry.get("dispatch") or {} for key in keys.split(",")}
        if "CPU" in keys and not keys & {"CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd"}:
            names.add(entry["func"].split("(")[0])
    return frozenset(names)


def _check_kernel(function: Any) -> None:
    """Raise NotImplementedError where PyTorch has no kernel of an operation for GPUs."""
    name = f"{function._schema.name.removeprefix('aten::')}.{function._overloadname}".removesuffix(".default")
    if function.namespace == "aten" and name in _only_on_cpus():
        raise NotImplementedError(f"Could not run 'aten::{name}' with arguments from the 'CUDA' backend.")


@contextmanager
def _guard_for_cuda() -> Iterator[None]:
    """PyTorch asks a device's guard before it indexes; a build without CUDA has none: the one that does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    before = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def _loading_by_way_of_the_cpu() -> Iterator[None]:
    """transformers loads in threads of its own, in which there is no pretended GPU: a model moves when it is loaded."""
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def loading(cls: type[PreTrainedModel], *args: Any, device_map: Any = None, **kwargs: Any) -> PreTrainedModel:
        places = set((device_map or {}).values()) if isinstance(device_map, dict) else set()
        loaded = from_pretrained(cls, *args, **kwargs)
        return loaded.to(places.pop()) if places else loaded

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(loading)):
        yield


def _at_once(_: Executor, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
    """As ``Executor.submit``, in this thread: there is no pretended GPU in others."""
    future: Future = Future()
    try:
        future.set_result(work(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future


def _stand_ins(gpu: PretendedGPU) -> dict[str, Any]:
    """What ``torch.cuda`` has in a pretended GPU's place."""

    @contextmanager
    def stream_in_force(stream: PretendedStream | None) -> Iterator[None]:
        before, gpu.stream = gpu.stream, stream or gpu.stream
        try:
            yield
        finally:
            gpu.stream = before

    properties = SimpleNamespace(
        name="Pretended GPU", total_memory=MEMORY, major=9, minor=0, multi_processor_count=100, uuid="0"
    )
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.stream.synchronize(),
        "set_device": lambda device: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "Event": PretendedEvent,
        "Stream": PretendedStream,
        "current_stream": lambda device=None: gpu.stream,
        "default_stream": lambda device=None: gpu.default_stream,
        "stream": stream_in_force,
    }


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Inside, ``cuda`` is a pretended GPU, in this thread; where there is a real one, too."""
    gpu = PretendedGPU()
    lifted = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(_guard_for_cuda())
        for name, stand_in in _stand_ins(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes it on the CPU and copies
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        # A module's parameters are replaced when it moves: their data cannot become a tensor of another class.
        overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwritten)
        stack.enter_context(_loading_by_way_of_the_cpu())
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _at_once))
        _active.append(gpu)
        stack.callback(_active.pop)
        stack.enter_context(_NumberedDevices())
        stack.enter_context(_EveryOperation())
        yield gpu
