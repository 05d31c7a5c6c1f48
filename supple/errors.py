"""Every error that Supple raises on purpose, and the helpers that word them.

Each class doubles as the built-in that a reader would expect:

    SuppleError
    ├── SettingError           ValueError           a setting or an argument is wrong
    ├── UnknownTechniqueError  LookupError          no technique has this key
    ├── UnsupportedModelError  TypeError            the model can't be treated this way
    ├── MissingExtraError      ImportError          an optional package is not installed
    ├── CheckpointError        RuntimeError         a file can't be read or written
    ├── RecipeError            ValueError           a recipe is wrong
    ├── ExportError            RuntimeError         a target format refused the network
    ├── BudgetError            ValueError           no network meets the budget
    ├── OperatorError          NotImplementedError  an operator has no rule
    ├── VerificationError      RuntimeError         a sub-network differs from its promise
    ├── ConcurrencyError       RuntimeError         two sizes of one network at once
    ├── RankError              RuntimeError         processes that train together came apart
    └── WorkerError            RuntimeError         workers of a search can't be had or die

A message says what was wrong, what was got, and what would do.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class SuppleError(Exception):
    """Base of every error that Supple raises on purpose."""


class SettingError(SuppleError, ValueError):
    """A setting or an argument has a value that can't be used."""


class UnknownTechniqueError(SuppleError, LookupError):
    """No technique has the key that was asked for."""


class UnsupportedModelError(SuppleError, TypeError):
    """The model can't be treated this way, and the message says why."""


class MissingExtraError(SuppleError, ImportError):
    """An optional package is needed and not installed."""


class CheckpointError(SuppleError, RuntimeError):
    """A file is missing, damaged, of another version, or can't be written."""


class RecipeError(SuppleError, ValueError):
    """A recipe has a wrong key or value; the message names its line."""


class ExportError(SuppleError, RuntimeError):
    """The target format refused the network, or the written file computes something else."""


class BudgetError(SuppleError, ValueError):
    """No network meets the budget; the message names the nearest one."""


class OperatorError(SuppleError, NotImplementedError):
    """An operator has no rule, so its cost or its shape can't be told."""


class VerificationError(SuppleError, RuntimeError):
    """A sub-network computes something else than was promised."""


class ConcurrencyError(SuppleError, RuntimeError):
    """One network was asked to have two sizes at once."""


class RankError(SuppleError, RuntimeError):
    """Another process that trains along failed, is gone, or does something else."""


class WorkerError(SuppleError, RuntimeError):
    """The workers that a search was to have can't be reached, or die again and again."""


class SuppleWarning(UserWarning):
    """Something works, though more slowly or less well than it should."""


def nearest(word: str, options: Iterable[str]) -> str:
    """Words a guess at what was meant, to be appended to an error message.

    Args:
        word: What was given.
        options: What would have been right.

    Returns:
        `", did you mean 'x'?"` for the option closest to `word`, or `""` if none is close.

    Example:
        >>> nearest("widht", ["width", "depth"])
        ", did you mean 'width'?"
        >>> nearest("colour", ["width", "depth"])
        ''
    """
    close = difflib.get_close_matches(word, [str(option) for option in options], n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional package, or says how to install it.

    Args:
        module: The module to import, such as `"openvino"`.
        extra: The extra of Supple that brings it, such as `"openvino"`.

    Returns:
        The module.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there and lacks a part of its own is another fault: let it show.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"the package '{module.split('.')[0]}' is not installed and this needs it; "
            f"install it with: pip install 'supple[{extra}]'"
        ) from error
