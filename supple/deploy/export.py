"""Writes a network to a file that other programs run, and checks the file by running it."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from supple.cost.count import inference, run_forward
from supple.cost.measure import with_batch
from supple.deploy import runners
from supple.deploy.onnx_layers import input_steps, onnx_layers
from supple.deploy.runners import Runner, relative_error, tensors
from supple.errors import ExportError, SettingError, SuppleError, import_extra, nearest
from supple.files import replacing
from supple.quantity import show

__all__ = ["FORMATS", "export"]

# Largest error by dtype of the outputs, over the largest magnitude of the expected output.
TOLERANCES = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# Where layers round their inputs, a sum in another order, or a bias that ONNX Runtime rounds to
# a whole number, gives another number here and there, a step away.
ROUNDING_TOLERANCE = 5e-2
_ONNX_LIMIT = 2**31 - 2**20  # a protobuf message ends at 2 GiB


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float | None = None,
    dynamic_batch: bool = False,
) -> Path:
    """Exports a network, runs the written file, and compares its outputs with the network's.

    The ending of the path chooses the format: `.onnx` (run by ONNX Runtime), `.pt2`
    (`torch.export`) or `.xml` (OpenVINO; the weights lie beside it in a `.bin` file, and the
    check asks for full precision, where OpenVINO would choose bfloat16 on some CPUs). The
    network is exported in eval mode, layers that hold codes in ONNX and OpenVINO by operators
    that do so (see `supple.deploy.onnx_layers`); of what it returns, only tensors are (a
    key-value cache, say, is left out). The file appears at `path` only if the outputs agree;
    otherwise whatever was there stays.

    Args:
        module: The network, standalone; left as it was.
        path: The file to write.
        args: Example inputs by position.
        kwargs: Example inputs by name.
        tolerance: Largest difference allowed in any output, over that output's largest
            magnitude: 1e-4 by default, 1e-2 for half precision, 5e-2 for bfloat16. Where
            layers round their inputs to b bits, 5e-2 or, if more, two steps: 2 / (2^b - 1).
        dynamic_batch: Whether the first dimension of the inputs may vary; another size is then
            checked, too.

    Returns:
        The path.

    Raises:
        ExportError: The format rejects an operator (the message names it), or the file computes
            something else.
        SettingError: The ending or the tolerance can't be used.
        MissingExtraError: The format's packages are not installed.
        CheckpointError: The file can't be written.
        UnsupportedModelError: The forward fails on these inputs.

    Example:
        >>> export(nn.Linear(3, 5), "layer.onnx", (torch.zeros(2, 3),))  # doctest: +SKIP
        PosixPath('layer.onnx')
    """
    path, kwargs = Path(path), dict(kwargs or {})
    if path.suffix not in FORMATS:
        raise SettingError(
            f"can't export to '{path.name}'{nearest(path.suffix, FORMATS)}; the ending must be "
            f"one of {', '.join(FORMATS)}"
        )
    if tolerance is not None and not tolerance > 0:
        raise SettingError(f"tolerance must be above 0, got {tolerance}")
    with inference(module), _placed(path) as temporary:
        outputs = run_forward(module, args, kwargs)
        if tolerance is None and (steps := input_steps(module)):
            tolerance = max(ROUNDING_TOLERANCE, 2 / steps)
        try:
            with _quiet(), _operators(module, path.suffix) as (exported, codes):
                plain = exported if _is_plain(outputs) else _TensorsOnly(exported)
                program = _program(plain, tuple(args), kwargs, dynamic_batch)
                run = FORMATS[path.suffix](program, temporary, codes)
                found = run(*args, **kwargs)
        except (SuppleError, OSError):
            raise
        except Exception as error:
            _check_room(path, module)
            raise _refusal(module, path, error) from error
        _compare(path, tensors(outputs), found, tolerance)
        if dynamic_batch:
            _check_other_batch(module, path, run, args, kwargs, tolerance)
    return path


# ----------------------------------------------------------------------------- formats


def _write_onnx(program: torch.export.ExportedProgram, file: Path, codes: bool) -> Runner:
    import_extra("onnxruntime", "onnx")  # what is missing is said before the work
    _save_onnx(program, file)
    return runners.onnx_runtime(file, torch.get_num_threads())


def _save_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    import_extra("onnxscript", "onnx")
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > _ONNX_LIMIT:
        raise ExportError(
            f"the network has {show(size, 'B')} of weights, too many for one .onnx file, which "
            "ends at 2 GiB; export to .pt2"
        )
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    assert written is not None
    for node in written.model.graph.all_nodes():
        # Notes about the source code: a third of a small file, with paths of this machine.
        node.metadata_props.clear()
        node.doc_string = None
    written.save(str(file), external_data=False)


def _write_pt2(program: torch.export.ExportedProgram, file: Path, codes: bool) -> Runner:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    written = io.BytesIO()  # PyTorch's own writer ends the process where a disk is full
    torch.export.save(program, written)
    file.write_bytes(written.getbuffer())
    return runners.program(file)


def _write_openvino(program: torch.export.ExportedProgram, file: Path, codes: bool) -> Runner:
    openvino = import_extra("openvino", "openvino")
    if codes:  # OpenVINO knows these operators from ONNX only
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            _save_onnx(program, Path(folder) / "network.onnx")
            # Not `convert_model`, which takes a comma in a path for two files.
            model = openvino.Core().read_model(Path(folder) / "network.onnx")
            openvino.save_model(model, file, compress_to_fp16=False)
    else:
        model = openvino.convert_model(_in_other_words(program.run_decompositions()))
        openvino.save_model(model, file, compress_to_fp16=False)
    # By default it rounds to bfloat16, and inputs of layers that hold codes to 8 bits.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return runners.openvino(file, exact)


def _in_other_words(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Says what OpenVINO does not know in operators that it does.

    Tensors of shape (0,) are dropped from concatenations, where PyTorch ignores them anyway.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.exp2.default:
            node.target, node.args = torch.ops.aten.pow.Scalar, (2.0, *node.args)
        if node.target is torch.ops.aten.cat.default:
            kept = [part for part in node.args[0] if tuple(part.meta["val"].shape) != (0,)]
            node.args = (kept, *node.args[1:])
    return program


FORMATS: dict[str, Callable[[torch.export.ExportedProgram, Path, bool], Runner]] = {
    ".onnx": _write_onnx,
    ".pt2": _write_pt2,
    ".xml": _write_openvino,
}


@contextlib.contextmanager
def _operators(module: nn.Module, suffix: str) -> Iterator[tuple[nn.Module, bool]]:
    """Gives what to export, and whether operators of ONNX stand in for layers of codes."""
    if suffix == ".pt2":
        yield module, False
        return
    with onnx_layers(module) as (exported, count):
        yield exported, count > 0


def _program(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> torch.export.ExportedProgram:
    shapes = _dynamic_shapes(module, args, kwargs) if dynamic else None
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _dynamic_shapes(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Marks the first dimension of each tensor that has the batch's size."""
    batched = [tensor for tensor in tensors((args, kwargs)) if tensor.dim()]
    batch = len(batched[0]) if batched else 0
    if batch < 2:
        raise SettingError(
            "dynamic_batch needs example inputs of at least two examples: PyTorch treats a "
            "batch of one as a constant"
        )

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {0: torch.export.Dim.DYNAMIC} if leaf.dim() and len(leaf) == batch else {}

    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: tree_map(mark, value) for name, value in bound.items()}


class _TensorsOnly(nn.Module):
    """Leaves out what a forward returns beside tensors, such as a key-value cache."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

        # The exporter reads the names of inputs off the signature, so keep it.
        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> dict[str, Any] | tuple[Any, ...]:
            outputs = self.module(*args, **kwargs)
            if isinstance(outputs, Mapping):
                return {name: value for name, value in outputs.items() if _is_plain(value)}
            return tuple(value for value in outputs if _is_plain(value))

        self.forward = forward


def _is_plain(values: Any) -> bool:
    plain = Tensor | int | float | str | bool | None
    return all(isinstance(leaf, plain) for leaf in tree_leaves(values))


# ------------------------------------------------------------------------------ checks


def _check_other_batch(
    module: nn.Module,
    path: Path,
    run: Runner,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tolerance: float | None,
) -> None:
    count = next(len(one) for one in tensors((tuple(args), dict(kwargs))) if one.dim()) + 1
    more_args, more_kwargs = with_batch(count, args, kwargs)
    expected = tensors(run_forward(module, more_args, more_kwargs))
    try:
        found = run(*more_args, **more_kwargs)
    except Exception as error:
        raise ExportError(
            f"{path.name} refuses a batch of {count} although its batch should "
            f"vary ({error}); export with dynamic_batch=False"
        ) from error
    _compare(path, expected, found, tolerance)


def _compare(
    path: Path, expected: list[Tensor], found: list[Tensor], tolerance: float | None
) -> None:
    if len(found) != len(expected):
        raise ExportError(
            f"{path.name} gives {len(found)} outputs, the network {len(expected)}; let the "
            "forward return tensors only"
        )
    for i, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        limit = TOLERANCES.get(ours.dtype, 0.0) if tolerance is None else tolerance
        error = relative_error(ours, theirs)
        if not error <= limit:
            raise ExportError(
                f"{path.name} computes something else: output {i} differs by {error:.2g} of "
                f"its largest magnitude, allowed is {limit:.2g}; nothing was written"
            )


# ----------------------------------------------------------------------- words and files


def _check_room(path: Path, module: nn.Module) -> None:
    """Raises the system's error for a full disk, of which not every format's writer tells."""
    needed = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _refusal(module: nn.Module, path: Path, error: Exception) -> ExportError:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for link in reversed(chain) for line in str(link).splitlines()]
    for line in lines:
        if operator := _operator_in(line):
            what, reason = f"operator '{operator}'", line
            break
    else:
        what = f"this {type(module).__name__}"
        reason = next(filter(None, lines), type(chain[-1]).__name__)
    return ExportError(
        f"{path.suffix} rejects {what}: {reason}; express it by other operators or choose "
        f"another format ({', '.join(FORMATS)})"
    )


_OPERATORS = (
    r"OpOverload\(op='([\w.:]+)'",
    r"No conversion rule found for operations:\s*([\w.:]+)",
    r"Conversion is failed for:.*?([a-z_]\w*\.\w+(?:\.\w+)?)",
    r"(?:operator|Operator|op) '?([a-z_]\w*(?:::|\.)\w+(?:\.\w+)?)",
)


def _operator_in(message: str) -> str | None:
    for pattern in _OPERATORS:
        if found := re.search(pattern, message):
            return found.group(1)
    return None


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A temporary file that is moved into place at the end, with its `.bin` file if any."""
    with replacing(path) as temporary:
        weights = temporary.with_suffix(".bin")
        try:
            yield temporary
            if weights.is_file():
                os.replace(weights, path.with_suffix(".bin"))
        finally:
            weights.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters from printing and logging; what matters comes out as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
