"""Fixtures for all tests."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

# Tiny networks on two threads wait for each other: tests ran up to 70 times slower. This stands
# before anything imports PyTorch, and workers and subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for each test, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data that SUPPLE_DATA names; the test is skipped without it."""
    folder = os.environ.get("SUPPLE_DATA")
    if not folder:
        pytest.skip("needs real data: set SUPPLE_DATA to the folder that holds it")
    assert Path(folder).is_dir(), f"SUPPLE_DATA names {folder}, which is no folder"
    return Path(folder)
