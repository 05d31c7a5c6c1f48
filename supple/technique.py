"""What a technique is, how one is found, and how its settings become text and back.

A technique is a frozen dataclass: its fields are the hyper-parameters, its class is the
method, and it has one verb, given by its kind. The file `supple/prune/global_mp.py` *is* the
key `prune/global-mp`; there is no table. Exactly one class per file carries `@register`,
which attaches the facts that are not hyper-parameters and does nothing else.

This module imports neither PyTorch nor any other room. Import its names with
`from supple.technique import ...`: `supple.technique` itself is the look-up function.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, Union

from supple.errors import SettingError, UnknownTechniqueError, nearest

if TYPE_CHECKING:
    from typing import Self

    from torch import Generator, Tensor, nn

__all__ = [
    "ROOMS",
    "Build",
    "Card",
    "Decode",
    "Merge",
    "Rule",
    "RuleRun",
    "Search",
    "SearchRun",
    "Study",
    "Technique",
    "Transform",
    "from_settings",
    "key_of",
    "register",
    "settings",
    "technique",
    "techniques",
]

ROOMS: tuple[str, ...] = (
    "supernet",
    "search",
    "prune",
    "quantize",
    "factor",
    "tune",
    "experts",
    "compose",
    "generate",
    "distribute",
    "studies",
)
"""The rooms that hold techniques, in the order in which they are listed."""


@dataclass(frozen=True)
class Card:
    """The facts about a technique that are not hyper-parameters.

    Args:
        title: What readers call it.
        paper: Where it was published, such as `"arXiv:2003.11142"`.
        requires: Extras of Supple that it needs, such as `("ray",)`.
    """

    title: str
    paper: str
    requires: tuple[str, ...] = ()


_T = TypeVar("_T", bound="Technique")


def register(
    *, title: str, paper: str, requires: Sequence[str] = ()
) -> Callable[[type[_T]], type[_T]]:
    """Attaches the card to a technique's class, and does nothing else.

    Args:
        title: What readers call the technique.
        paper: Where it was published, such as `"arXiv:2003.11142"`.
        requires: Extras of Supple that it needs.

    Returns:
        A decorator that returns the class it was given.
    """
    card = Card(title, paper, tuple(requires))

    def attach(cls: type[_T]) -> type[_T]:
        cls.card = card
        return cls

    return attach


@dataclass(frozen=True, kw_only=True)
class Technique(ABC):
    """A published method as a value: fields are hyper-parameters, the kind gives the verb."""

    kind: ClassVar[str] = ""
    """The kind's name in lower case, such as `"transform"`."""
    card: ClassVar[Card]
    """What `@register` attached."""
    skips: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    """Conformance checks that can't apply: name of the check -> reason."""
    distinguishing: ClassVar[str] = ""
    """The one method that makes this technique what it is. With the base's method in its
    place the technique's own test must fail (a guard tries it)."""

    @property
    def key(self) -> str:
        """The key, from the file that defines the class, such as `"prune/global-mp"`."""
        return key_of(type(self))

    @classmethod
    def examples(cls) -> list[Self]:
        """Gives the settings that every check is run with.

        Returns:
            Instances; by default the one with default settings.
        """
        return [cls()]

    @classmethod
    def neutral(cls) -> Self | None:
        """Gives the setting that changes nothing, where there is one.

        Returns:
            An instance, or None.
        """
        return None


class Transform(Technique):
    """Kind: gives a changed copy of a model."""

    kind: ClassVar[str] = "transform"

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]] | None:
        """Gives a small model that conformance is checked with, and its inputs.

        Returns:
            The model and its positional inputs, batch first; None where any model will do.
        """
        return None

    @abstractmethod
    def apply(
        self,
        model: nn.Module,
        *,
        calibration: Any = None,
        loss: Callable[[Any, Any], Any] | None = None,
        generator: Generator | None = None,
        inplace: bool = False,
    ) -> nn.Module:
        """Applies the technique to a model.

        Args:
            model: The model; it is left bitwise untouched, also when this raises.
            calibration: Batches to gather statistics from, tuples or mappings.
            loss: `loss(output, batch) -> scalar`, for techniques that need gradients.
            generator: Source of all randomness; the global one is never used.
            inplace: Changes and returns `model` itself, where memory demands it.

        Returns:
            A new model.
        """


class RuleRun(Protocol):
    """What a rule's `start` returns: training in progress."""

    def step(self, batch: Any) -> Mapping[str, float]:
        """Trains on one batch and gives the losses by role."""

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""


class Rule(Technique):
    """Kind: a way to update weights, step by step."""

    kind: ClassVar[str] = "rule"

    @classmethod
    def toy(cls) -> Any:
        """Gives a small model that conformance is checked with.

        Returns:
            A model from (N, 5) to (N, 3), with always the same weights, which is made elastic
            in all ways that it can be, or such a network, made elastic; None where an elastic
            width will do.
        """
        return None

    @abstractmethod
    def start(self, net: Any, optimizer: Any, *args: Any, **kwargs: Any) -> RuleRun:
        """Begins training.

        Args:
            net: An elastic network or a plain module.
            optimizer: A `torch.optim.Optimizer` over its parameters.
            *args: What the room's base class adds.
            **kwargs: What the room's base class adds.

        Returns:
            A run with `step(batch) -> losses`, `state_dict` and `load_state_dict`.
        """


class SearchRun(Protocol):
    """What a search's `start` returns: a search in progress."""

    def ask(self, n: int) -> Sequence[Any]:
        """Proposes `n` configurations."""

    def tell(self, configs: Sequence[Any], values: Any) -> None:
        """Takes their values, an array `(n, objectives)` in which less is better."""

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later."""


class Search(Technique):
    """Kind: proposes configurations of a space and learns from their values."""

    kind: ClassVar[str] = "search"

    @abstractmethod
    def start(
        self,
        space: Any,
        objectives: Any,
        generator: Any,
        *,
        exact: Mapping[str, Any] | None = None,
        violation: Any = None,
    ) -> SearchRun:
        """Begins a search.

        Args:
            space: The `supple.Space` to search.
            objectives: Names of the values that `tell` will be given, all to be minimised.
            generator: Source of all randomness.
            exact: For some objectives, by name, what gives them without an evaluation.
            violation: What gives violations of constraints without an evaluation.

        Returns:
            A run with `ask(n) -> configs`, `tell(configs, values)` and `state_dict`.
        """


class Merge(Technique):
    """Kind: makes one model of several."""

    kind: ClassVar[str] = "merge"

    @abstractmethod
    def merge(self, models: Sequence[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """Makes one model of several of the same architecture.

        Args:
            models: The models; they are left untouched.
            *args: What the room's base class adds.
            **kwargs: What the room's base class adds.

        Returns:
            A new model.
        """


class Decode(Technique):
    """Kind: generates tokens."""

    kind: ClassVar[str] = "decode"

    @abstractmethod
    def generate(self, model: nn.Module, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """Continues a prompt.

        Args:
            model: A language model.
            prompt: Token ids, `(batch, tokens)`.
            *args: What the room's base class adds.
            **kwargs: What the room's base class adds.

        Returns:
            The prompt and what follows it, `(batch, more tokens)`.
        """


class Study(Technique):
    """Kind: an experiment that yields a table."""

    kind: ClassVar[str] = "study"

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the experiment and gives its table."""


class Build(Technique):
    """Kind: makes a plain module or optimizer."""

    kind: ClassVar[str] = "build"

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the `torch.nn.Module` or `torch.optim.Optimizer`."""


def key_of(cls: type[Technique]) -> str:
    """Gives the key of a technique's class from the file that defines it.

    Args:
        cls: The class.

    Returns:
        The last two parts of its module's path, such as `"prune/global-mp"`.
    """
    return "/".join(cls.__module__.split(".")[-2:]).replace("_", "-")


def techniques(room: str | None = None) -> list[str]:
    """Lists the keys of all techniques; reads file names and imports nothing.

    Args:
        room: Only this room, such as `"prune"`.

    Returns:
        Keys, by room in the order of `ROOMS` and by name within a room.

    Raises:
        UnknownTechniqueError: There is no such room.
    """
    if room is not None and room not in ROOMS:
        raise UnknownTechniqueError(
            f"there is no room '{room}'{nearest(room, ROOMS)} (rooms: {', '.join(ROOMS)})"
        )
    rooms = ROOMS if room is None else (room,)
    return [f"{one}/{name}" for one in rooms for name in _names_in(_PACKAGE / one)]


def technique(key: str) -> type[Any]:
    """Looks up the class of a technique, importing its one file.

    Args:
        key: Room and name, such as `"supernet/bignas"`.

    Returns:
        The class; call it with settings to get the technique.

    Raises:
        UnknownTechniqueError: No technique has this key; the message names the nearest.

    Example:
        >>> import supple
        >>> supple.technique("supernet/bignas").__name__
        'BigNAS'
    """
    room, _, name = str(key).partition("/")
    if room not in ROOMS or name not in _names_in(_PACKAGE / room):
        raise UnknownTechniqueError(
            f"there is no technique '{key}'{_nearest_key(str(key))} "
            "(`supple techniques` lists them all)"
        )
    module = importlib.import_module(f"supple.{room}.{name.replace('-', '_')}")
    return registered_in(module)


def registered_in(module: types.ModuleType) -> type[Technique]:
    """Gives the one class of a module that carries `@register`.

    Args:
        module: A technique's module.

    Returns:
        The class.

    Raises:
        SettingError: There is no such class, or there are several.
    """
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Technique)
        and value.__module__ == module.__name__
        and "card" in vars(value)
    ]
    if len(found) != 1:
        raise SettingError(
            f"{module.__name__} must have exactly one class with @register, it has "
            f"{len(found)}: {', '.join(cls.__name__ for cls in found) or 'none'}"
        )
    return found[0]


def settings(instance: Any) -> dict[str, Any]:
    """Gives a technique's settings in the form that recipes and JSON use.

    Args:
        instance: A technique, or any dataclass.

    Returns:
        Field name -> value; tuples become lists, a technique among them `{key: settings}`.
    """
    return {
        field.name: _plain(getattr(instance, field.name))
        for field in dataclasses.fields(instance)
        if field.init
    }


def from_settings(key: str, mapping: Mapping[str, Any] | None = None) -> Any:
    """Makes a technique from its key and the settings a recipe gives.

    Values are converted by the type of their field, since YAML reads `1e-4` as text.

    Args:
        key: Room and name, such as `"supernet/bignas"`.
        mapping: Field name -> value; None for the defaults.

    Returns:
        The technique.

    Raises:
        UnknownTechniqueError: No technique has this key.
        SettingError: A name is unknown or a value is of the wrong type or out of range.
    """
    return make(technique(key), mapping, name=key)


def make(cls: type[Any], mapping: Mapping[str, Any] | None, *, name: str = "") -> Any:
    """Makes a dataclass from a mapping, converting values by the type of their field.

    Args:
        cls: The dataclass.
        mapping: Field name -> value; None for the defaults.
        name: What error messages call it; the class's name by default.

    Returns:
        An instance.

    Raises:
        SettingError: A name is unknown, missing, or a value is of the wrong type.
    """
    name = name or cls.__name__
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise SettingError(
            f"the settings of {name} must be a mapping of names to values, got {mapping!r}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for given in mapping:
        if given not in fields:
            raise SettingError(
                f"{name} has no setting '{given}'{nearest(str(given), fields)} "
                f"(settings: {', '.join(fields) or 'none'})"
            )
    hints = typing.get_type_hints(cls)
    values = {
        given: _converted(value, hints[given], f"setting '{given}' of {name}")
        for given, value in mapping.items()
    }
    missing = [
        field.name
        for field in fields.values()
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingError(f"{name} needs a value for: {', '.join(missing)}")
    return cls(**values)


_PACKAGE = Path(__file__).parent
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def _names_in(folder: Path) -> list[str]:
    # Read anew each time: a file that is dropped in is there at once.
    return sorted(
        path.stem.replace("_", "-")
        for path in folder.glob("*.py")
        if path.stem != "base" and not path.stem.startswith("_")
    )


def _nearest_key(key: str) -> str:
    # `prune/awq` is nearer to `quantize/awq` than letters tell: compare names first.
    keys = techniques()
    name = key.rpartition("/")[2]
    same = [one for one in keys if one.partition("/")[2] == name]
    return f", did you mean '{same[0]}'?" if same else nearest(key, keys)


def _plain(value: Any) -> Any:
    if isinstance(value, Technique):
        return {value.key: settings(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return settings(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _converted(value: Any, hint: Any, what: str) -> Any:
    """Converts a value from YAML or JSON to the type of its field, or says why it can't."""
    if hint is Any or (value is None and hint in (None, type(None))):
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _converted_union(value, args, what)
    if origin is Literal:
        # YAML reads `no` and `8` as other types than text: compare what they print.
        matches = [option for option in args if option == value or str(option) == str(value)]
        if matches:
            return matches[0]
        options = ", ".join(map(repr, args))
        raise SettingError(f"{what} must be one of {options}, got {value!r}")
    container = origin or hint
    if container in (tuple, list, Sequence) and isinstance(value, (list, tuple)):
        return _converted_items(value, container, args, what)
    if isinstance(container, type) and issubclass(container, Mapping):
        if isinstance(value, Mapping):
            inner = args[1] if len(args) == 2 else Any
            return {
                key: _converted(one, inner, f"{what} at '{key}'") for key, one in value.items()
            }
    elif isinstance(hint, type) and issubclass(hint, Technique):
        return _converted_technique(value, hint, what)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else make(hint, value, name=what)
    elif hint in _SCALARS:
        converted = _SCALARS[hint](value)
        if converted is not None:
            return converted
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise SettingError(f"{what} must be {_named(hint)}, got {value!r}")


def _converted_union(value: Any, options: tuple[Any, ...], what: str) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        if type(value) is option:
            return value
    for option in options:
        try:
            return _converted(value, option, what)
        except SettingError:
            continue
    named = " or ".join(_named(option) for option in options)
    raise SettingError(f"{what} must be {named}, got {value!r}")


def _converted_items(
    value: Sequence[Any], container: Any, args: tuple[Any, ...], what: str
) -> Any:
    if container is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise SettingError(f"{what} must have {len(args)} values, got {list(value)!r}")
        hints = list(args)
    else:
        hints = [args[0] if args else Any] * len(value)
    items = [
        _converted(one, hint, f"value {index + 1} of {what}")
        for index, (one, hint) in enumerate(zip(value, hints, strict=True))
    ]
    return items if container is list else tuple(items)


def _converted_technique(value: Any, hint: type[Technique], what: str) -> Technique:
    if isinstance(value, str):
        value = from_settings(value)
    elif isinstance(value, Mapping) and len(value) == 1:
        (key, inner), *_ = value.items()
        value = from_settings(str(key), inner)
    if not isinstance(value, hint):
        raise SettingError(
            f"{what} must be a technique of kind {hint.__name__}, "
            f"as 'room/name' or {{room/name: settings}}, got {value!r}"
        )
    return value


def _as_bool(value: Any) -> bool | None:
    text = str(value).lower()
    return True if text in _TRUE else False if text in _FALSE else None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _as_int(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _as_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _as_str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _as_bool,
    float: _as_float,
    int: _as_int,
    str: _as_str,
}


def _named(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "nothing",
    }
    return names.get(
        hint, getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
    )
