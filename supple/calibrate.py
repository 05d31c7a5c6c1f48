"""What calibration data tell about a network: inputs of layers, gradients, hidden states.

One pass serves all that prune, factorize and quantize:

- `statistics` watches the inputs of layers through observers, streaming: nothing grows with
  the number of batches. What an observer is asked for by name (`OBSERVERS`), or brought along;
- `gradients` gathers norms of the loss' gradients, and `inputs` and `outputs` hidden states;
- `block_by_block` walks through a deep network such that each block sees what the blocks
  before it give *after* they were changed, and `in_order` does so for its layers' statistics.

Statistics are gathered in evaluation mode and without changing the network. Batches are
mappings or tuples; tokens that a mapping's `attention_mask` marks as padding don't count.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from supple.cost.count import params
from supple.errors import SettingError, UnsupportedModelError, nearest
from supple.plan import Shadows
from supple.training.batches import Forward, Loss, batch_size, mapped, run_model, split
from supple.transforms import evaluating
from supple.weights import groups_of, matrices

__all__ = [
    "OBSERVERS",
    "BlockPass",
    "LayerStatistics",
    "Observer",
    "block_by_block",
    "blocks_of",
    "gradients",
    "grouped",
    "in_order",
    "inputs",
    "outputs",
    "statistics",
    "taking_gradients",
]

_PIECE = 1 << 24
"""Numbers that a convolution's inputs are laid out to at a time."""

# ---------------------------------------------------------------------------------- observers


class Observer(Protocol):
    """What watches the inputs of one layer and adds up what it sees."""

    def see(self, rows: Tensor) -> None:
        """Takes more inputs.

        Args:
            rows: Shape (groups, rows, columns), float32: what the layer's weight, as
                `supple.weights.as_matrix` lays it out, is multiplied by. Groups are those of a
                convolution, else 1.
        """

    def result(self) -> Any:
        """Gives what was found so far: a tensor with the groups first, or anything else."""


class _Reduced:
    """Adds up something that is computed from the inputs, or takes the larger one."""

    def __init__(
        self,
        reduce: Callable[[Tensor], Tensor],
        join: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> None:
        self._reduce, self._join = reduce, join
        self._found: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        now = self._reduce(rows)
        self._found = now if self._found is None else self._join(self._found, now)

    def result(self) -> Tensor | None:
        return self._found


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1, dtype=torch.float64)


def _sums(rows: Tensor) -> Tensor:
    return rows.sum(1, dtype=torch.float64)


def _products(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1)


OBSERVERS: Mapping[str, Callable[[], Observer]] = {
    "input_sq": partial(_Reduced, _squares),
    "input_sum": partial(_Reduced, _sums),
    "gram": partial(_Reduced, _products),
    "absmax": partial(_Reduced, _largest, torch.maximum),
}
"""What `statistics` can be asked for by name."""


class LayerStatistics:
    """What was seen of the inputs of one layer.

    A field that was not asked for, and any field of a layer that the data never reached (an
    expert that no token chose), raises `SettingError`.

    Args:
        name: Name of the layer's weight.
        groups: Groups of a convolution, else 1.
        observers: Name of a field to what gathers it.
    """

    def __init__(self, name: str, groups: int, observers: Mapping[str, Observer]) -> None:
        self.name = name
        self.rows = 0
        """How many inputs were seen: tokens, examples, or places of a kernel."""
        self._groups = groups
        self._observers = dict(observers)

    def __getitem__(self, field: str) -> Any:
        """Gives a field by its name, also one of an observer that was brought along."""
        if field not in self._observers:
            raise SettingError(
                f"'{field}' was not gathered of '{self.name}'{nearest(field, self._observers)} "
                f"(got: {', '.join(self._observers)}); name it in want="
            )
        if not self.rows:
            raise SettingError(
                f"no calibration data reached the layer of '{self.name}'; give more or other "
                "batches, or leave the layer out by layers="
            )
        found = self._observers[field].result()
        one = isinstance(found, Tensor) and self._groups == 1 and found.shape[:1] == (1,)
        return found[0] if one else found

    @property
    def input_sq(self) -> Tensor:
        """Sums of the inputs' squares: (columns,), or (groups, columns) of a grouped layer."""
        return self._tensor("input_sq")

    @property
    def input_sum(self) -> Tensor:
        """Sums of the inputs; shaped like `input_sq`."""
        return self._tensor("input_sum")

    @property
    def absmax(self) -> Tensor:
        """Largest absolute inputs; shaped like `input_sq`."""
        return self._tensor("absmax")

    @property
    def gram(self) -> Tensor:
        """Sums of products of two inputs: (columns, columns), grouped (groups, ...)."""
        return self._tensor("gram")

    def by_row(self, field: str, outputs: int) -> Tensor:
        """Gives a field once for each row of the weight's matrix.

        Args:
            field: `"input_sq"`, `"input_sum"` or `"absmax"`.
            outputs: Rows of the matrix.

        Returns:
            Shape (outputs, columns); rows of a convolution's group have that group's inputs.
        """
        found = self._tensor(field)
        grouped = found if self._groups > 1 else found[None]
        return grouped.repeat_interleave(outputs // self._groups, 0)

    def see(self, rows: Tensor) -> None:
        """Shows more inputs, shape (groups, rows, columns), to all observers."""
        self.rows += rows.shape[1]
        for observer in self._observers.values():
            observer.see(rows)

    def _tensor(self, field: str) -> Tensor:
        found = self[field]
        assert isinstance(found, Tensor)
        return found


# --------------------------------------------------------------------------- inputs of layers


@torch.no_grad()
def statistics(
    model: nn.Module,
    data: Iterable[Any],
    want: Sequence[str] = ("input_sq",),
    layers: str = "*",
    forward: Forward = run_model,
    *,
    observers: Mapping[str, Callable[[], Observer]] | None = None,
) -> dict[str, LayerStatistics]:
    """Runs a network on data and gathers what its layers' inputs are like.

    Args:
        model: The network; it is run in evaluation mode.
        data: Batches.
        want: Fields: of `OBSERVERS`, or of `observers`.
        layers: Pattern of the layers, as in `supple.weights.matrices`.
        forward: `forward(model, batch) -> output`; by default by the batch's type.
        observers: More fields, by name: what makes an observer of one layer.

    Returns:
        Name of a layer's weight to its statistics. A layer that is called several times, and
        layers that share a weight, add up.

    Raises:
        SettingError: A field is unknown, or no layer matches.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> batch = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]),)
        >>> statistics(model, [batch])["weight"].input_sq.tolist()
        [10.0, 4.0]
    """
    watch = _Watch(model, matrices(model, layers), want, observers)
    with evaluating(model), watch:
        for batch in data:
            with watch.on(batch):
                forward(model, batch)
    return watch.found


class _Watch:
    """Hooks on layers that show their inputs to observers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        want: Sequence[str],
        observers: Mapping[str, Callable[[], Observer]] | None,
    ) -> None:
        known = {**OBSERVERS, **(observers or {})}
        for field in want:
            if field not in known:
                raise SettingError(
                    f"there are no statistics '{field}'{nearest(field, known)} "
                    f"(there are: {', '.join(known)})"
                )
        self.found = {
            name: LayerStatistics(name, groups_of(layer), {one: known[one]() for one in want})
            for name, layer in layers.items()
        }
        names = {id(layer.weight): name for name, layer in layers.items()}
        self._hooked = [
            (module, names[id(weight)])
            for module in model.modules()
            if (weight := module._parameters.get("weight")) is not None and id(weight) in names
        ]
        self._handles: list[Any] = []
        self._real: Tensor | None = None

    def __enter__(self) -> None:
        for module, name in self._hooked:
            hook = partial(self._see, self.found[name])
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def on(self, batch: Any) -> Iterator[None]:
        """Says which batch is about to be run."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
            self._real = mask.bool()
        try:
            yield
        finally:
            self._real = None

    @torch.no_grad()
    def _see(self, found: LayerStatistics, module: nn.Module, args: Any, kwargs: Any) -> None:
        entered = (*args, *kwargs.values())[0].detach()
        for rows in _rows(module, entered, self._real):
            found.see(rows)


def _rows(module: nn.Module, entered: Tensor, real: Tensor | None) -> Iterator[Tensor]:
    """Yields what a layer's matrix is multiplied by, each (groups, rows, columns)."""
    if isinstance(module, _ConvNd):
        yield from _unfolded(module, entered.float())
        return
    if real is not None and entered.shape[:-1] == real.shape:
        entered = entered[real]
    elif real is not None and entered.shape[:-1] == (real.numel(),):
        entered = entered[real.flatten()]
    yield entered.reshape(1, -1, entered.shape[-1]).float()


def _unfolded(module: _ConvNd, entered: Tensor) -> Iterator[Tensor]:
    spatial = len(module.kernel_size)
    if entered.dim() == spatial + 1:
        entered = entered[None]
    if isinstance(module, _ConvTransposeNd):
        spread, strides = _spread(module, entered), (1,) * spatial
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        spread, strides = functional.pad(entered, padding, mode), module.stride
    for dim in range(spatial):
        reach = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        spread = spread.unfold(2 + dim, reach, strides[dim])[..., :: module.dilation[dim]]
    # (examples, channels, places, kernel) -> (examples, places, channels, kernel)
    places, kernel = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
    windows = spread.permute(0, *places, 1, *kernel)
    several = max(1, _PIECE * len(windows) // max(1, windows.numel()))
    for part in torch.split(windows, several):
        if isinstance(module, _ConvTransposeNd):
            part = part.flip([*range(part.dim() - spatial, part.dim())])
        columns = math.prod(part.shape[1 + spatial :]) // module.groups
        yield part.reshape(-1, module.groups, columns).transpose(0, 1)


def _spread(module: _ConvTransposeNd, entered: Tensor) -> Tensor:
    """Gives the input of the ordinary convolution that a transposed one is."""
    sides: list[int] = []
    for dim in range(len(module.kernel_size)):
        stride, length = module.stride[dim], entered.shape[2 + dim]
        shape = [*entered.shape]
        shape[2 + dim] = (length - 1) * stride + 1
        apart = entered.new_zeros(shape)
        apart[(slice(None),) * (2 + dim) + (slice(None, None, stride),)] = entered
        entered = apart
        padding = module.padding[dim]
        assert isinstance(padding, int)
        edge = module.dilation[dim] * (module.kernel_size[dim] - 1) - padding
        sides = [edge, edge + module.output_padding[dim], *sides]
    return functional.pad(entered, sides)


# ---------------------------------------------------------------------------------- gradients

_GATHERED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "l1": torch.abs,
    "l2": torch.square,
    "mean": lambda gradient: gradient,
}


def gradients(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    want: Sequence[str] = ("l1", "l2", "mean"),
    *,
    layers: str = "*",
    names: Sequence[str] | None = None,
    per_example: bool = False,
    forward: Forward = run_model,
) -> dict[str, dict[str, Tensor]]:
    r"""Gathers what the loss' gradients in the weights are like, over the batches of data.

    With $g_b$ the gradient of the loss of batch $b$ of $B$, `"mean"` is $\sum_b g_b / B$,
    `"l1"` is $\sum_b |g_b| / B$ and `"l2"` is $\sqrt{\sum_b g_b^2 / B}$. Batches count alike,
    whatever their size.

    Args:
        model: The network; it is run in evaluation mode, and its own gradients stay as they
            are. Parameters count whether they take gradients or not.
        data: Batches.
        loss: `loss(output, batch) -> scalar`.
        want: Some of `"l1"`, `"l2"` and `"mean"`.
        layers: Pattern of the layers, as in `supple.weights.matrices`.
        names: Names of parameters in place of the weights of `layers`.
        per_example: Whether each example is a batch of its own.
        forward: `forward(model, batch) -> output`; by default by the batch's type.

    Returns:
        Name of a parameter to field to a float32 tensor of the parameter's shape; zeros where
        the loss doesn't depend on it.

    Raises:
        SettingError: A field is unknown, there is no batch, the loss depends on none of the
            parameters, or a gradient is not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 2.0]]),), (torch.tensor([[-3.0, 0.0]]),)]
        >>> found = gradients(model, data, lambda output, batch: output.sum())["weight"]
        >>> found["mean"].tolist(), found["l1"].tolist()
        ([[-1.0, 1.0]], [[2.0, 1.0]])
    """
    for field in want:
        if field not in _GATHERED:
            raise SettingError(
                f"want must name some of {', '.join(_GATHERED)}, got {field!r}"
                f"{nearest(field, _GATHERED)}"
            )
    names = list(matrices(model, layers)) if names is None else list(names)
    wanted = [model.get_parameter(name) for name in names]
    sums = {
        name: {field: torch.zeros_like(one, dtype=torch.float32) for field in want}
        for name, one in zip(names, wanted, strict=True)
    }
    count = 0
    with torch.enable_grad(), evaluating(model), taking_gradients(wanted):
        for batch in data:
            for part in split(batch, batch_size(batch) if per_example else 1):
                found = _gradient(loss(forward(model, part), part), wanted)
                _add(sums, names, found)
                count += 1
    if not count:
        raise SettingError("gradients need a batch at least, got data without one")
    for fields in sums.values():
        for field, total in fields.items():
            total.div_(count)
            if field == "l2":
                total.sqrt_()
    return sums


def _gradient(value: Tensor, wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        raise SettingError(
            "the loss depends on none of the weights; compute it from the output that it gets, "
            "with gradients on"
        )
    return torch.autograd.grad(value, list(wanted), allow_unused=True)


@torch.no_grad()
def _add(
    sums: Mapping[str, Mapping[str, Tensor]],
    names: Sequence[str],
    found: Sequence[Tensor | None],
) -> None:
    for name, gradient in zip(names, found, strict=True):
        if gradient is None:
            continue
        if not bool(gradient.isfinite().all()):
            raise SettingError(
                f"the loss' gradient in '{name}' is not finite; check the loss and the batches"
            )
        for field, total in sums[name].items():
            total.add_(_GATHERED[field](gradient.float()))


@contextlib.contextmanager
def taking_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Lets parameters take gradients, and afterwards as they did before.

    Args:
        parameters: These.
    """
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


# ------------------------------------------------------------------------------ hidden states


@torch.no_grad()
def outputs(
    model: nn.Module, data: Iterable[Any], paths: Sequence[str], forward: Forward = run_model
) -> Iterator[dict[str, Tensor]]:
    """Yields what modules inside a network give, batch by batch.

    Args:
        model: The network; it is run in evaluation mode.
        data: Batches.
        paths: Paths of modules; of a module that gives several tensors, the first counts.
        forward: `forward(model, batch) -> output`; by default by the batch's type.

    Yields:
        Path to tensor, for one batch; modules that did not run are not in it.

    Raises:
        SettingError: A module does not exist.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> [{path: tuple(x.shape) for path, x in found.items()}
        ...  for found in outputs(model, [torch.ones(5, 2)], ["0"])]
        [{'0': (5, 3)}]
    """
    yield from _seen(model, data, paths, forward, nn.Module.register_forward_hook)


@torch.no_grad()
def inputs(
    model: nn.Module, data: Iterable[Any], paths: Sequence[str], forward: Forward = run_model
) -> Iterator[dict[str, Tensor]]:
    """Yields what modules inside a network are given, batch by batch.

    Args:
        model: The network; it is run in evaluation mode.
        data: Batches.
        paths: Paths of modules; the first tensor of their arguments counts.
        forward: `forward(model, batch) -> output`; by default by the batch's type.

    Yields:
        Path to tensor, for one batch; modules that did not run are not in it.

    Raises:
        SettingError: A module does not exist.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> next(inputs(model, [torch.ones(5, 2)], ["1"]))["1"].shape
        torch.Size([5, 3])
    """
    yield from _seen(model, data, paths, forward, nn.Module.register_forward_pre_hook)


def _seen(
    model: nn.Module,
    data: Iterable[Any],
    paths: Sequence[str],
    forward: Forward,
    register: Callable[..., Any],
) -> Iterator[dict[str, Tensor]]:
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules:
            raise SettingError(
                f"there is no module '{path}' in {type(model).__name__}{nearest(path, modules)}"
            )
    for batch in data:
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for path in paths:
                handle = register(modules[path], partial(_keep, found, path), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(evaluating(model))
            forward(model, batch)
        yield found


def _keep(
    found: dict[str, Tensor], path: str, module: nn.Module, args: Any, kwargs: Any, *output: Any
) -> None:
    # A copy: what comes next may work in place.
    value = output[0] if output else (*args, *kwargs.values())
    found[path] = _first_tensor(value).clone()


def _first_tensor(value: Any) -> Tensor:
    seen: list[Tensor] = []
    mapped(value, seen.append)
    if not seen:
        raise UnsupportedModelError(
            f"a module gave or was given {type(value).__name__} without a tensor in it; name "
            "one whose inputs and outputs are tensors"
        )
    return seen[0]


# ------------------------------------------------------------------------------ block by block


def blocks_of(model: nn.Module) -> list[str]:
    """Finds the blocks that a deep network is a chain of.

    Args:
        model: The network.

    Returns:
        Paths of the children of the `nn.ModuleList` that holds most parameters (of lists in
        it, which don't run themselves, their children); where there is no such list of two or
        more, of the children of all outermost `nn.Sequential`; empty where there is none
        either.

    Example:
        >>> blocks_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        ['0', '1']
    """
    named = dict(model.named_modules())
    lists = [p for p, one in named.items() if isinstance(one, nn.ModuleList) and len(one) > 1]
    if lists:
        containers = [max(lists, key=lambda path: params(named[path]))]
    else:
        chains = [path for path, one in named.items() if isinstance(one, nn.Sequential)]
        containers = [path for path in chains if not any(_within(path, one) for one in chains)]
    return [block for path in containers for block in _blocks_in(path, named[path])]


def _blocks_in(path: str, container: nn.Module) -> Iterator[str]:
    for name, child in container._modules.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield from _blocks_in(inner, child)
        elif child is not None:
            yield inner


def _within(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


class BlockPass:
    """One block of a network, on inputs that went through the blocks before it.

    Attributes:
        path: The block's path.
        index: Its place among the blocks, counted from 0 in the order in which they run.
    """

    def __init__(self, walk: _Walk, index: int) -> None:
        self.path = walk.paths[index]
        self.index = index
        self._walk = walk

    @property
    def module(self) -> nn.Module:
        """The block, which may be changed."""
        return self._walk.model.get_submodule(self.path)

    def layers(self, layers: str = "*") -> dict[str, nn.Module]:
        """Gives the block's weights: name in the whole network to layer.

        Args:
            layers: Pattern of the layers' paths in the whole network.

        Returns:
            As `supple.weights.matrices`; empty where none of the block's layers matches.
        """
        try:
            found = matrices(self._walk.model, layers)
        except SettingError:  # a block without such layers is no error, unlike a network
            return {}
        return {n: layer for n, layer in found.items() if n.startswith(f"{self.path}.")}

    def statistics(
        self,
        want: Sequence[str] = ("input_sq",),
        layers: str = "*",
        *,
        observers: Mapping[str, Callable[[], Observer]] | None = None,
    ) -> dict[str, LayerStatistics]:
        """Gathers what the inputs of the block's layers are like, as `statistics` does.

        Args:
            want: Fields: of `OBSERVERS`, or of `observers`.
            layers: Pattern of the layers' paths in the whole network.
            observers: More fields, by name.

        Returns:
            Name of a weight, in the whole network, to its statistics.
        """
        watch = _Watch(self._walk.model, self.layers(layers), want, observers)
        with watch:
            for number, batch in enumerate(self._walk.batches):
                with watch.on(batch):
                    self._walk.run(number, self.index)
        return watch.found

    def inputs(self) -> Iterator[Tensor]:
        """Yields what the block is given, for each batch: the first tensor."""
        for number in range(len(self._walk.batches)):
            yield self._walk.run(number, self.index)[0]

    def outputs(self) -> Iterator[Tensor]:
        """Yields what the block, as it is now, gives for each batch: the first tensor."""
        for number in range(len(self._walk.batches)):
            yield _first_tensor(self._walk.run(number, self.index)[1])

    def results(self) -> Iterator[Any]:
        """Yields what the network gives for each batch, with the block as it is now.

        The blocks before it are not run again.

        Raises:
            UnsupportedModelError: Something behind the block uses what a block before it gives.
        """
        for number in range(len(self._walk.batches)):
            yield self._walk.finish(number, self.index)


def block_by_block(
    model: nn.Module,
    data: Iterable[Any],
    *,
    blocks: Sequence[str] | None = None,
    forward: Forward = run_model,
) -> Iterator[BlockPass]:
    """Walks through a network's blocks; each sees what the changed blocks before it give.

    The network itself is run for every block, up to its end, with what finished blocks gave
    standing in for them, so that a block is called exactly as the network calls it. Beside
    the network, memory holds the outputs of one block for all batches.

    Args:
        model: The network. It is in evaluation mode while the loop lasts.
        data: Batches; they are kept.
        blocks: Paths of the blocks; by default `blocks_of(model)`.
        forward: `forward(model, batch) -> output`; by default by the batch's type.

    Yields:
        The blocks in the order in which they run. The loop's body may change them, also put
        others in their places. Blocks that don't run are left out.

    Raises:
        UnsupportedModelError: There are no blocks, one runs twice, or one uses what a block
            gives that does not lie directly before it.
        SettingError: There is no batch, or a block does not exist.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> for pass_ in block_by_block(model, [torch.ones(5, 2)]):
        ...     print(pass_.path, *pass_.statistics())
        0 0.weight
        1
        2 2.weight
    """
    batches = list(data)
    if not batches:
        raise SettingError("walking through blocks needs a batch at least, got none")
    with evaluating(model):
        walk = _Walk(model, batches, forward, blocks_of(model) if blocks is None else blocks)
        for index in range(len(walk.paths)):
            yield BlockPass(walk, index)
            walk.advance(index)


def grouped(model: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """Yields names of weights by block, and those outside blocks last.

    Args:
        model: The network.
        names: The names.

    Yields:
        Names, at least one.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3)), nn.ReLU())
        >>> list(grouped(model, ["0.weight", "1.0.weight"]))
        [['0.weight'], ['1.0.weight']]
    """
    left = dict.fromkeys(names)
    for path in blocks_of(model):
        part = [name for name in left if name.startswith(f"{path}.")]
        if part:
            yield part
        for name in part:
            del left[name]
    if left:
        yield list(left)


def in_order(
    model: nn.Module,
    data: Iterable[Any],
    want: Sequence[str] = ("input_sq",),
    layers: str = "*",
    forward: Forward = run_model,
    *,
    observers: Mapping[str, Callable[[], Observer]] | None = None,
) -> Iterator[dict[str, LayerStatistics]]:
    """Yields the statistics of all layers, block by block, and of layers outside blocks last.

    The loop's body may change the layers that it was given: what comes next sees what the
    changed ones give.

    Args:
        model: The network; it is in evaluation mode while the loop lasts.
        data: Batches; they are kept.
        want: Fields: of `OBSERVERS`, or of `observers`.
        layers: Pattern of the layers, as in `supple.weights.matrices`.
        forward: `forward(model, batch) -> output`; by default by the batch's type.
        observers: More fields, by name.

    Yields:
        Name of a weight to its statistics, for the layers of one block; never empty.

    Raises:
        SettingError: A field is unknown, there is no batch, or no layer matches.
        UnsupportedModelError: The blocks can't be walked through.
    """
    batches = list(data)
    left = dict.fromkeys(matrices(model, layers))
    paths = [p for p in blocks_of(model) if any(name.startswith(f"{p}.") for name in left)]
    if paths:
        # Blocks without such layers run as parts of the network, and only once each.
        for pass_ in block_by_block(model, batches, blocks=paths, forward=forward):
            names = [name for name in pass_.layers(layers) if name in left]
            if names:
                yield pass_.statistics(want, layers, observers=observers)
            for name in names:
                del left[name]
    if left:
        outside = ", ".join(
            name.removesuffix(".weight").removesuffix("weight") for name in left
        )
        yield statistics(model, batches, want, outside, forward, observers=observers)


class _Reached(Exception):  # noqa: N818 - it ends a forward, and is no error
    """The end of the block that a forward is run for."""


class _Walk:
    """Runs a network up to the end of a block, with finished blocks' outputs at hand."""

    def __init__(
        self, model: nn.Module, batches: list[Any], forward: Forward, blocks: Sequence[str]
    ) -> None:
        self.model, self.batches, self.forward = model, batches, forward
        self.paths = self._order(list(blocks))
        self._given: list[list[Any]] = []
        """What finished blocks gave, by block and batch; only the last block's is real."""

    @torch.no_grad()
    def run(self, number: int, index: int) -> tuple[Tensor, Any]:
        """Runs a batch; gives what a block is given, the first tensor, and what it gives."""
        reached: list[tuple[Tensor, Any]] = []
        undo = Shadows()
        try:
            self._stand_in(undo, number, index)
            block = self.model.get_submodule(self.paths[index])
            stop = partial(self._stop, reached, index, block.forward)
            undo.put(vars(block), "forward", stop)
            with contextlib.suppress(_Reached):
                self.forward(self.model, self.batches[number])
        finally:
            undo.end()
        if not reached:
            raise UnsupportedModelError(
                f"the block '{self.paths[index]}' did not run on batch {number}, though it did "
                "on the first one; give batches that all blocks take part in"
            )
        return reached[0]

    @torch.no_grad()
    def finish(self, number: int, index: int) -> Any:
        """Runs a batch from a block on; gives what the network gives."""
        undo = Shadows()
        try:
            self._stand_in(undo, number, index)
            result = self.forward(self.model, self.batches[number])
        finally:
            undo.end()
        mapped(result, partial(self._check_known, index))
        return result

    def _stand_in(self, undo: Shadows, number: int, index: int) -> None:
        """Lets the blocks before one give what they gave."""
        for place, path in enumerate(self.paths[:index]):
            given = self._given[place][number]
            undo.put(vars(self.model.get_submodule(path)), "forward", _giving(given))

    def _stop(
        self,
        reached: list[tuple[Tensor, Any]],
        index: int,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mapped((args, kwargs), partial(self._check_known, index))
        entered = _first_tensor((*args, *kwargs.values())).clone()  # it may work in place
        reached.append((entered, forward(*args, **kwargs)))
        raise _Reached

    def _check_known(self, index: int, tensor: Tensor) -> None:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise UnsupportedModelError(
                f"the block '{self.paths[index]}' is given values that are no numbers: either "
                "the network computes such, or the block uses what another block than the one "
                "before it gives, and can't be walked through block by block; leave its layers "
                "out"
            )

    def advance(self, index: int) -> None:
        """Keeps what a finished block gives, and lets go of what the one before it gave."""
        now = []
        for number in range(len(self.batches)):
            now.append(mapped(self.run(number, index)[1], torch.Tensor.detach))
            if index:
                self._given[index - 1][number] = mapped(
                    self._given[index - 1][number], _without_values
                )
        self._given.append(now)

    @torch.no_grad()
    def _order(self, paths: list[str]) -> list[str]:
        """Gives the blocks in the order in which they run on the first batch."""
        named = dict(self.model.named_modules(remove_duplicate=False))
        for path in paths:
            if path not in named:
                raise SettingError(
                    f"there is no module '{path}' in {type(self.model).__name__}"
                    f"{nearest(path, named)}"
                )
        ran: list[str] = []
        undo = Shadows()
        try:
            for path in paths:
                undo.put(vars(named[path]), "forward", _noting(ran, path, named[path].forward))
            self.forward(self.model, self.batches[0])
        finally:
            undo.end()
        twice = next((path for path in ran if ran.count(path) > 1), None)
        if twice is not None:
            raise UnsupportedModelError(
                f"the block '{twice}' runs several times in one forward, so it can't be "
                "finished before what comes after it; leave its layers out"
            )
        if not ran:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no chain of blocks that runs; name them with "
                "blocks=, as paths of modules"
            )
        return ran


def _giving(given: Any) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return mapped(given, torch.clone)  # whoever is given it may change it in place

    return forward


def _noting(ran: list[str], path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        ran.append(path)
        return forward(*args, **kwargs)

    return noting


def _without_values(tensor: Tensor) -> Tensor:
    """Gives a tensor of the same shape that takes no memory and can't go unnoticed."""
    value = math.nan if tensor.is_floating_point() else 0
    return tensor.new_full((), value).expand(tensor.shape)
