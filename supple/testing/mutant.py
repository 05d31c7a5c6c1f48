"""Does a technique's own test notice when the technique's idea is taken away?

A technique declares the one method that makes it what it is, `distinguishing`. With that
method replaced by its base's default, the technique's own test must fail; a test that goes on
passing checks nothing of the idea.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from supple.errors import SettingError
from supple.technique import Technique

__all__ = ["defaulted", "own_methods", "survives"]

_BESIDE_THE_IDEA = {"examples", "neutral", "toy"}


def own_methods(cls: type[Technique]) -> list[str]:
    """Gives the public methods with which a technique departs from its bases.

    Args:
        cls: The technique's class.

    Returns:
        Names, without those that only serve the checks.
    """
    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and name not in _BESIDE_THE_IDEA
        and (inspect.isfunction(value) or isinstance(value, (property, classmethod)))
    ]


@contextlib.contextmanager
def defaulted(cls: type[Technique]) -> Iterator[None]:
    """Puts the base's default in the place of the distinguishing method.

    Args:
        cls: The technique's class.

    Raises:
        SettingError: `distinguishing` names no method of the class's own, or one that no base
            has.
    """
    name = cls.distinguishing
    if name not in vars(cls):
        raise SettingError(
            f"{cls.__name__}.distinguishing must name a method of its own, got '{name}' "
            f"(methods: {', '.join(own_methods(cls)) or 'none'})"
        )
    if not any(name in vars(base) for base in cls.__mro__[1:]):
        raise SettingError(
            f"{cls.__name__}.distinguishing must name a method that overrides a base's, and no "
            f"base has '{name}'"
        )
    own = vars(cls)[name]
    delattr(cls, name)
    try:
        yield
    finally:
        setattr(cls, name, own)


def survives(cls: type[Technique], test_file: Path) -> bool:
    """Tells whether a technique's own test passes without the technique's idea.

    Runs the file with pytest, within this process, up to its first failure.

    Args:
        cls: The technique's class.
        test_file: Its own test.

    Returns:
        True where all tests pass, so that they check nothing of the idea.

    Raises:
        SettingError: There are no tests to run, or they can't be collected.
    """
    quiet = ["-x", "-q", "--no-header", "--no-summary", "--capture=no"]
    plugins = ["cacheprovider", "xdist", "faulthandler"]
    off = [part for plugin in plugins for part in ("-p", f"no:{plugin}")]
    with (
        defaulted(cls),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        code = pytest.main([str(test_file), *quiet, *off])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SettingError(f"the tests in {test_file} could not be run (pytest: {code!r})")
    return code == pytest.ExitCode.OK
