"""Runs networks that lie in files, by the programs that such files are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from supple.errors import import_extra

__all__ = ["Runner", "onnx_runtime", "openvino", "program", "relative_error", "tensors"]

Runner = Callable[..., list[Tensor]]
"""Takes a network's inputs, by position and by name, and gives its outputs."""


def tensors(values: Any) -> list[Tensor]:
    """Gives the tensors among nested values, in order.

    Example:
        >>> tensors({"a": [torch.ones(1), None], "b": 2})
        [tensor([1.])]
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def program(file: Path) -> Runner:
    """Runs a `.pt2` file by PyTorch.

    Args:
        file: The file.

    Returns:
        What runs it.
    """
    loaded = torch.export.load(file).module()
    return lambda *args, **kwargs: tensors(loaded(*args, **kwargs))


def onnx_runtime(file: Path, threads: int) -> Runner:
    """Runs an `.onnx` file by ONNX Runtime.

    Args:
        file: The file.
        threads: Number of CPU threads.

    Returns:
        What runs it.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = import_extra("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = dict(zip(names, _arrays(args, kwargs), strict=True))
        return [torch.from_numpy(one) for one in session.run(None, arrays)]

    return run


def openvino(file: Path, hints: Mapping[str, Any]) -> Runner:
    """Runs an `.xml` file by OpenVINO.

    Args:
        file: The file; its weights lie beside it.
        hints: What OpenVINO is told about the number format and threads.

    Returns:
        What runs it.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    core = import_extra("openvino", "openvino").Core()
    request = core.compile_model(file, "CPU", dict(hints)).create_infer_request()

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        found = request.infer(_arrays(args, kwargs), share_inputs=True).values()
        return [torch.from_numpy(one.copy()) for one in found]

    return run


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Gives the largest difference, over the largest magnitude of what was expected.

    Args:
        ours: What was expected.
        theirs: What was found.

    Returns:
        The error; infinity where shapes differ, or other entries are finite.

    Example:
        >>> relative_error(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0]))
        0.25
    """
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    finite = ours.isfinite()
    if not torch.equal(finite, theirs.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (ours - theirs)[finite].abs().max()
    return float(difference / ours[finite].abs().max().clamp_min(1e-12))


def _arrays(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return [one.detach().cpu().numpy() for one in tensors((args, kwargs))]
