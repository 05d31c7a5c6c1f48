"""Checkpoints of a training run, from which it goes on exactly as if it had not stopped.

A checkpoint is a folder `step-00000120` of safetensors and JSON files, each with a checksum:
what all ranks share (weights, optimizer, average, sampler, history) and one file per rank for
its random numbers. It is written under another name and moved into place when complete; only
then are older ones removed, but for the last one before it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supple import files
from supple.errors import CheckpointError
from supple.training import processes

__all__ = ["latest", "load", "pack", "save", "unpack"]

_NAME = re.compile(r"step-(\d{8,})")
_PLAIN = (str, int, float, bool, type(None))
_SCHEMA = 1


def save(
    folder: str | os.PathLike[str],
    step: int,
    *,
    module: nn.Module,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint; all ranks call it together.

    Args:
        folder: Where checkpoints lie; missing folders are created.
        step: How many steps are done.
        module: The network, whose parameters and buffers are saved.
        shared: State that is equal on all ranks: nested mappings and lists of tensors and plain
            values.
        own: State of this rank.
        settings: What a run must have in common to go on from here.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: Something can't be written.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if processes.rank() == 0:
        _clear(partial)
    processes.barrier()
    try:
        _write(partial / f"rank-{processes.rank()}", own)
        if processes.rank() == 0:
            _write(partial / "shared", {"tensors": _tensors_of(module), **shared})
            files.write_json(partial / "run.json", {"step": step, "settings": dict(settings)})
        processes.barrier()
        if processes.rank() == 0:
            _replace(partial, final)
    except BaseException:
        # What the others wrote goes, too: without this rank there is no checkpoint.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if processes.rank() == 0:
        for old in sorted(_steps(folder))[:-2]:
            shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    processes.barrier()
    return final


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Finds the last complete checkpoint.

    Args:
        folder: Where checkpoints lie.

    Returns:
        Its folder, or None where there is none.
    """
    folder = Path(folder)
    steps = _steps(folder)
    return folder / f"step-{max(steps):08d}" if steps else None


def load(
    path: str | os.PathLike[str], *, module: nn.Module, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint; the module's parameters and buffers take their values from it.

    Nothing is changed if anything in the checkpoint is wrong.

    Args:
        path: The checkpoint's folder.
        module: The network.
        settings: What this run is like.

    Returns:
        What was saved as `shared` and, for this rank, as `own`.

    Raises:
        CheckpointError: A file is missing or damaged, the settings differ, or the network has
            other tensors; the message names which.
    """
    path = Path(path)
    try:
        run = files.read_json(path / "run.json", schema=_SCHEMA)
        _check_settings(run["settings"], settings, path)
        shared = _read(path / "shared")
        own = _read(path / f"rank-{processes.rank()}")
        _fill(module, shared.pop("tensors"), path)
        return shared, own
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_way_out(path, error)}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = CheckpointError(
            f"{path} does not hold what a checkpoint of this version does "
            f"({type(error).__name__}: {error})"
        )
        raise CheckpointError(f"{problem}{_way_out(path, problem)}") from error


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Takes nested state apart into what JSON holds and tensors.

    Args:
        value: Mappings, lists and tuples of tensors and plain values.

    Returns:
        The JSON value, in which marks stand for tensors, tuples and mappings, and the tensors
        by the number in their mark.

    Raises:
        CheckpointError: A value is of another type.
    """
    tensors: dict[str, Tensor] = {}

    def packed(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors[str(len(tensors))] = part.detach()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(part, Mapping):
            return {"map": [[packed(key), packed(one)] for key, one in part.items()]}
        if isinstance(part, tuple):
            return {"tuple": [packed(one) for one in part]}
        if isinstance(part, list):
            return [packed(one) for one in part]
        if type(part) in _PLAIN:
            return part
        raise CheckpointError(
            f"a checkpoint can't hold a {type(part).__name__} ({part!r:.60}); it holds "
            "tensors, numbers, texts, lists, tuples and mappings"
        )

    return packed(value), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Puts together what `pack` took apart.

    Args:
        packed: The JSON value.
        tensors: The tensors.

    Returns:
        The value.
    """
    if isinstance(packed, list):
        return [unpack(one, tensors) for one in packed]
    if not isinstance(packed, Mapping):
        return packed
    ((mark, content),) = packed.items()
    if mark == "tensor":
        return tensors[content]
    if mark == "tuple":
        return tuple(unpack(one, tensors) for one in content)
    return {unpack(key, tensors): unpack(one, tensors) for key, one in content}


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    # Each owner once, under its first name: a tied parameter is one tensor.
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def _fill(module: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    own, saved = _tensors_of(module), dict(saved)
    for name in [*own, *saved]:
        here, there = (_shape(tensors.get(name)) for tensors in (own, saved))
        if here != there:
            raise CheckpointError(
                f"{path} is of another network: '{name}' is {there} there and {here} here"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(now))  # as the file has it: tuples are lists
    for name in [*now, *saved]:
        if saved.get(name) != now.get(name):
            raise CheckpointError(
                f"{path} was written with {name}={saved.get(name)!r}, this run has "
                f"{name}={now.get(name)!r}; a run resumes exactly or not at all: use the same "
                f"{name}, or another folder to start anew"
            )


def _write(stem: Path, state: Mapping[str, Any]) -> None:
    packed, tensors = pack(state)
    files.write_tensors(stem.with_suffix(".safetensors"), tensors)
    files.write_json(stem.with_suffix(".json"), {"state": packed})


def _read(stem: Path) -> dict[str, Any]:
    tensors, _ = files.read_tensors(stem.with_suffix(".safetensors"))
    packed = files.read_json(stem.with_suffix(".json"), schema=_SCHEMA)["state"]
    state = unpack(packed, tensors)
    if not isinstance(state, dict):
        raise CheckpointError(f"{stem.with_suffix('.json')} holds no training state")
    return state


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = [_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return [int(match[1]) for match in matches if match]


def _clear(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"can't write to {partial.parent}: {error.strerror or error}; choose a folder that "
            "can be created and that you may write to"
        ) from error


def _replace(partial: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    try:
        os.replace(partial, final)
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"can't write {final}: {error.strerror or error}") from error


def _way_out(path: Path, error: CheckpointError) -> str:
    others = [step for step in _steps(path.parent) if f"step-{step:08d}" != path.name]
    if not others or "was written with" in str(error):
        return ""
    return (
        f". The checkpoint before it, step-{max(others):08d}, is still there: remove "
        f"{path} to go on from that one"
    )
