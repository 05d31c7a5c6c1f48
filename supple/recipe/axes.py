"""Axes by what a recipe calls them: the file `supple/axes/width.py` is the axis `width`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import supple.axes
from supple.axes.base import Axis, Sharing
from supple.errors import SettingError, nearest
from supple.technique import make

__all__ = ["axes_of", "axis_names"]


def axis_names() -> list[str]:
    """Lists the axes that a recipe can name, read from the file names.

    What says which weights sizes share (`Sharing`) is up to the training method.

    Example:
        >>> "width" in axis_names()
        True
    """
    files = (path for folder in supple.axes.__path__ for path in Path(folder).glob("*.py"))
    names = sorted(f.stem for f in files if f.stem != "base" and not f.stem.startswith("_"))
    return [name for name in names if not issubclass(_class_of(name), Sharing)]


def axes_of(settings: Mapping[str, Mapping[str, Any] | None]) -> list[Any] | None:
    """Makes the axes of a recipe.

    Args:
        settings: Settings by axis.

    Returns:
        The axes, or None where there are none, which leaves the choice to `supple.elastic`.

    Raises:
        SettingError: An axis or a setting is unknown, or a value can't be used.

    Example:
        >>> axes_of({"width": {"choices": [0.5, 1.0]}})[0].choices
        (0.5, 1.0)
    """
    return [axis_of(name, given) for name, given in settings.items()] or None


def axis_of(name: str, settings: Mapping[str, Any] | None) -> Any:
    """Makes one axis.

    Args:
        name: Such as `"width"`.
        settings: Its settings, as YAML gave them.

    Raises:
        SettingError: The axis or a setting is unknown, or a value can't be used.
    """
    if name not in axis_names():
        raise SettingError(
            f"there is no axis {name!r}{nearest(name, axis_names())}; axes are "
            f"{', '.join(axis_names())}"
        )
    return make(_class_of(name), settings, name=f"axis {name!r}")


def _class_of(name: str) -> type[Axis]:
    module = importlib.import_module(f"supple.axes.{name}")
    found: type[Axis] = getattr(module, "".join(part.title() for part in name.split("_")))
    return found
