"""Which layers see the same tensor, and who can make its channels larger or smaller exactly.

Dividing a channel of a layer's input by a number, and multiplying the weights that read it by
that number, changes nothing. Where the input comes from a norm's gain or from rows of a weight,
by way of operators that let a factor through, the division costs nothing either: these take it.

What lets a factor through is told by operator: reshaping, relu, a product with something else,
attention from its values to its output. A factor above 0 of each row of the producer is
followed through the recorded run until all readers are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from supple.graph.blocks import CONTRACTS, uses
from supple.graph.record import Call, Recording, Ref, record
from supple.graph.rules import argument, as_list

__all__ = ["Feed", "compared", "feeds"]


@dataclass(frozen=True, eq=False)
class Feed:
    """A tensor that layers see, and what can take a factor of its channels.

    Args:
        consumers: Names of the weights of all layers that see it, in the order in which they
            run.
        producer: Parameters, each with the dimension along which it is to be divided: a norm's
            gain and shift, or rows of a weight and its bias. None where nothing can take a
            factor: the layers' input has to be divided itself.
        size: How many channels the tensor has.
        units: For each channel its place in the producer, (size,). Several channels of one
            place (heads of queries that share one of values) need the same factor. Without a
            producer, the channels' own places.
    """

    consumers: tuple[str, ...]
    producer: tuple[tuple[str, int], ...] | None
    size: int
    units: Tensor

    def tied(self, values: Tensor) -> Tensor:
        """Gives channels that need the same factor the mean of their values.

        Args:
            values: (size,).

        Returns:
            The same shape.

        Example:
            >>> feed = Feed(("o.weight",), (("v.weight", 0),), 3, torch.tensor([0, 0, 1]))
            >>> feed.tied(torch.tensor([1.0, 3.0, 5.0])).tolist()
            [2.0, 2.0, 5.0]
        """
        units = self.units.to(values.device, torch.int64)
        count = torch.zeros(int(units.max()) + 1, dtype=values.dtype, device=values.device)
        sums = count.index_add(0, units, values)
        return (sums / count.index_add(0, units, torch.ones_like(values)).clamp_min(1))[units]


def feeds(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layers: str = "*",
) -> list[Feed]:
    """Finds what the layers of a network see.

    Layers are told by operator: products with a parameter named `weight`, and convolutions. A
    layer whose weight others share, too, is in no feed.

    Args:
        model: The network; it is run once in evaluation mode.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        layers: Pattern of the layers' paths, as in `supple.weights.matrices`. A feed some of
            whose layers don't match has no producer: the others would have to be changed.

    Returns:
        The feeds in the order in which their first layers run; a layer is in one at most.

    Example:
        >>> model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> for feed in feeds(model, (torch.ones(1, 5),)):
        ...     print(feed.consumers, feed.producer)
        ('0.weight',) None
        ('2.weight',) (('0.weight', 0), ('0.bias', 0))
    """
    run = _Run(record(model, args, kwargs))
    place = {name: number for number, name in enumerate(run.seen)}
    folded: dict[str, Feed] = {}
    for start in reversed(run.producers()):
        for feed in _Trace(run, start).feeds():
            if not any(name in folded for name in feed.consumers):
                folded.update(dict.fromkeys(feed.consumers, feed))
    found = list({id(feed): feed for feed in folded.values()}.values())
    together: dict[Any, list[str]] = defaultdict(list)
    for name, seen in run.seen.items():
        if name not in folded:
            together[seen[0].id if len(seen) == 1 else name].append(name)
    found += [_without_producer(names, run.size(names[0])) for names in together.values()]
    matched = [one for feed in found if (one := _of_layers(feed, layers)) is not None]
    return sorted(matched, key=lambda feed: place[feed.consumers[0]])


def compared(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> set[str]:
    """Finds the layers whose outputs attention compares: those of queries and keys.

    Args:
        model: The network; it is run once in evaluation mode.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        Names of their weights. A layer that gives queries, keys and values at once is one.
    """
    run = _Run(record(model, args, kwargs))
    made: dict[int, frozenset[str]] = {}
    scores: dict[int, frozenset[str]] = {}
    found: set[str] = set()
    for call in run.calls:
        weight = run.weight_of(call)
        from_layers = [made.get(ref.id, frozenset()) for ref in call.inputs]
        if weight is not None:
            _note(made, call, frozenset((weight,)))
        elif "scaled_dot_product" in call.name:
            found |= from_layers[0] | from_layers[1]
        elif call.name in CONTRACTS:
            _note(scores, call, frozenset().union(*from_layers))
        else:
            _note(made, call, frozenset().union(*from_layers))
            asked = frozenset[str]().union(*(scores.get(r.id, ()) for r in call.inputs))
            if "softmax" in call.name:
                found |= asked
            else:
                _note(scores, call, asked)
    return found


def _note(into: dict[int, frozenset[str]], call: Call, names: frozenset[str]) -> None:
    for ref in call.outputs if names else ():
        into[ref.id] = names


def _without_producer(names: Sequence[str], size: int) -> Feed:
    return Feed(tuple(names), None, size, torch.arange(size))


def _of_layers(feed: Feed, layers: str) -> Feed | None:
    names = [n for n in feed.consumers if _matching(n.rpartition(".")[0], layers)]
    if len(names) == len(feed.consumers):
        return feed
    return _without_producer(names, feed.size) if names else None


def _matching(path: str, patterns: str) -> bool:
    # As `supple.weights.matching`, which lies above what networks are recorded by.
    given = [one.strip() for one in patterns.split(",")]
    within = [one for one in given if not one.startswith("!")] or ["*"]
    without = [one[1:] for one in given if one.startswith("!")]
    inside, outside = (any(fnmatchcase(path, p) for p in some) for some in (within, without))
    return inside and not outside


# ------------------------------------------------------------------------------ the run at hand

_PRODUCTS = ("aten::mm", "aten::addmm")
_CONVOLVES = "aten::convolution"
_TURNS = ("aten::t", "aten::transpose", "aten::permute", "aten::detach", "aten::alias")


@dataclass(frozen=True)
class _Start:
    """Where factors begin: parameters that take them, and the tensor that then has them."""

    position: int
    takes: tuple[tuple[str, int], ...]
    output: Ref
    dim: int


class _Run:
    """A recording with its layers, and who reads what."""

    def __init__(self, recording: Recording) -> None:
        self.calls = recording.calls
        self.last = uses(recording)
        self.returned = {ref.id for ref in recording.outputs}
        self.names = {ref.id: name for name, ref in recording.tensors.items()}
        self._reads = Counter(ref.id for call in self.calls for ref in call.inputs)
        self._owners = Counter(recording.aliases.values())
        self._sources = self._turned()
        self.seen = self._layers(recording)

    def _turned(self) -> dict[int, int]:
        """Numbers of tensors that are a parameter of two dimensions, turned or not."""
        found = {number: number for number in self.names}
        for call in self.calls:
            if call.name in _TURNS and call.inputs[0].id in found:
                found[call.outputs[0].id] = found[call.inputs[0].id]
        return found

    def _layers(self, recording: Recording) -> dict[str, list[Ref]]:
        """Name of a layer's weight to the tensors that the layer is given."""
        weights = dict.fromkeys(
            name for call in self.calls if (name := self.weight_of(call)) is not None
        )
        given: dict[str, list[Ref]] = {name: [] for name in weights}
        for call in recording.modules:
            name = f"{call.path}.weight" if call.path else "weight"
            if name in given and call.inputs:
                given[name].append(call.inputs[0])
        own = {name: seen for name, seen in given.items() if self._owners[name] == 1}
        self._widths = {
            self.weight_of(call): self.entering(call).shape[1 if _convolves(call) else -1]
            for call in self.calls
            if self.weight_of(call) in own
        }
        return {name: own[name] for name in own if own[name]}

    def size(self, name: str) -> int:
        """How many channels a layer's input has."""
        return self._widths[name]

    def weight_of(self, call: Call) -> str | None:
        """The name of a layer's weight, where the call is the product of a layer."""
        if call.name not in _PRODUCTS and not _convolves(call):
            return None
        weight = call.args[1] if _convolves(call) else call.args[-1]
        name = self.names.get(self._sources.get(weight.id, -1))
        own = f"{call.module}.weight" if call.module else "weight"
        return name if name == own else None

    def entering(self, call: Call) -> Ref:
        """What the product of a layer is given."""
        found: Ref = call.args[0] if _convolves(call) else call.args[-2]
        return found

    def own(self, ref: Any) -> str | None:
        """The name of a parameter that one call reads, and that has no other name."""
        name = self.names.get(ref.id) if isinstance(ref, Ref) else None
        once = name is not None and self._reads[ref.id] == 1 and self._owners[name] == 1
        return name if once else None

    # -- producers

    def producers(self) -> list[_Start]:
        """Where factors can begin, in the order of the run."""
        found = []
        for position, call in enumerate(self.calls):
            made = self._producer(call)
            if made is not None:
                takes, dim = made
                found.append(_Start(position, takes, call.outputs[0], dim))
        return found

    def _producer(self, call: Call) -> tuple[tuple[tuple[str, int], ...], int] | None:
        if call.name in _PRODUCTS or _convolves(call):
            return self._rows(call)
        if call.name in _NORMS:
            dim = 1 if call.name in _CHANNEL_NORMS else -1
            return self._gain(argument(call, "weight"), argument(call, "bias"), dim)
        if call.name == "aten::mul":
            for ref in call.inputs:
                wide = [d for d, n in enumerate(ref.shape) if n > 1]
                others = [one for one in call.inputs if one.id not in self.names]
                if len(wide) == 1 and len(others) == 1 and self.own(ref):
                    return ((str(self.own(ref)), wide[0]),), wide[0] - len(ref.shape)
        return None

    def _rows(self, call: Call) -> tuple[tuple[tuple[str, int], ...], int] | None:
        convolves = _convolves(call)
        weight = call.args[1] if convolves else call.args[-1]
        source = self._sources.get(weight.id)
        name = self.names.get(-1 if source is None else source)
        if source is None or name is None or self._reads[source] != 1:
            return None
        turned = source != weight.id
        bias = argument(call, "bias") if convolves else (call.args[:-2] or (None,))[0]
        if convolves and argument(call, "transposed") and argument(call, "groups") > 1:
            return None
        dim = int(argument(call, "transposed")) if convolves else int(not turned)
        if self._owners[name] > 1 or (bias is not None and not self.own(bias)):
            return None
        takes = ((name, dim), *(((str(self.own(bias)), 0),) if bias is not None else ()))
        return takes, 1 if convolves else -1

    def _gain(
        self, gain: Any, shift: Any, dim: int
    ) -> tuple[tuple[tuple[str, int], ...], int] | None:
        tensors = [ref for ref in (gain, shift) if ref is not None]
        alone = all(self.own(ref) and len(ref.shape) == 1 for ref in tensors)
        if gain is None or not alone:
            return None
        return tuple((str(self.own(ref)), 0) for ref in tensors), dim


def _convolves(call: Call) -> bool:
    return call.name == _CONVOLVES


_CHANNEL_NORMS = frozenset(
    f"aten::{name}"
    for name in (
        "_batch_norm_no_update",
        "_native_batch_norm_legit_no_training",
        "batch_norm",
        "cudnn_batch_norm",
        "native_batch_norm",
        "native_group_norm",
    )
)
_NORMS = _CHANNEL_NORMS | {"aten::_fused_rms_norm", "aten::native_layer_norm"}


# ---------------------------------------------------------------------------- following factors


@dataclass
class _Trace:
    """Follows the rows of one producer: tensors have, at each place, the number of a row."""

    run: _Run
    start: _Start
    labels: dict[int, Tensor] = field(default_factory=dict)
    storages: dict[int, int] = field(default_factory=dict)
    blocked: set[int] = field(default_factory=set)
    read: dict[str, Tensor] = field(default_factory=dict)
    takes: list[tuple[str, int]] = field(default_factory=list)

    def feeds(self) -> Iterator[Feed]:
        """The feeds of which the producer can take all factors."""
        self._follow()
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, labels in self.read.items():
            groups[tuple(labels.tolist())].append(name)
        times = Counter(unit for units in groups for unit in set(units))
        for units, names in groups.items():
            alone = all(times[unit] == 1 for unit in units)
            if alone and not self.blocked.intersection(units):
                own = torch.tensor(units)
                yield Feed(tuple(names), tuple(self.takes), len(units), own)

    def _follow(self) -> None:
        output, dim = self.start.output, self.start.dim
        self.takes = list(self.start.takes)
        rows = output.shape[dim]
        shape = [1] * len(output.shape)
        shape[dim] = rows
        first = torch.arange(rows, dtype=torch.int32).reshape(shape).expand(output.shape)
        self._put(output, first)
        for position in range(self.start.position + 1, len(self.run.calls)):
            self._pass(self.run.calls[position])
            if all(self.run.last.get(number, -1) <= position for number in self.labels):
                break

    def _put(self, ref: Ref, labels: Tensor) -> None:
        self.labels[ref.id], self.storages[ref.id] = labels, ref.storage
        if ref.id in self.run.returned:
            self._block(labels)

    def _block(self, labels: Tensor) -> None:
        self.blocked.update(torch.unique(labels).tolist())

    def _pass(self, call: Call) -> None:
        self._check_memory(call)
        have = [ref for ref in call.inputs if ref.id in self.labels]
        if not have:
            return
        name = self.run.weight_of(call)
        if name is not None and have == [self.run.entering(call)]:
            self._reach(name, call, self.labels[have[0].id])
            return
        rule = _RULES.get(call.name)
        made = None if rule is None else rule(self, call)
        if made is None:
            for ref in have:
                self._block(self.labels[ref.id])
            return
        for ref, labels in zip(call.outputs, made, strict=False):
            self._put(ref, labels)

    def _reach(self, name: str, call: Call, labels: Tensor) -> None:
        kept = 1 if _convolves(call) else labels.dim() - 1
        units = _at_all(labels, [d for d in range(labels.dim()) if d != kept])
        if units is None or len(self.run.seen.get(name, ())) != 1 or name in self.read:
            self._block(labels)
        else:
            self.read[name] = units.flatten()

    def _check_memory(self, call: Call) -> None:
        """What is written to in place, by whatever view of it, has its factors no more."""
        if not call.op._schema.is_mutable or call.name in _RULES:
            return
        written = {ref.storage for ref in call.outputs}
        for number, storage in self.storages.items():
            if storage in written:
                self._block(self.labels[number])

    def of(self, ref: Any) -> Tensor | None:
        """The labels of a tensor."""
        return self.labels.get(ref.id) if isinstance(ref, Ref) else None

    def stop(self, *given: Any) -> None:
        """Says that what these tensors have factors of can have none."""
        for ref in given:
            labels = self.of(ref)
            if labels is not None:
                self._block(labels)


_Rule = Callable[[_Trace, Call], "Iterable[Tensor] | None"]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update({f"aten::{name}": rule for name in names})
        return rule

    return register


def _at_all(labels: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Labels with a size of 1 along dimensions, where they don't change along these."""
    one = labels
    for dim in dims:
        one = one.narrow(dim, 0, min(1, one.shape[dim]))
    return one if one.numel() and torch.equal(one.expand(labels.shape), labels) else None


@_rule("alias", "clone", "contiguous", "detach", "expand", "flip", "permute", "repeat")
@_rule("repeat_interleave", "roll", "select", "slice", "split", "split_with_sizes", "squeeze")
@_rule("t", "transpose", "unbind", "unsqueeze")
def _moves(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels = trace.of(call.args[0])
    if labels is None or len(call.inputs) > 1:
        return None
    found: list[Tensor] = as_list(call.op(labels, *call.args[1:], **call.kwargs))
    return found


@_rule("_unsafe_view", "reshape", "view")
def _reshapes(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels, made = trace.of(call.args[0]), call.outputs[0]
    same = made.dtype == call.inputs[0].dtype
    return [labels.reshape(made.shape)] if labels is not None and same else None


@_rule("_to_copy", "abs", "leaky_relu", "leaky_relu_", "native_dropout", "neg", "relu", "relu_")
@_rule("to", "dropout")
def _passes(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels = trace.of(call.args[0])
    real = call.outputs[0].dtype.is_floating_point
    return [labels] if labels is not None and real else None


@_rule("mul", "mul_", "div", "div_")
def _multiplies(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels, other = trace.of(call.args[0]), trace.of(call.args[1])
    if labels is not None and other is not None:
        return None
    if labels is None and call.name != "aten::mul":
        return None
    if call.kwargs.get("rounding_mode") is not None:
        return None
    one = labels if labels is not None else other
    assert one is not None
    return [one.expand(call.outputs[0].shape)]


@_rule("add", "add_", "sub", "sub_")
def _adds(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    shape = call.outputs[0].shape
    given = [trace.of(one) for one in call.args[:2]]
    have = [one.expand(shape) for one in given if one is not None]
    if len(have) == 2:
        return have[:1] if torch.equal(*have) else None
    # A bias takes the factors of what it is added to.
    bias = next(arg for arg, one in zip(call.args[:2], given, strict=False) if one is None)
    name, rows = trace.run.own(bias), trace.start.output.shape[trace.start.dim]
    if name is None or [n for n in bias.shape if n > 1] != [rows]:
        return None
    dim = bias.shape.index(rows)
    places = [1] * (len(shape) - len(bias.shape)) + [*bias.shape]
    own = torch.arange(rows, dtype=torch.int32).reshape(places).expand(shape)
    if not torch.equal(own, have[0]):
        return None
    trace.takes.append((name, dim))
    return have


@_rule("cat")
def _joins(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    parts = [ref for ref in call.args[0] if 0 not in ref.shape]
    have = [trace.of(ref) for ref in parts]
    if any(one is None for one in have):
        return None
    dim = argument(call, "dim", 0)
    return [torch.cat([one for one in have if one is not None], int(dim))]


@_rule("_adaptive_avg_pool2d", "adaptive_avg_pool1d", "avg_pool2d", "avg_pool3d")
@_rule("max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_nearest2d")
@_rule("upsample_bilinear2d", "constant_pad_nd")
def _pools(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels, shape = trace.of(call.args[0]), call.outputs[0].shape
    if labels is None or labels.dim() < 3 or labels.shape[:2] != shape[:2]:
        return None
    if call.name == "aten::constant_pad_nd" and argument(call, "value", 0):
        return None
    one = _at_all(labels, range(2, labels.dim()))
    return None if one is None else [one.expand(shape)]


@_rule("mean", "sum", "amax")
def _reduces(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels = trace.of(call.args[0])
    if labels is None:
        return None
    dims = [int(d) % labels.dim() for d in as_list(argument(call, "dim", None) or [])]
    one = _at_all(labels, dims or range(labels.dim()))
    return None if one is None else [one.reshape(call.outputs[0].shape)]


@_rule("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention")
@_rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
@_rule("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math")
def _attends(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels, shape = trace.of(call.args[2]), call.outputs[0].shape
    trace.stop(call.args[0], call.args[1])
    one = None if labels is None else _at_all(labels, [labels.dim() - 2])
    if one is None:
        return None
    if len(shape) > 3:  # several heads of queries may share one of values
        one = one.repeat_interleave(shape[-3] // one.shape[-3], -3)
    return [one.expand(shape)]


@_rule("bmm")
def _mixes(trace: _Trace, call: Call) -> Iterable[Tensor] | None:
    labels = trace.of(call.args[1])
    trace.stop(call.args[0])
    one = None if labels is None else _at_all(labels, [1])
    return None if one is None else [one.expand(call.outputs[0].shape)]
