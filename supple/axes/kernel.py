"""Kernel: how large the kernels of convolutions are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from supple.axes.base import Axis, Learned, Patch, selected
from supple.errors import SettingError
from supple.graph.couple import Graph
from supple.graph.dims import Atom, atoms
from supple.graph.integers import AttributeKey, TracedInt
from supple.graph.record import Call
from supple.graph.rules import argument
from supple.space import Site

__all__ = ["Kernel"]

_CONVOLUTIONS = ("aten::convolution", "aten::_convolution", "aten::mkldnn_convolution")


@dataclass(frozen=True)
class Filter:
    """A parameter that convolutions use as their weight, and nothing else does.

    Attributes:
        name: The parameter's name.
        dims: The dimensions of the kernel that are larger than 1.
        full: Their size, the same in all of them.
        atoms: Their atoms.
        paddings: For each integer that gives a padding, the dilation of that dimension.
        modules: Paths of the modules whose forwards use it.
    """

    name: str
    dims: tuple[int, ...]
    full: int
    atoms: tuple[Atom, ...]
    paddings: Mapping[AttributeKey, int]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class KernelSite(Site):
    """A site that crops the kernels of one parameter."""

    filter: Filter | None = field(default=None, compare=False, repr=False)

    @property
    def cropped(self) -> Filter:
        """The parameter that this site crops."""
        assert self.filter is not None
        return self.filter


@dataclass(frozen=True)
class Kernel(Axis):
    r"""Makes the kernel size of convolutions elastic: smaller kernels are centres of larger.

    Any convolution in one, two or three dimensions has a site, depthwise, grouped, strided or
    dilated ones too, if its kernel is odd and its padding keeps the output's size whatever the
    kernel is (`padding == dilation * (kernel // 2)`, or `"same"`); the padding follows the
    choice. Dimensions in which the kernel has size 1 stay.

    With `transform` a smaller kernel is a learned function of the larger one, since one set of
    weights serves badly as several filters: the centre, flattened, is multiplied by a matrix
    of size $k^n \times k^n$ that all channels of the layer share. Going from 7 to 3 by way of
    5, both steps are transformed. The matrices start as the identity. They are parameters of
    the layer (`supple_weight_to5`): `net.module.parameters()` has them, optimizers train them,
    checkpoints and files hold them. Extracted networks hold the kernel that comes out.

    Args:
        choices: Kernel sizes on offer, odd; those above a layer's own are left out there. The
            full size is always on offer. None offers every odd size from 1.
        transform: Whether smaller kernels are learned transforms of the larger ones.
        where: Only sites whose name matches this shell-style pattern.

    Raises:
        SettingError: A choice is not an odd integer above 0.

    Example:
        >>> import supple
        >>> conv = torch.nn.Conv2d(3, 8, 5, padding=2)
        >>> net = supple.elastic(conv, torch.ones(2, 3, 9, 9), axes=[Kernel()])
        >>> net.extract({"kernel": 3}).weight.shape
        torch.Size([8, 3, 3, 3])

    Source:
        The transform: Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for
        Efficient Deployment", arXiv:1908.09791, section 3.3.
    """

    choices: tuple[int, ...] | None = (3, 5, 7)
    transform: bool = False
    where: str | None = None
    name: ClassVar[str] = "kernel"

    def __post_init__(self) -> None:
        if self.choices is None:
            return
        object.__setattr__(self, "choices", tuple(self.choices))
        for choice in self.choices:
            if isinstance(choice, bool) or not isinstance(choice, int) or choice % 2 != 1:
                raise SettingError(
                    f"choices of {self.name} must be odd integers above 0, got {choice!r}"
                )
            if choice < 1:
                raise SettingError(f"choices of {self.name} must be above 0, got {choice}")
        if not self.choices:
            raise SettingError(
                f"choices of {self.name} must not be empty; None offers every odd size"
            )

    def sites(self, graph: Graph) -> Sequence[Site]:
        found = _filters(graph)[0]
        names = [_site_name(one.name) for one in found]
        return [
            KernelSite(name, self.name, offered, one.full, filter=one)
            for name, one in zip(names, found, strict=True)
            if selected(name, self.where) and len(offered := self._offered(one.full)) > 1
        ]

    def _offered(self, full: int) -> tuple[int, ...]:
        wanted = range(1, full, 2) if self.choices is None else self.choices
        return tuple(sorted({choice for choice in wanted if choice < full} | {full}))

    def patch(self, site: Site, choice: int) -> Patch:
        assert isinstance(site, KernelSite)
        if choice == site.full:
            return Patch()
        one = site.cropped
        steps = self._steps(site)
        sizes = tuple(size for size in steps if size >= choice) if self.transform else (choice,)
        crop = _Crop(one.dims, sizes)
        taken = tuple(steps[size] for size in sizes) if self.transform else ()
        return Patch(
            tensors={one.name: Learned(crop, taken) if taken else crop},
            attributes={key: by * (choice // 2) for key, by in one.paddings.items()},
            resized=dict.fromkeys(one.atoms, choice),
        )

    def paths(self, site: Site) -> tuple[str, ...]:
        assert isinstance(site, KernelSite)
        return site.cropped.modules

    def parameters(self, site: Site) -> Mapping[str, Tensor]:
        assert isinstance(site, KernelSite)
        if not self.transform:
            return {}
        count = len(site.cropped.dims)
        return {name: torch.eye(size**count) for size, name in self._steps(site).items()}

    def _steps(self, site: KernelSite) -> dict[int, str]:
        """The sizes on the way from the full one down, with the parameters of the steps."""
        path, _, leaf = site.cropped.name.rpartition(".")
        start = f"{path}." if path else ""
        smaller = sorted(site.choices[:-1], reverse=True)
        return {size: f"{start}supple_{leaf}_to{size}" for size in smaller}

    def fixed(self, graph: Graph) -> Mapping[str, str]:
        found, reasons = _filters(graph)
        offered = {
            _label(one.name, one.dims): ""
            for one in found
            if selected(_site_name(one.name), self.where)
        }
        return {**offered, **reasons}


@dataclass(frozen=True)
class _Crop:
    """Keeps the centre of kernels, by way of these sizes.

    Where values are given, each is a matrix that the flattened centre is multiplied by.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, kernel: Tensor, *matrices: Tensor) -> Tensor:
        for step, size in enumerate(self.sizes):
            for dim in self.dims:
                start = (kernel.shape[dim] - size) // 2
                kernel = kernel.narrow(dim, start, size)
            if matrices:
                flat = kernel.flatten(2) @ matrices[step].T
                kernel = flat.reshape(kernel.shape)
        return kernel


# --- which parameters are kernels -------------------------------------------------------------


class _FixedError(Exception):
    """Why a kernel's size cannot vary."""


def _filters(graph: Graph) -> tuple[list[Filter], dict[str, str]]:
    """The kernels that can be cropped, and the others with the reason, by label."""
    names = {ref.id: name for name, ref in graph.recording.tensors.items()}
    uses: dict[str, list[Call]] = defaultdict(list)
    for call in graph.recording.calls:
        for ref in call.inputs:
            if ref.id in names:
                uses[names[ref.id]].append(call)
    found: list[Filter] = []
    reasons: dict[str, str] = {}
    for name, calls in uses.items():
        shape = graph.recording.tensors[name].shape
        dims = tuple(dim for dim in range(2, len(shape)) if shape[dim] > 1)
        if not dims or not any(_is_weight(call, graph, name) for call in calls):
            continue
        try:
            found.append(_filter(graph, name, dims, calls))
        except _FixedError as reason:
            reasons[_label(name, dims)] = str(reason)
    return _apart(found, reasons), reasons


def _is_weight(call: Call, graph: Graph, name: str) -> bool:
    """Whether the call is a convolution with this parameter as its weight."""
    weight = graph.recording.tensors[name]
    return call.name in _CONVOLUTIONS and call.inputs[1].id == weight.id


def _filter(graph: Graph, name: str, dims: tuple[int, ...], calls: list[Call]) -> Filter:
    shape = graph.recording.tensors[name].shape
    sizes = {shape[dim] for dim in dims}
    if len(sizes) > 1:
        kernel = " x ".join(map(str, shape[2:]))
        raise _FixedError(f"its kernel, {kernel}, has not one size in all directions")
    full = sizes.pop()
    if full % 2 == 0:
        raise _FixedError(f"its kernel size, {full}, is even, so that it has no centre")
    paddings: dict[AttributeKey, int] = {}
    for call in calls:
        if not _is_weight(call, graph, name):
            other = call.name.removeprefix("aten::")
            raise _FixedError(f"its weight is also used by '{other}', not by convolutions only")
        for key, by in _paddings(graph, call, dims, full):
            if paddings.setdefault(key, by) != by:
                raise _FixedError(f"{key} is the padding for several dilations")
    owned = graph.tensors[name]
    return Filter(
        name=name,
        dims=dims,
        full=full,
        atoms=tuple(atom for dim in dims for atom in atoms(owned[dim])),
        paddings=paddings,
        modules=tuple(dict.fromkeys(call.module for call in calls)),
    )


def _paddings(
    graph: Graph, call: Call, dims: Sequence[int], full: int
) -> Iterator[tuple[AttributeKey, int]]:
    """The integers that say a convolution's padding, each with the dilation beside it."""
    if argument(call, "transposed", False):
        raise _FixedError("it is the kernel of a transposed convolution")
    padding, dilation = argument(call, "padding"), argument(call, "dilation")
    for dim in dims:
        keeping = dilation[dim - 2] * (full // 2)
        if padding[dim - 2] != keeping:
            raise _FixedError(
                f"its padding, {padding[dim - 2]}, would have to be {keeping} for the output's "
                "size not to depend on the kernel's"
            )
    module = graph.model.get_submodule(call.module)
    if getattr(module, "padding", None) == "same":
        return  # worked out from the kernel in each call
    given = _given_padding(call)
    for dim in dims:
        integer = given[dim - 2]
        if not isinstance(integer, TracedInt) or not isinstance(
            integer.expression, AttributeKey
        ):
            raise _FixedError("its padding is computed in the code, or written there")
        yield integer.expression, dilation[dim - 2]


def _given_padding(call: Call) -> list[int | None]:
    """The integers that the code gave as padding, one for each dimension.

    The recording has the integers given to a function in order, without the arguments' names.
    All ways of telling them apart are tried: an argument may be left out where it has its
    default, and one number may stand for all dimensions.
    """
    values = [argument(call, name) for name in ("stride", "padding", "dilation")]
    defaults = (1, 0, 1)
    options = [
        [
            list(value),
            *([value[:1]] if len(set(value)) == 1 else []),
            *([[]] if set(value) == {d} else []),
        ]
        for value, d in zip(values, defaults, strict=True)
    ]
    groups = argument(call, "groups")
    options.append([[groups], *([[]] if groups == 1 else [])])
    places = set()
    for parts in product(*options):
        if [*parts[0], *parts[1], *parts[2], *parts[3]] == call.integers:
            first, length = len(parts[0]), len(parts[1])
            count = len(values[1])
            places.add(tuple(first + (i if length == count else 0) for i in range(count)))
    if len(places) != 1:
        raise _FixedError(
            f"which integer given to '{call.function}' is its padding is not clear"
        )
    return [call.integers[place] for place in places.pop()]


def _apart(found: list[Filter], reasons: dict[str, str]) -> list[Filter]:
    """Leaves out kernels that share an integer with another one, and says so."""
    owners: dict[AttributeKey, list[Filter]] = defaultdict(list)
    for one in found:
        for key in one.paddings:
            owners[key].append(one)
    shared = {key: each for key, each in owners.items() if len(each) > 1}
    for key, each in shared.items():
        for one in each:
            reasons[_label(one.name, one.dims)] = f"{key} is the padding of other kernels too"
    return [one for one in found if _label(one.name, one.dims) not in reasons]


def _label(name: str, dims: Sequence[int]) -> str:
    return f"{name}[{', '.join(map(str, dims))}]"


def _site_name(parameter: str) -> str:
    """`block.conv.kernel` for the weight of `block.conv`; other parameters keep their name."""
    path, _, leaf = parameter.rpartition(".")
    return ".".join(filter(None, (path, "" if leaf == "weight" else leaf, "kernel")))
