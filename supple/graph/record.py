"""One concrete run of a model, recorded as a list of operator calls.

The model is run for real, so control flow that looks at values takes the way that it takes in
use; a model on the meta device is run on fake tensors (shapes without data), which costs no
memory for weights.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from supple.errors import UnsupportedModelError
from supple.graph.integers import Attributes, Expression, Size, TracedInt

__all__ = ["Call", "ModuleCall", "Recording", "Ref", "output_tensors", "record", "refs"]

_TORCH = os.path.dirname(torch.__file__)
_SUPPLE = os.path.dirname(os.path.dirname(__file__))
_REFORMS = torch.Tag.inplace_view  # `transpose_` and the like give a tensor another shape
_LONGEST_LITERAL = 64
_LEAVING = frozenset({"numpy", "__array__", "__dlpack__", "tolist"})
_ASKING = _LEAVING | {"item", "__bool__", "__int__", "__float__", "__index__"}
_PATCHED = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


_numbers = itertools.count()  # of tensors; several recordings can be told apart


@dataclass(frozen=True)
class Ref:
    """A tensor of the recorded run.

    Attributes:
        id: Number of the tensor, by order of appearance.
        shape: Its shape.
        dtype: Its type.
        storage: Number of the memory it lies in; views share it.
        nbytes: Bytes of that memory.
    """

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    nbytes: int


@dataclass
class Call:
    """One ATen operator call.

    Attributes:
        op: The operator overload.
        args: Its positional arguments, tensors replaced by `Ref`.
        kwargs: Its keyword arguments, likewise.
        outputs: The tensors it returned.
        module: Path of the innermost module whose forward made the call.
        function: Name of the torch function that the model's code called.
        integers: The integers that the code passed to that function, in order; slices give
            their start and stop.
        where: File and line of the code, where integers were passed.
        freed: Storages that ceased to exist between this call and the next one.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Ref]
    module: str
    function: str
    integers: list[int | None]
    where: str
    freed: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The operator's name without overload, e.g. `aten::view`."""
        return str(self.op._schema.name)

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among the arguments, in order."""
        return refs((self.args, self.kwargs))


@dataclass
class ModuleCall:
    """One call of a module's forward: which operator calls it made, with what, giving what."""

    path: str
    first: int
    last: int
    inputs: list[Ref]
    outputs: list[Ref]
    depth: int


@dataclass
class Recording:
    """Everything seen during one run.

    Attributes:
        calls: Operator calls in order.
        modules: Module calls in order of their start.
        inputs: Tensors among the example inputs.
        outputs: Tensors that the model returned.
        tensors: Parameters and buffers: name of the first owner to its tensor.
        aliases: For every parameter and buffer name, the name of its first owner.
        equalities: Pairs of integer expressions that the code found equal.
        escapes: Tensors whose values left PyTorch, with how and where.
        decisions: Modules whose code asked for a value, with where.
        opaque: Modules that were run unobserved, with the reason.
        literals: Values of small index tensors that the code wrote out (`x[..., [-2], :]`).
        fake: Whether fake tensors were used.
        children: For modules that decide by values, the paths of their submodules (those in
            containers included), each with the names of its parameters.
    """

    calls: list[Call] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)
    tensors: dict[str, Ref] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    equalities: list[tuple[Expression, Expression]] = field(default_factory=list)
    literals: dict[int, list[int]] = field(default_factory=dict)
    escapes: list[tuple[Ref, str]] = field(default_factory=list)
    decisions: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    fake: bool = True
    children: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def refs(tree: Any) -> list[Ref]:
    """The tensors in nested containers, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Ref)]


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order; objects inside it (caches) are not looked into."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in output_tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in output_tensors(value)]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return output_tensors(list(vars(output).values()))
    return []


def record(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    fake: bool | None = None,
    standing_in: Mapping[str, nn.Module] | None = None,
) -> Recording:
    """Run `model` once in evaluation mode and record it.

    Args:
        model: Any module; its mode, attributes and weights are left as they were.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        standing_in: Modules that run in place of the model's own, by path.
        fake: Use fake tensors; None does so only for models on the meta device.

    Raises:
        UnsupportedModelError: The model's forward fails on the example inputs.
    """
    if fake is None:
        fake = any(tensor.is_meta for tensor in _owned_tensors(model).values())
    opaque: dict[str, str] = {}
    while True:
        recorder = _Recorder(fake, opaque)
        try:
            return _run(model, tuple(args), dict(kwargs or {}), recorder, standing_in or {})
        except Exception as error:  # whatever a forward may raise
            path = recorder.failed
            if fake or not path or path in opaque:
                raise _unsupported(model, error) from error
            raised = f"{type(error).__name__}: {str(error)[:200]}"
            opaque[path] = f"the module '{path}' cannot be recorded ({raised})"


def _unsupported(model: nn.Module, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the forward of {type(model).__name__} fails on the example inputs: "
        f"{type(error).__name__}: {error}; pass args and kwargs with which the model runs"
    )


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: _Recorder,
    standing_in: Mapping[str, nn.Module],
) -> Recording:
    fake = recorder.recording.fake
    collecting = gc.isenabled()
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        stack.callback(_restore_modes, training)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if not fake:
            copies: dict[int, Tensor] = {}
            args, kwargs = tree_map(lambda x: _cloned(x, copies), (args, kwargs))
            stack.callback(_restore_buffers, {b: b.detach().clone() for b in model.buffers()})
        if collecting:  # tensors in cycles would die whenever the collector happens to run
            gc.disable()
            stack.callback(gc.enable)
        model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(quiet("torch._subclasses.fake_tensor", "torch._subclasses"))
        tensors = _owned_tensors(model)
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            memo: dict[int, Tensor] = {}
            tensors = {name: _faked(mode, t, memo) for name, t in tensors.items()}
            args, kwargs = tree_map(lambda x: _faked(mode, x, memo), (args, kwargs))
            stack.enter_context(mode)
        recorder.start(tensors, (args, kwargs))
        recorder.attributes = stack.enter_context(Attributes(model))
        stack.enter_context(_python_functions_inlined())
        stack.enter_context(recorder.watching(_paths(model, standing_in)))
        if fake:
            # each module once: a tensor that is replaced under two names does not come back
            once = {_joined(path, n) for path, m in model.named_modules() for n in _stored(m)}
            named = {name: tensor for name, tensor in tensors.items() if name in once}
            output = functional_call(model, named, args, kwargs, tie_weights=False)
        else:
            output = model(*args, **kwargs)
    recorder.finish(output)
    for path in recorder.recording.decisions:
        recorder.recording.children[path] = dict(_children(model.get_submodule(path), path))
    return recorder.recording


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, list[str]]]:
    for name, child in module.named_children():
        below = _joined(path, name)
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child, below)
        else:
            yield below, [_joined(below, n) for n, _ in child.named_parameters()]


def _paths(model: nn.Module, standing_in: Mapping[str, nn.Module]) -> dict[int, str]:
    """The path of every module, by identity."""
    paths = {id(module): path for path, module in model.named_modules()}
    for path, other in standing_in.items():
        for inner, module in other.named_modules():
            paths[id(module)] = f"{path}.{inner}" if inner else path
    return paths


@torch.no_grad()
def _restore_buffers(before: dict[Tensor, Tensor]) -> None:
    for buffer, value in before.items():
        if buffer.shape == value.shape and not torch.equal(buffer, value):
            buffer.copy_(value)


def _cloned(value: Any, copies: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) not in copies:
        copies[id(value)] = value.detach().clone()
    return copies[id(value)]


def _restore_modes(training: dict[nn.Module, bool]) -> None:
    for module, mode in training.items():
        module.training = mode


def _owned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name, tied ones included."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        standing = vars(module)  # where a size is active: what the module sees of its tensors
        tensors.update(
            {
                _joined(path, name): standing[name]
                for name in _stored(module)
                if isinstance(standing.get(name), Tensor)
            }
        )
    return tensors


def _stored(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _faked(mode: FakeTensorMode, value: Any, memo: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) not in memo:
        device = "cpu" if value.is_meta else value.device
        with mode:
            memo[id(value)] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
    return memo[id(value)]


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence loggers that report what a kernel refuses; a refusal is an answer here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _python_functions_inlined() -> Iterator[None]:
    """Let torch functions written in Python run their bodies under the recorder.

    They would otherwise be handed over whole, and the integers inside them would be lost.
    """
    saved = []
    for module in (torch.nn.functional, torch.functional, torch._tensor):
        for name in _PATCHED:
            if hasattr(module, name):
                saved.append((module, name, getattr(module, name)))
                setattr(module, name, lambda *_: False)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


class _Recorder:
    """Numbers tensors, follows module calls and collects operator calls."""

    def __init__(self, fake: bool, opaque: Mapping[str, str]) -> None:
        self.recording = Recording(fake=fake, opaque=dict(opaque))
        self.failed = ""
        self.attributes: Attributes | None = None
        self._tensors: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._refs: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}
        self._storages: dict[int, tuple[Any, int]] = {}
        self._lasting: dict[int, tuple[Any, int]] = {}  # the model's own outlive the run
        self._next_storage = 0
        self._stack: list[ModuleCall] = []
        self.function, self.integers, self.where = "", list[int | None](), ""

    def start(self, tensors: dict[str, Tensor], inputs: Any) -> None:
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            owner = first.setdefault(id(tensor), name)
            self.recording.aliases[name] = owner
            if owner == name:
                self.recording.tensors[name] = self.ref(tensor)
        self._lasting, self._storages = self._storages, {}
        self._inputs = inputs  # the example inputs live as long as the run
        self.recording.inputs = [
            self.ref(t) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)
        ]

    def finish(self, output: Any) -> None:
        self.recording.outputs = [self.ref(t) for t in output_tensors(output)]
        self._inputs = None

    def ref(self, tensor: Tensor) -> Ref:
        known = self._refs.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        storage, nbytes = self._storage(tensor)
        ref = Ref(next(_numbers), tuple(map(int, tensor.shape)), tensor.dtype, storage, nbytes)
        self._refs[id(tensor)] = (weakref.ref(tensor), ref)
        return ref

    def reshaped(self, tensor: Tensor) -> Ref:
        """The tensor as it was: from now on it has another shape, and another number."""
        before = self.ref(tensor)
        del self._refs[id(tensor)]
        return before

    def _storage(self, tensor: Tensor) -> tuple[int, int]:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
            self._next_storage += 1
            return self._next_storage, tensor.numel() * tensor.element_size()
        key = storage._cdata
        known = self._lasting.get(key) or self._storages.get(key)
        if known is None or known[0].expired():
            self._next_storage += 1
            from torch.multiprocessing.reductions import StorageWeakRef

            reference: Callable[[torch.UntypedStorage], Any] = StorageWeakRef
            known = (reference(storage), self._next_storage)
            self._storages[key] = known
        return known[1], storage.nbytes()

    def freed(self) -> list[int]:
        """Storages that ceased to exist since the last question."""
        dead = [key for key, (reference, _) in self._storages.items() if reference.expired()]
        return [self._storages.pop(key)[1] for key in dead]

    def call(self, op: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls = self.recording.calls
        if calls:
            calls[-1].freed.extend(self.freed())
        if op is torch.ops.aten.lift_fresh.default and _is_literal(args[0]):
            with _disable_current_modes():
                self.recording.literals[self.ref(output).id] = args[0].tolist()
        args, kwargs = tree_map(
            lambda x: self.ref(x) if isinstance(x, Tensor) else x, (args, kwargs)
        )
        outputs = [self.ref(t) for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
        path = self._stack[-1].path if self._stack else ""
        integers = list(self.integers)
        calls.append(Call(op, args, kwargs, outputs, path, self.function, integers, self.where))

    @contextmanager
    def watching(self, paths: Mapping[int, str]) -> Iterator[None]:
        """Record what happens in the block; module calls are seen by wrapping `__call__`."""
        original: Callable[..., Any] = nn.Module._call_impl

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(module))
            if path is None:
                return original(module, *args, **kwargs)
            call = self.enter(path, (args, kwargs))
            try:
                if path in self.recording.opaque:
                    output = self.unobserved(original, module, args, kwargs)
                else:
                    output = original(module, *args, **kwargs)
            except Exception:
                self.failed = self.failed or path  # the innermost one comes first
                raise
            self.leave(call, output)
            return output

        nn.Module._call_impl = watched  # type: ignore[method-assign, assignment]
        TracedInt.on_equal = lambda a, b: self.recording.equalities.append((a, b))
        try:
            with _Calls(self), _Functions(self):
                yield
        finally:
            TracedInt.on_equal = None
            nn.Module._call_impl = original  # type: ignore[method-assign]

    def unobserved(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Run a module as if nobody looked: no modes, and plain integers."""
        assert self.attributes is not None
        with _disable_current_modes(), torch.no_grad(), self.attributes.plain():
            args, kwargs = tree_map(_plain_integer, (args, kwargs))
            nn.Module._call_impl, watched = original, nn.Module._call_impl  # type: ignore[method-assign]
            try:
                return original(module, *args, **kwargs)
            finally:
                nn.Module._call_impl = watched  # type: ignore[method-assign]

    def asked(self, function: str, tensor: Tensor) -> None:
        """The code asked for values: what the run shows from here on depends on them."""
        where = _location()
        self.recording.decisions.setdefault(self._stack[-1].path if self._stack else "", where)
        if function in _LEAVING and not self.recording.fake:
            reason = f"its values leave PyTorch by {function}() at {where}"
            self.recording.escapes.append((self.ref(tensor), reason))

    def enter(self, path: str, inputs: Any) -> ModuleCall:
        found = [self.ref(t) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
        start = len(self.recording.calls)
        call = ModuleCall(path, start, start, found, [], len(self._stack))
        self.recording.modules.append(call)
        self._stack.append(call)
        return call

    def leave(self, call: ModuleCall, output: Any) -> None:
        self._stack.pop()
        call.last = len(self.recording.calls)
        call.outputs = [self.ref(t) for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


def _is_literal(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.dtype is torch.int64
    return plain and tensor.dim() == 1 and tensor.numel() <= _LONGEST_LITERAL


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every ATen call."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = self._recorder.reshaped(args[0]) if _REFORMS in func.tags else None
        output = _computed(func, args, kwargs, self._recorder.recording.fake)
        if func.namespace != "prim":
            self._recorder.call(
                func, args if given is None else (given, *args[1:]), kwargs, output
            )
        return output


def _computed(func: Any, args: Any, kwargs: Any, fake: bool) -> Any:
    """The operator's result; on fake tensors, kernels must not be choosier than real ones."""
    if fake and func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        narrow, kwargs = tree_map(
            lambda x: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x,
            (args, kwargs),
        )
        return func(*narrow, **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Sees every torch function that Python code calls, with its integers still traced."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is torch.Tensor.shape:
            return torch.Size(self._sizes(args[0]))
        if name == "size" and isinstance(args[0], Tensor):
            return self._size(*args, **kwargs)
        if name in _ASKING and isinstance(args[0], Tensor):
            self._recorder.asked(name, args[0])
        recorder = self._recorder
        before = recorder.function, recorder.integers, recorder.where
        integers = (
            list(_integers((args[1:] if isinstance(args[0], Tensor) else args, kwargs)))
            if args
            else []
        )
        recorder.function, recorder.integers = name, integers
        recorder.where = _location() if integers else ""
        try:
            return func(*args, **kwargs)
        finally:
            recorder.function, recorder.integers, recorder.where = before

    def _sizes(self, tensor: Tensor) -> list[TracedInt]:
        number = self._recorder.ref(tensor).id
        return [TracedInt(int(n), Size(number, d)) for d, n in enumerate(tensor.shape)]

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        sizes = self._sizes(tensor)
        return torch.Size(sizes) if dim is None else sizes[dim]


def _plain_integer(value: Any) -> Any:
    return int(value) if isinstance(value, TracedInt) else value


def _integers(tree: Any) -> Iterator[int | None]:
    """Integers in nested arguments, in order; a slice gives its start and stop."""
    if isinstance(tree, bool) or tree is None:
        return
    if isinstance(tree, int):
        yield tree
    elif isinstance(tree, slice):
        yield tree.start if isinstance(tree.start, int) else None
        yield tree.stop if isinstance(tree.stop, int) else None
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _integers(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _integers(value)


def _location() -> str:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _SUPPLE)) and "contextlib" not in name:
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
