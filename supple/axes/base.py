"""What an axis is: it finds its sites in a graph and says what each choice changes.

`at`, `extract` and the costs all read the same `Patch`, so an axis has no slicer, extractor or
cost of its own. A new axis is one class:

    @dataclass(frozen=True)
    class Bits(Axis):
        name = "bits"

        def sites(self, graph): ...
        def patch(self, site, choice): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn

from supple.errors import SettingError
from supple.graph.couple import Graph, Group
from supple.graph.dims import Atom
from supple.graph.integers import AttributeKey
from supple.space import Config, Site

__all__ = [
    "Axis",
    "GroupAxis",
    "GroupSite",
    "Inputs",
    "Learned",
    "Patch",
    "Reshaped",
    "RoundedInput",
    "RoundedWeight",
    "Sharing",
    "added",
    "below",
    "check_choices",
    "choices_of",
    "group_sites",
    "merge",
    "parameters_of",
    "selected",
    "without_added",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
InputTransform = Callable[[tuple[Any, ...], dict[str, Any]], Inputs]
Transform = Callable[..., Tensor]
_ADDED = "supple_"


def added(name: str) -> bool:
    """Whether a parameter is one that an axis has added to the model (`Axis.parameters`).

    Such parameters are trained and saved with the elastic network, and are no part of its
    sub-networks.

    Example:
        >>> added("stem.conv.supple_kernel_5"), added("stem.conv.weight")
        (True, False)
    """
    return name.rpartition(".")[2].startswith(_ADDED)


def without_added(model: nn.Module) -> nn.Module:
    """Takes the parameters that axes added out of a model, in place, and gives it back."""
    for module in model.modules():
        for name in [name for name in module._parameters if added(name)]:
            del module._parameters[name]
    return model


@dataclass(frozen=True)
class Learned:
    """A transform of a tensor that takes the values of parameters beside it.

    Args:
        change: `change(tensor, *values) -> tensor`, differentiable.
        parameters: Names of the parameters, in the order of `values`.
    """

    change: Transform
    parameters: tuple[str, ...]

    def __call__(self, tensor: Tensor, *values: Tensor) -> Tensor:
        """Transforms the tensor."""
        return self.change(tensor, *values)


class RoundedInput(ABC):
    """What a layer is given, rounded to numbers of few bits.

    Attributes:
        parameters: Names of parameters that say how, in the order of `values`.
    """

    parameters: tuple[str, ...]

    @abstractmethod
    def __call__(self, x: Tensor, *values: Tensor) -> Tensor:
        """Rounds, differentiably; shape and type stay."""

    @abstractmethod
    def packed(self, layer: nn.Module, *values: Tensor) -> nn.Module:
        """Gives a layer that rounds its input, with this one inside."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that a file holds for it."""


class RoundedWeight(ABC):
    """A layer's weight, rounded to numbers of few bits.

    Attributes:
        parameters: Names of parameters that say how, in the order of `values`.
    """

    parameters: tuple[str, ...]

    @abstractmethod
    def __call__(self, weight: Tensor, *values: Tensor) -> Tensor:
        """Rounds, differentiably; shape and type stay."""

    @abstractmethod
    def packed(
        self,
        layer: nn.Module,
        *values: Tensor,
        given: tuple[RoundedInput, tuple[Tensor, ...]] | None = None,
    ) -> nn.Module:
        """Gives a layer that holds codes in the place of this one, whose weight is as it was.

        Args:
            layer: The layer.
            *values: Of `parameters`.
            given: How its input is rounded, with the values that this takes, if it is.
        """

    @abstractmethod
    def nbytes(self, shape: Sequence[Any]) -> Any:
        """Bytes of codes and scales of a weight whose sizes are numbers, or arrays of such."""


@dataclass(frozen=True)
class Patch:
    """What a choice changes in a network.

    Attributes:
        sizes: Size of every dimension atom that shrinks; parameters and buffers are sliced to
            it, and the integers that the code computes with follow.
        tensors: For a parameter name, a differentiable transform of its (sliced) value;
            `Learned` ones are given the values of other parameters too.
        attributes: Values of integers stored on modules.
        modules: For a module path, the module that stands in its place, or the path of one of
            the network's own that does.
        dropped: Paths of blocks that are left out of their containers.
        inputs: For a module path (the empty one is the network), a transform of its inputs,
            `(args, kwargs) -> (args, kwargs)`.
        resized: Size of every dimension atom that a transform of `tensors` shrinks by itself:
            costs count it, nothing is sliced to it.
        downstream: Whether sizes that nothing here names change, too (numbers of tokens or
            pixels); with `inputs` they always may.
        weights: For a parameter name, a differentiable transform of its whole value, before
            anything is sliced (`Sharing`).
        rounded: For the name of a layer's weight, how it is rounded, after everything else;
            what is extracted has a layer that holds codes in the layer's place.
        rounded_inputs: For a layer's path, how what it is given is rounded.
    """

    sizes: Mapping[Atom, int] = field(default_factory=dict)
    tensors: Mapping[str, Transform] = field(default_factory=dict)
    attributes: Mapping[AttributeKey, int] = field(default_factory=dict)
    modules: Mapping[str, nn.Module | str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    inputs: Mapping[str, InputTransform] = field(default_factory=dict)
    resized: Mapping[Atom, int] = field(default_factory=dict)
    downstream: bool = False
    weights: Mapping[str, Transform] = field(default_factory=dict)
    rounded: Mapping[str, RoundedWeight] = field(default_factory=dict)
    rounded_inputs: Mapping[str, RoundedInput] = field(default_factory=dict)

    @property
    def structural(self) -> bool:
        """Whether it changes which operators run, not only their sizes."""
        return bool(self.modules) or self.reaches_on

    @property
    def reaches_on(self) -> bool:
        """Whether it may change any size behind it."""
        return bool(self.inputs) or self.downstream

    def runs(self, path: str) -> bool:
        """Whether the module at a path still has a place in the network."""
        if any(below(path, block) for block in self.dropped):
            return False
        return all(
            isinstance(other, str) and (below(path, other) or below(other, path))
            for replaced, other in self.modules.items()
            if below(path, replaced)
        )


def below(path: str, above: str) -> bool:
    """Whether a module path is another one, or lies inside it."""
    return path == above or path.startswith(above + ".")


def merge(patches: Iterable[Patch]) -> Patch:
    """All patches of a config as one."""
    sizes: dict[Atom, int] = {}
    resized: dict[Atom, int] = {}
    tensors: dict[str, Transform] = {}
    attributes: dict[AttributeKey, int] = {}
    modules: dict[str, nn.Module | str] = {}
    dropped: set[str] = set()
    inputs: dict[str, InputTransform] = {}
    downstream = False
    weights: dict[str, Transform] = {}
    rounded: dict[str, RoundedWeight] = {}
    rounded_inputs: dict[str, RoundedInput] = {}
    for patch in patches:
        sizes.update(patch.sizes)
        resized.update(patch.resized)
        attributes.update(patch.attributes)
        modules.update(patch.modules)
        dropped.update(patch.dropped)
        for name, transform in patch.tensors.items():
            tensors[name] = _then(tensors.get(name), transform)
        for name, transform in patch.weights.items():
            weights[name] = _then(weights.get(name), transform)
        for path, change in patch.inputs.items():
            inputs[path] = _both(inputs[path], change) if path in inputs else change
        downstream = downstream or patch.downstream
        rounded.update(patch.rounded)
        rounded_inputs.update(patch.rounded_inputs)
    return Patch(
        sizes=sizes,
        tensors=tensors,
        attributes=attributes,
        modules=modules,
        dropped=frozenset(dropped),
        inputs=inputs,
        resized=resized,
        downstream=downstream,
        weights=weights,
        rounded=rounded,
        rounded_inputs=rounded_inputs,
    )


def _then(first: Transform | None, second: Transform) -> Transform:
    if first is None:
        return second
    own, more = parameters_of(first), parameters_of(second)

    def both(tensor: Tensor, *values: Tensor) -> Tensor:
        return second(first(tensor, *values[: len(own)]), *values[len(own) :])

    return Learned(both, (*own, *more))


def parameters_of(transform: Transform) -> tuple[str, ...]:
    """Names of the parameters that a transform takes beside the tensor."""
    return transform.parameters if isinstance(transform, Learned) else ()


def _both(first: InputTransform, second: InputTransform) -> InputTransform:
    return lambda args, kwargs: second(*first(args, kwargs))


class Reshaped(nn.Module):
    """A module whose inputs are changed first (scaled, say) as the size it stands for asks."""

    def __init__(
        self,
        network: nn.Module,
        inputs: InputTransform,
    ) -> None:
        super().__init__()
        self.network = network
        self.inputs = inputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.inputs(args, kwargs)
        return self.network(*args, **kwargs)


class Axis(ABC):
    """A way in which a network can vary.

    Attributes:
        name: The axis's name; its sites carry it.
        replaces: Whether the full choice changes the network, too (it leaves the alternatives
            out); otherwise its patch is empty.
        general: Whether its sites give way to those of other axes for the same dimensions.
    """

    name: ClassVar[str]
    replaces: ClassVar[bool] = False
    general: ClassVar[bool] = False

    def variants(self, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        """Contexts that make the model take other ways, which must be analysed as well."""
        return ()

    def on_device(self, divisors: Mapping[str, int]) -> Axis:
        """This axis with what pays on a device, where the setting was left open.

        Args:
            divisors: The multiple that channel counts are best rounded to, by kind of layer:
                `"conv"` and `"linear"`.
        """
        return self

    @abstractmethod
    def sites(self, graph: Graph) -> Sequence[Site]:
        """The places of the graph where this axis applies, each with its choices."""

    @abstractmethod
    def patch(self, site: Site, choice: int) -> Patch:
        """What `choice` at `site` changes; for the full choice, an empty patch."""

    def patch_of(self, site: Site, choice: int) -> Patch:
        """What `choice` changes; nothing at the full one, unless the axis replaces modules."""
        return (
            Patch() if choice == site.full and not self.replaces else self.patch(site, choice)
        )

    def paths(self, site: Site) -> tuple[str, ...]:
        """Paths of the modules that the site concerns; it exists while one of them runs.

        An empty tuple means the whole network.
        """
        return ()

    def parameters(self, site: Site) -> Mapping[str, Tensor]:
        """Parameters that the site's transforms need beside the model's own, by full name.

        They join the module that the name says, where they are not there yet, with these
        values. Their last names start with `supple_`.
        """
        return {}

    def fixed(self, graph: Graph) -> Mapping[str, str]:
        """What the axis looked at, by `parameter[dimensions]`, and why it is no site.

        An empty reason says that it is a site, whatever others say.
        """
        return {}


class Sharing(Axis):
    """Says which weights a size has: an axis without sites, whose patch depends on the size.

    Without one, all sizes slice the same weights. `Elastic.share` puts one in place; a network
    has at most one. What it adds to the model joins the optimizer when a method starts.
    """

    def sites(self, graph: Graph) -> Sequence[Site]:
        return ()

    def patch(self, site: Site, choice: int) -> Patch:
        return Patch()

    @abstractmethod
    def own(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Parameters that the sizes' weights are made of, beside the model's, by full name.

        They join the modules that the names say, where they are not there yet, with these
        values. Their last names start with `supple_`. A buffer would not be trained; state
        that is not trained belongs into the fields of this value.
        """

    @abstractmethod
    def chosen(self, config: Config) -> Hashable:
        """What, beside the config itself, decides about its weights; plans are kept by it."""

    @abstractmethod
    def weights(self, config: Config, model: nn.Module) -> Mapping[str, Transform]:
        """For a parameter name, a transform of the model's whole value into this size's.

        A `Learned` one is given the values of other parameters, those of `own` among them.
        """


@dataclass(frozen=True)
class GroupSite(Site):
    """A site that shrinks one group of coupled dimensions."""

    group: Group | None = field(default=None, compare=False, repr=False)

    @property
    def coupled(self) -> Group:
        """The group of dimensions that this site shrinks."""
        assert self.group is not None
        return self.group


class GroupAxis(Axis):
    """An axis whose sites are groups of coupled dimensions (width, heads)."""

    def patch(self, site: Site, choice: int) -> Patch:
        if not isinstance(site, GroupSite) or choice == site.full:
            return Patch()
        return Patch(sizes=site.coupled.sizes(choice))

    def paths(self, site: Site) -> tuple[str, ...]:
        assert isinstance(site, GroupSite)
        owners = (name.rpartition(".")[0] for name, _ in site.coupled.members)
        return tuple(dict.fromkeys((*owners, *site.coupled.modules)))


def group_sites(
    axis: str,
    groups: Iterable[Group],
    choices: Sequence[int | float] | None,
    divisor: int,
) -> list[Site]:
    """Sites for groups of coupled dimensions, with choices rounded to what is possible."""
    sites: list[Site] = []
    for group in groups:
        offered = choices_of(group.full, group.unit, choices, divisor)
        offered = tuple(choice for choice in offered if choice >= group.least)
        if len(offered) > 1:
            sites.append(GroupSite(group.name, axis, offered, group.full, group=group))
    return sites


def choices_of(
    full: int, unit: int, wanted: Sequence[int | float] | None, divisor: int
) -> tuple[int, ...]:
    """Sizes on offer for something of size `full`.

    Args:
        full: The full size; always on offer.
        unit: Sizes must be multiples of this.
        wanted: Fractions in (0, 1] (floats) or absolute sizes (integers, larger ones than
            `full` ignored); None for every multiple of `unit`.
        divisor: Fractions are rounded to multiples of this where the full size is at least
            eight times as large and divisible by it.

    Returns:
        Ascending sizes, the last one `full`.
    """
    if wanted is None:
        return tuple(range(unit, full + 1, unit))
    step = unit
    if divisor > unit and divisor % unit == 0 and full % divisor == 0 and full >= 8 * divisor:
        step = divisor
    sizes = {full}
    for choice in wanted:
        if isinstance(choice, float):
            sizes.add(min(full, max(step, round(choice * full / step) * step)))
        elif choice <= full and choice % unit == 0:
            sizes.add(choice)
    return tuple(sorted(sizes))


def check_choices(axis: str, choices: Sequence[int | float] | None) -> None:
    """Raise `SettingError` unless each choice is a fraction in (0, 1] or a positive integer."""
    for choice in choices or ():
        good = isinstance(choice, int | float) and not isinstance(choice, bool)
        if not good or choice <= 0 or (isinstance(choice, float) and choice > 1):
            raise SettingError(
                f"choices of {axis} must be fractions in (0, 1] or positive integers, "
                f"got {choice!r}"
            )
    if choices is not None and not choices:
        raise SettingError(f"choices of {axis} must not be empty; None offers every size")


def selected(name: str, where: str | None) -> bool:
    """Whether a site's name matches the pattern (shell style; None matches all)."""
    return where is None or fnmatchcase(name, where)
