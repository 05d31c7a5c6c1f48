"""Which engine runs a network fastest here, and a folder that holds the network for it.

An *engine* is a program that runs a network, in one number format: PyTorch, ONNX Runtime and
OpenVINO in float32, PyTorch and OpenVINO in bfloat16. All of them run a network whose layers
hold codes (see `supple.quantize`), each with its own kernels for them. `deploy` tries all of
them on the same inputs and keeps the fastest whose outputs are close enough; `load` runs what
it wrote.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from supple import files, storage
from supple.cost.count import inference, run_forward
from supple.cost.measure import device_name, interleaved, quiet_threads, without_drift
from supple.deploy import runners
from supple.deploy.export import export
from supple.deploy.runners import Runner, relative_error, tensors
from supple.errors import (
    CheckpointError,
    ExportError,
    SettingError,
    SuppleError,
    nearest,
)
from supple.layers.packed import PackedConv2d, PackedEmbedding, PackedLinear

__all__ = ["DESCRIPTION", "ENGINES", "Trial", "deploy", "load"]

DESCRIPTION = "engine.json"
SCHEMA = 1
_OURS = {
    DESCRIPTION,
    "network",
    *(f"network{end}" for end in (".bin", ".onnx", ".pt2", ".xml")),
}
TOLERANCE = 5e-2
ROUNDS, SECONDS = 7, 0.02

Writer = Callable[[nn.Module, Path, Sequence[Any], Mapping[str, Any]], object]
_REFUSALS = (SuppleError, RuntimeError, TypeError)
_PACKED = (PackedConv2d, PackedEmbedding, PackedLinear)


@dataclass(frozen=True)
class Trial:
    """What came of one engine.

    Args:
        engine: Its name.
        seconds: For one forward; None where it doesn't run the network.
        error: Largest difference of its outputs from the network's, over the largest magnitude
            of these.
        refused: Why it doesn't run the network, or may not; empty where it may.
    """

    engine: str
    seconds: float | None = None
    error: float | None = None
    refused: str = ""


def deploy(
    module: nn.Module,
    folder: str | Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    engines: Sequence[str] | None = None,
    threads: int = 1,
    tolerance: float = TOLERANCE,
) -> list[Trial]:
    """Measures which engine runs a network fastest, and writes the network for that one.

    The engines run in turn, so that what else the machine does meets all of them.

    Args:
        module: The network, standalone; left as it was.
        folder: Where to: a new folder, or one that this function wrote, which is replaced.
        args: Example inputs by position. Their batch and shapes are what is measured.
        kwargs: Example inputs by name.
        engines: Names of `ENGINES`; all of them by default.
        threads: Number of CPU threads.
        tolerance: Largest difference allowed in any output, over that output's largest
            magnitude.

    Returns:
        All trials, the fastest first; those that were refused, with the reason, last.

    Raises:
        SettingError: An engine is unknown, or the number of threads or the tolerance can't be
            used.
        ExportError: No engine runs the network within the tolerance.
        CheckpointError: The folder holds something else, or can't be written.

    Example:
        >>> trials = deploy(nn.Linear(4, 2), "deployed", (torch.ones(1, 4),))  # doctest: +SKIP
        >>> load("deployed")(torch.ones(1, 4))  # doctest: +SKIP
        [tensor([[-0.1, 0.3]])]
    """
    target, names = Path(folder), _checked(engines, threads, tolerance)
    files.check_folder(
        target, lambda folder: (folder / DESCRIPTION).exists(), "a deployed network"
    )
    kwargs = dict(kwargs or {})
    with inference(module), tempfile.TemporaryDirectory() as temporary:
        expected = tensors(run_forward(module, args, kwargs))
        places = {
            form: _written(form, Path(temporary), module, args, kwargs)
            for form in dict.fromkeys(ENGINES[name].form for name in names)
        }
        trials, runs = [], dict[str, Callable[[], object]]()
        for name in names:
            place = places[ENGINES[name].form]
            if isinstance(place, str):
                trials.append(Trial(name, refused=place))
                continue
            try:
                run = ENGINES[name].start(place, threads)
                error = _difference(expected, run(*args, **kwargs))
            except _REFUSALS as failure:
                trials.append(Trial(name, refused=_told(failure)))
                continue
            runs[name] = _call(run, args, kwargs)
            far = f"differs by {error:.2g}, allowed is {tolerance:.2g}"
            trials.append(Trial(name, error=error, refused="" if error <= tolerance else far))
        trials = _timed(trials, runs, threads)
        best = next((trial for trial in trials if not trial.refused), None)
        if best is None:
            told = "; ".join(f"{one.engine}: {one.refused}" for one in trials)
            raise ExportError(f"no engine runs this network: {told}")
        made = Path(temporary) / ENGINES[best.engine].form
        _place(made, target, best, trials, threads)
    return trials


def load(folder: str | Path, *, threads: int | None = None) -> Runner:
    """Gives the network that `deploy` wrote, run by its engine.

    Args:
        folder: The folder.
        threads: Number of CPU threads; by default as many as were measured. PyTorch's engines
            use as many as the program that calls them.

    Returns:
        A function of the network's inputs that gives its outputs, a list of tensors.

    Raises:
        CheckpointError: The folder is not one of `deploy`'s, or is damaged.
        MissingExtraError: The engine is not installed.
    """
    found = files.read_json(Path(folder) / DESCRIPTION, schema=SCHEMA)
    return ENGINES[found["engine"]].start(Path(folder), threads or found["threads"])


# ------------------------------------------------------------------------------------ engines


def _save(
    module: nn.Module, place: Path, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Saves a network; one of a class that files don't name as a program."""
    storage.save(module, place / "network")
    try:
        storage.load(place / "network", allow_code=True)
    except CheckpointError:
        shutil.rmtree(place / "network")
        export(module, place / "network.pt2", args, kwargs)


def _loaded(place: Path) -> nn.Module:
    if (place / "network.pt2").exists():
        return torch.export.load(place / "network.pt2").module()
    module = storage.load(place / "network", allow_code=True)
    assert isinstance(module, nn.Module)
    return module.eval()


def _pytorch(place: Path, threads: int) -> Runner:
    module = _loaded(place)

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        with torch.inference_mode():
            return tensors(module(*args, **kwargs))

    return run


def _pytorch_bfloat16(place: Path, threads: int) -> Runner:
    halved = _halved(_loaded(place))

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        with torch.inference_mode():
            args, kwargs = tree_map(_bfloat16, (args, kwargs))
            found = tensors(halved(*args, **kwargs))
        return [one.float() if one.dtype == torch.bfloat16 else one for one in found]

    return run


def _halved(module: nn.Module) -> nn.Module:
    """Casts a network to bfloat16, but for the scales of codes."""
    halved = copy.deepcopy(module)
    for one in halved.modules():
        packed = isinstance(one, _PACKED)
        if packed:
            vars(one)["dtype"] = torch.bfloat16
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = nn.Parameter(_bfloat16(parameter.detach()), False)
        for name, buffer in one._buffers.items():
            if buffer is not None and not packed:
                one._buffers[name] = _bfloat16(buffer)
    return halved


def _bfloat16(leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.bfloat16() if floating else leaf


def _onnx_runtime(place: Path, threads: int) -> Runner:
    return runners.onnx_runtime(place / "network.onnx", threads)


def _openvino(precision: str) -> Callable[[Path, int], Runner]:
    def start(place: Path, threads: int) -> Runner:
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        return runners.openvino(place / "network.xml", hints)

    return start


def _exported(suffix: str) -> Writer:
    def write(
        module: nn.Module, place: Path, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        export(module, place / f"network{suffix}", args, kwargs)

    return write


FORMS: Mapping[str, Writer] = {
    "pytorch": _save,
    "onnx": _exported(".onnx"),
    "openvino": _exported(".xml"),
}
"""How a network gets into a folder, by the name of the form that it has there."""


@dataclass(frozen=True)
class Engine:
    """Which form of a network an engine reads, and what runs it.

    Args:
        form: A name of `FORMS`.
        start: Gives what runs the network in a folder, by so many threads.
    """

    form: str
    start: Callable[[Path, int], Runner]


ENGINES: Mapping[str, Engine] = {
    "pytorch": Engine("pytorch", _pytorch),
    "pytorch-bf16": Engine("pytorch", _pytorch_bfloat16),
    "onnxruntime": Engine("onnx", _onnx_runtime),
    "openvino": Engine("openvino", _openvino("f32")),
    "openvino-bf16": Engine("openvino", _openvino("bf16")),
}
"""The engines, by name."""


# ------------------------------------------------------------------------------------- trials


def _checked(engines: Sequence[str] | None, threads: int, tolerance: float) -> list[str]:
    names = list(dict.fromkeys(ENGINES if engines is None else engines))
    for name in names:
        if name not in ENGINES:
            raise SettingError(
                f"there is no engine '{name}'{nearest(name, ENGINES)} "
                f"(engines: {', '.join(ENGINES)})"
            )
    if not names:
        raise SettingError("name at least one engine, or leave engines out to try all")
    if threads < 1:
        raise SettingError(f"threads must be at least 1, got {threads}")
    if not tolerance > 0:
        raise SettingError(f"tolerance must be above 0, got {tolerance}")
    return names


def _written(
    form: str,
    folder: Path,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Path | str:
    """Writes a network in one form; gives where it lies, or why it can't be written so."""
    place = folder / form
    place.mkdir()
    try:
        FORMS[form](module, place, args, kwargs)
    except _REFUSALS as failure:
        return _told(failure)
    return place


def _told(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0]


def _timed(
    trials: Sequence[Trial], runs: Mapping[str, Callable[[], object]], threads: int
) -> list[Trial]:
    """Times what runs, and sorts: the fastest first, the refused last."""
    ways, seconds = list(runs.values()), dict[str, float]()
    if ways:
        with quiet_threads(threads):
            times = interleaved(
                len(ways), lambda index: ways[index], rounds=ROUNDS, seconds=SECONDS
            )
        seconds = dict(zip(runs, without_drift(times).tolist(), strict=True))
    found = [
        Trial(one.engine, seconds.get(one.engine), one.error, one.refused) for one in trials
    ]
    return sorted(found, key=lambda one: (bool(one.refused), one.seconds or float("inf")))


def _call(run: Runner, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: run(*args, **kwargs)


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if len(expected) != len(found):
        raise ExportError(f"gives {len(found)} outputs, the network {len(expected)}")
    return max(map(relative_error, expected, found), default=0.0)


# ------------------------------------------------------------------------------------- folder


def _place(
    made: Path, target: Path, best: Trial, trials: Sequence[Trial], threads: int
) -> None:
    """Writes the folder anew beside its place, and moves it there when it is complete."""
    with files.replacing_folder(target, _OURS) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
        files.write_json(
            folder / DESCRIPTION,
            {
                "engine": best.engine,
                "threads": threads,
                "device": device_name(threads=threads),
                "trials": [vars(one) for one in trials],
            },
            schema=SCHEMA,
        )
