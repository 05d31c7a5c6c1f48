"""Finds reference networks by key.

The file `supple/models/digits_cnn.py` is the key `digits-cnn`: it holds one function `build`,
whose keyword arguments are the model's settings. Networks here are plain PyTorch and know
nothing of elasticity. What is built carries key and settings as a plain attribute,
`supple_origin`, by which a saved network can be built again.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from supple.errors import SettingError, nearest

__all__ = ["build", "builder", "keys", "positive"]


def keys() -> list[str]:
    """Lists the keys of all reference networks, read from the file names.

    Example:
        >>> "digits-cnn" in keys()
        True
    """
    files = Path(__file__).parent.glob("*.py")
    names = (file.stem for file in files if file.stem not in ("__init__", "base"))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def builder(key: str) -> Callable[..., nn.Module]:
    """Gives the function that builds a reference network.

    Args:
        key: Such as `"digits-cnn"`, or with its room, `"models/digits-cnn"`.

    Raises:
        SettingError: No model has this key.
    """
    name = key.removeprefix("models/")
    if name not in keys():
        raise SettingError(
            f"there is no model '{key}'{nearest(name, keys())}; models are: {', '.join(keys())}"
        )
    module = importlib.import_module(f"supple.models.{name.replace('-', '_')}")
    return _noting(name, module.build)


def _noting(key: str, build_function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes a network's `build` leave a note of what was built."""

    @functools.wraps(build_function)
    def noting(**settings: Any) -> nn.Module:
        net = build_function(**settings)
        # Pretrained weights are values, not structure, and their file may be gone later.
        structural = {name: value for name, value in settings.items() if name != "weights"}
        try:
            note = {"key": key, "settings": json.loads(json.dumps(structural))}
        except TypeError:  # a setting that no file can hold: such a network has no origin
            return net
        vars(net)["supple_origin"] = note
        return net

    return noting


def build(key: str, **settings: Any) -> nn.Module:
    """Builds a reference network, randomly initialised unless a setting says otherwise.

    Args:
        key: Such as `"cifar-resnet"`, or with its room, `"models/cifar-resnet"`.
        settings: The keyword arguments of that file's `build`.

    Returns:
        A module in train mode.

    Raises:
        SettingError: The key or a setting's name is unknown, or a value can't be used.

    Example:
        >>> build("cifar-resnet", depth=20).linear.out_features
        10
    """
    function = builder(key)
    known = list(inspect.signature(function).parameters)
    for name in settings:
        if name not in known:
            raise SettingError(
                f"model '{key}' has no setting '{name}'{nearest(name, known)}; "
                f"settings are: {', '.join(known)}"
            )
    return function(**settings)


def positive(**settings: int | float) -> None:
    """Checks that settings are numbers above zero.

    Raises:
        SettingError: One is not; the message names it.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise SettingError(f"{name} must be a number above 0, got {value!r}")
