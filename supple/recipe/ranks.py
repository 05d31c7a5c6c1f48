"""Recipes under `torchrun`: all processes train, and the first does everything else.

Rank 0 runs the recipe as always and owns its folder. The others build the same network, train
along, and are done; of files they write their random state into checkpoints, nothing more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from supple.recipe.bench import build, gather
from supple.recipe.schema import Recipe
from supple.recipe.supernet import train_along
from supple.training import processes

__all__ = ["help_train", "joined", "launched"]


def launched() -> bool:
    """Tells whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Joins the processes that `torchrun` started, or is alone where it did not.

    Yields:
        The rank of this process.

    Raises:
        RankError: Another process failed or is gone.
    """
    if not launched():
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        with processes.failing_together():
            yield processes.rank()
    finally:
        dist.destroy_process_group()


def help_train(recipe: Recipe, *, allow_code: bool = False) -> None:
    """Trains along with rank 0, which runs the recipe; what the other ranks do.

    Args:
        recipe: The recipe, the same on all ranks.
        allow_code: Whether `module:callable` may be run.

    Raises:
        SuppleError: Something can't be done here, or another rank failed.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    materials = gather(recipe, allow_code=allow_code)
    said = processes.told()
    if said["trains"]:
        train_along(build(materials, failed=said["failed"]), Path(said["folder"]))
