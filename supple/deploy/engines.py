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
from torch.utils._pytree import tree_leaves, tree_map

from supple import files, storage
from supple.cost.count import inference, run_forward
from supple.cost.measure import device_name, interleaved, quiet_threads, without_drift
from supple.deploy.export import export
from supple.errors import (
    CheckpointError,
    ExportError,
    SettingError,
    SuppleError,
    import_extra,
    nearest,
)
from supple.layers.packed import PackedConv2d, PackedEmbedding, PackedLinear

__all__ = ["DESCRIPTION", "ENGINES", "Trial", "deploy", "load"]

DESCRIPTION = "engine.json"
SCHEMA = 1
TOLERANCE = 5e-2
ROUNDS, SECONDS = 7, 0.02

Run = Callable[..., list[Tensor]]
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
    _check_target(target)
    kwargs = dict(kwargs or {})
    with inference(module), tempfile.TemporaryDirectory() as temporary:
        expected = _tensors(run_forward(module, args, kwargs))
        trials, runs = [], dict[str, Callable[[], object]]()
        for name in names:
            place = Path(temporary) / name
            place.mkdir()
            try:
                ENGINES[name].write(module, place, args, kwargs)
                run = ENGINES[name].start(place, threads)
                error = _difference(expected, run(*args, **kwargs))
            except (SuppleError, RuntimeError, TypeError) as failure:
                reason = (str(failure).splitlines() or [type(failure).__name__])[0]
                trials.append(Trial(name, refused=reason))
                continue
            runs[name] = _call(run, args, kwargs)
            far = f"differs by {error:.2g}, allowed is {tolerance:.2g}"
            trials.append(Trial(name, error=error, refused="" if error <= tolerance else far))
        trials = _timed(trials, runs, threads)
        best = next((trial for trial in trials if not trial.refused), None)
        if best is None:
            told = "; ".join(f"{one.engine}: {one.refused}" for one in trials)
            raise ExportError(f"no engine runs this network: {told}")
        _place(Path(temporary) / best.engine, target, best, trials, threads)
    return trials


def load(folder: str | Path, *, threads: int | None = None) -> Run:
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


@dataclass(frozen=True)
class _Engine:
    """How a network gets into a folder for an engine, and out of it again."""

    write: Callable[[nn.Module, Path, Sequence[Any], Mapping[str, Any]], object]
    start: Callable[[Path, int], Run]


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


def _pytorch(place: Path, threads: int) -> Run:
    module = _loaded(place)

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        with torch.inference_mode():
            return _tensors(module(*args, **kwargs))

    return run


def _pytorch_bfloat16(place: Path, threads: int) -> Run:
    halved = _halved(_loaded(place))

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        with torch.inference_mode():
            args, kwargs = tree_map(_bfloat16, (args, kwargs))
            found = _tensors(halved(*args, **kwargs))
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


def _onnx_runtime(place: Path, threads: int) -> Run:
    runtime = import_extra("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        str(place / "network.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = [one.numpy() for one in _tensors((args, kwargs))]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(one) for one in found]

    return run


def _openvino(precision: str) -> Callable[[Path, int], Run]:
    def start(place: Path, threads: int) -> Run:
        core = import_extra("openvino", "openvino").Core()
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        request = core.compile_model(place / "network.xml", "CPU", hints).create_infer_request()

        def run(*args: Any, **kwargs: Any) -> list[Tensor]:
            arrays = [one.numpy() for one in _tensors((args, kwargs))]
            found = request.infer(arrays, share_inputs=True).values()
            return [torch.from_numpy(one.copy()) for one in found]

        return run

    return start


def _exported(
    suffix: str,
) -> Callable[[nn.Module, Path, Sequence[Any], Mapping[str, Any]], object]:
    def write(
        module: nn.Module, place: Path, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        export(module, place / f"network{suffix}", args, kwargs)

    return write


ENGINES: Mapping[str, _Engine] = {
    "pytorch": _Engine(_save, _pytorch),
    "pytorch-bf16": _Engine(_save, _pytorch_bfloat16),
    "onnxruntime": _Engine(_exported(".onnx"), _onnx_runtime),
    "openvino": _Engine(_exported(".xml"), _openvino("f32")),
    "openvino-bf16": _Engine(_exported(".xml"), _openvino("bf16")),
}
"""How each engine gets a network, by the engine's name."""


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


def _call(run: Run, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: run(*args, **kwargs)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if [one.shape for one in expected] != [one.shape for one in found]:
        raise ExportError(f"gives {len(found)} outputs, the network {len(expected)}")
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        if ours.numel():
            largest = ours.double().abs().max().clamp_min(1e-12)
            worst = max(worst, float((ours.double() - theirs.double()).abs().max() / largest))
    return worst


# ------------------------------------------------------------------------------------- folder


def _check_target(target: Path) -> None:
    if target.is_file():
        raise CheckpointError(f"{target} is a file; choose a new folder")
    if target.is_dir() and any(target.iterdir()) and not (target / DESCRIPTION).exists():
        raise CheckpointError(
            f"{target} holds files that are not a deployed network; choose a new folder"
        )


def _place(
    made: Path, target: Path, best: Trial, trials: Sequence[Trial], threads: int
) -> None:
    """Writes the folder anew beside its place, and moves it there when it is complete."""
    files.write_json(
        made / DESCRIPTION,
        {
            "engine": best.engine,
            "threads": threads,
            "device": device_name(threads=threads),
            "trials": [vars(one) for one in trials],
        },
        schema=SCHEMA,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as near:
            new = Path(near) / "new"
            shutil.copytree(made, new)
            if target.exists():
                target.rename(Path(near) / "old")
            new.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"can't write {target}: {error.strerror or error}; choose a folder that you may "
            "write to"
        ) from error
