"""Fits the settings that a recipe gives to the parameters of a function."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from supple.errors import SettingError, nearest

__all__ = ["fitted"]


def fitted(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    what: str,
    *,
    given: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Checks settings against a function's parameters and converts them by their types.

    Args:
        function: What will be called, a function or a class.
        settings: Values by name, as YAML gave them.
        what: What messages call the function, such as `"model 'digits-cnn'"`.
        given: Parameters that the caller fills in, which a recipe can't set.

    Returns:
        The converted settings.

    Raises:
        SettingError: A name is unknown, one is missing, or a value can't be converted.

    Example:
        >>> def build(*, width: int = 8, lr: float = 0.1): ...
        >>> fitted(build, {"lr": "1e-4"}, "the model")
        {'lr': 0.0001}
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in given and parameter.kind is not parameter.VAR_POSITIONAL
    }
    named = {n: p for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    for name in settings:
        if len(named) == len(parameters) and name not in named:
            raise SettingError(
                f"{what} has no setting {name!r}{nearest(str(name), named)}; "
                f"it has {', '.join(named) or 'none'}"
            )
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in settings:
            raise SettingError(f"{what} needs the setting {name!r}")
    hints = _hints(function)
    return {
        name: _converted(value, hints.get(name, Any), name, what)
        for name, value in settings.items()
    }


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Types by parameter; a class's are those of its constructor."""
    target: Any = function.__init__ if inspect.isclass(function) else function
    return typing.get_type_hints(target)


def _converted(value: Any, hint: Any, name: str, what: str) -> Any:
    """One value, converted to the type of its parameter."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except TypeError:  # a dataclass or a model brings its own configuration
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        [first, *_] = error.errors()
        message = first["msg"]
        raise SettingError(f"setting {name!r} of {what}: {message}, got {value!r}") from error
