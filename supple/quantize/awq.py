"""Channels that matter are made larger before weights are rounded, and ranges drawn in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supple.calibrate import BlockPass, LayerStatistics, in_order
from supple.errors import SettingError
from supple.formats import Quantized, QuantSpec, fake_quantize, quantize
from supple.graph.equivalents import plain_implementations
from supple.graph.feeds import Feed, compared
from supple.graph.record import output_tensors
from supple.plan import Shadows
from supple.quantize._equivalent import by_channel, by_column, matrix_of, put
from supple.quantize._smooth import Scaling, in_turn
from supple.quantize._solvers import output_error
from supple.quantize.base import MOST_BITS
from supple.technique import register
from supple.training.batches import mapped
from supple.transforms import Given

__all__ = ["AWQ", "drawn_in"]

_Calls = list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]


@register(title="AWQ: activation-aware weight quantization", paper="arXiv:2306.00978")
@dataclass(frozen=True, kw_only=True)
class AWQ(Scaling):
    r"""Rounds weights such that those that read large inputs lose least.

    Before weights are rounded, the columns that read channel $j$ are multiplied by

    $$s_j = \frac{a_j^\alpha}{\sqrt{\max_k a_k^\alpha \cdot \min_k a_k^\alpha}}, \qquad
      a_j = \operatorname{mean} |X_j|,$$

    and the channel is divided by it: by the norm or layer that it comes from, where that is
    possible, else in front of the layer. Layers that see the same tensor share one $s$. The
    exponent is the one of $0, \frac1n, \ldots, \frac{n-1}n$ with which rounded weights change
    least what comes out, in squares: of the module around all these layers (attention, a
    gated network), or of the layer where there is but one.

    Then the range of each group of weights is drawn in as far as that makes the error of the
    group's part of the output smaller. Queries' and keys' ranges stay, for only their products
    count.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        group_size: Inputs of an output that share a scale; None for all.
        symmetric: Whether there are no zero points.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        candidates: $n$: how many exponents are tried; ranges are drawn in by steps of one
            $n$-th.
        clip: How far ranges are drawn in at most, in [0, 1); 0 leaves them.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether layers hold codes in place of weights.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
        >>> _ = model[0].weight.data.copy_(torch.tensor([60.0, 1.0, 1.0, 1.0]))
        >>> batch = (torch.eye(4),)
        >>> small = AWQ(bits=3, group_size=4).apply(model, calibration=[batch])
        >>> bool(small[0].weight[0] < 60), small[1].spec.format.name
        (True, 'uint3')

    Source:
        Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
        Acceleration", arXiv:2306.00978; mit-han-lab/llm-awq, `auto_scale.py` and
        `auto_clip.py`.
    Differs:
        The authors name the layers of each architecture; here who takes the factors is told by
        the operators of a recorded run, also for values that several heads share (they get the
        mean of their channels' inputs). A layer whose input nothing can scale divides it
        itself; theirs does so behind GELU only. The error of a single layer's output, and of a
        group's part of it, is computed from the products of all inputs where theirs takes 512
        tokens; ranges are searched on inputs that went through rounded layers.
    Checked:
        Factors and exponent against a slow search in the tests; the drawn-in ranges against
        clamped weights one by one.
    """

    distinguishing: ClassVar[str] = "factors"

    group_size: int | None = 128
    symmetric: bool = False
    candidates: int = 20
    clip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise SettingError(f"candidates must be at least 1, got {self.candidates}")
        if not 0 <= self.clip < 1:
            raise SettingError(f"clip must be in [0, 1), got {self.clip}")

    @classmethod
    def examples(cls) -> list[AWQ]:
        """Gives few bits, and groups small enough for the toy."""
        return [cls(group_size=4, candidates=3)]

    @classmethod
    def neutral(cls) -> AWQ:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS)

    # -- factors

    def factors(
        self, model: nn.Module, found: Sequence[Feed], given: Given
    ) -> Iterator[tuple[Feed, Tensor]]:
        """Gives the factors with which rounded weights change outputs least."""
        if not self.rounds_weights:
            return
        with plain_implementations(model):  # what runs again must not add to a cache
            for pass_, inside, seen in in_turn(model, found, given, _WANT, _OBSERVERS):
                for feed in inside:
                    around = None if pass_ is None else _around(model, feed)
                    if pass_ is None or around is None:
                        yield feed, self._factors(model, feed, seen)
                    else:
                        run = around, _calls(pass_, around)
                        yield feed, self._factors(model, feed, seen, run)

    @torch.no_grad()
    def _factors(
        self,
        model: nn.Module,
        feed: Feed,
        seen: Mapping[str, LayerStatistics],
        run: tuple[nn.Module, _Calls] | None = None,
    ) -> Tensor:
        """Tries the exponents on one feed."""
        inputs = feed.tied(self.importance(model, feed, seen[feed.consumers[0]]))
        layers = {name: model.get_submodule(_path(name)) for name in feed.consumers}
        best, least = torch.ones_like(inputs), float("inf")
        for number in range(self.candidates):
            scale = inputs.pow(number / self.candidates).clamp_min(1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            rounded = {name: self._tried(name, one, scale) for name, one in layers.items()}
            if run is not None:
                error = _changed(*run, layers, rounded)
            else:
                error = _lost(layers, rounded, seen)
            if error < least:
                best, least = scale, error
        return best

    def importance(self, model: nn.Module, feed: Feed, seen: LayerStatistics) -> Tensor:
        """Says how much channels matter: by the mean magnitude of what layers see.

        Args:
            model: The model.
            feed: What its layers see.
            seen: Statistics of the first of them.

        Returns:
            (size,), 0 or more.
        """
        found = by_channel(seen["input_abs"], feed.size).mean(1) / seen.rows
        return found.float()

    def _tried(self, name: str, layer: nn.Module, scale: Tensor) -> Tensor:
        """Gives a matrix that was rounded with factors, and divided by them again."""
        matrix = matrix_of(layer)
        columns = by_column(layer, scale)
        return fake_quantize(matrix * columns, self.spec_of(name, matrix)) / columns

    # -- ranges

    @torch.no_grad()
    def by_block(self, model: nn.Module, given: Given) -> Iterator[Mapping[str, Quantized]]:
        """Rounds the weights of one block after the other within drawn-in ranges.

        Args:
            model: The model; it is changed. Its channels are scaled already.
            given: Calibration batches, loss, generator.

        Yields:
            Name of a weight to its matrix, quantized; nothing at 16 bits.
        """
        if not self.rounds_weights:
            return
        whole = compared(model, *given.inputs())
        for seen in in_order(model, given.batches, ("gram",), self.layers):
            found: dict[str, Quantized] = {}
            for name in list(seen):
                one, layer = seen.pop(name), model.get_submodule(name.rpartition(".")[0])
                matrix = matrix_of(layer)
                spec = self.spec_of(name, matrix)
                clip = 0.0 if name in whole else self.clip
                least, most = drawn_in(matrix, one.gram, spec, clip, self.candidates)
                found[name] = quantize(matrix, spec, *spec.scales_of(least, most))
                put(layer, found[name].dequantize())
            yield found


def drawn_in(
    matrix: Tensor, gram: Tensor, spec: QuantSpec, clip: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """Draws the range of each group in as far as that makes its part of the outputs better.

    Args:
        matrix: (out, columns), as `supple.weights.as_matrix` gives it.
        gram: Products of inputs, (columns, columns), or of a convolution in groups (groups,
            columns, columns).
        spec: What the matrix is quantized to, with a row as a channel.
        clip: How far at most, as a share.
        candidates: One step is one such part of the full range.

    Returns:
        Lower and upper ends, (out, groups).

    Example:
        >>> matrix, gram = torch.tensor([[7.0, 1.0]]), torch.diag(torch.tensor([0.01, 1.0]))
        >>> drawn_in(matrix, gram, QuantSpec("int2"), 0.9, 10)[1]
        tensor([[1.4000]])
    """
    if gram.dim() == 3:
        parts = zip(matrix.chunk(len(gram)), gram, strict=True)
        ends = [drawn_in(rows, one, spec, clip, candidates) for rows, one in parts]
        least, most = (torch.cat(end) for end in zip(*ends, strict=True))
        return least, most
    size = spec.group_size or matrix.shape[1]
    ends = [
        _drawn_in(
            rows, gram[start : start + size, start : start + size], spec, clip, candidates
        )
        for start, rows in zip(
            range(0, matrix.shape[1], size), matrix.split(size, 1), strict=True
        )
    ]
    least, most = (torch.cat(end, 1) for end in zip(*ends, strict=True))
    return least, most


def _drawn_in(
    rows: Tensor, gram: Tensor, spec: QuantSpec, clip: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """Draws the ranges of one group of columns in."""
    reach = rows.abs().amax(1, keepdim=True)
    factor, lowest = torch.ones_like(reach), torch.full_like(reach, torch.inf)
    for step in range(max(1, round(clip * candidates))):
        now = (1 - step / candidates) * reach
        scale, zero = spec.scales_of(
            torch.maximum(rows.amin(1, keepdim=True), -now),
            torch.minimum(rows.amax(1, keepdim=True), now),
        )
        lost = spec.rounded(rows, scale, zero) - rows
        error = ((lost @ gram) * lost).sum(1, keepdim=True)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        factor = torch.where(better, 1 - step / candidates, factor)
    reach = factor * reach
    return (
        torch.maximum(rows.amin(1, keepdim=True), -reach),
        torch.minimum(rows.amax(1, keepdim=True), reach),
    )


# ----------------------------------------------------------------------------------- statistics


class _Magnitudes:
    """Adds up the magnitudes of inputs."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        now = rows.abs().sum(1, dtype=torch.float64)
        self._sums = now if self._sums is None else self._sums + now

    def result(self) -> Tensor | None:
        return self._sums


_WANT = ("gram", "input_abs")
_OBSERVERS = {"input_abs": _Magnitudes}


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _around(model: nn.Module, feed: Feed) -> nn.Module | None:
    """Gives the innermost module around several layers that is called itself."""
    if len(feed.consumers) == 1:
        return None
    levels = zip(*(name.split(".")[:-2] for name in feed.consumers), strict=False)
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
    module = model.get_submodule(".".join(common))
    while isinstance(module, _CONTAINERS):
        common.pop()
        module = model.get_submodule(".".join(common))
    return module


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def _calls(pass_: BlockPass, module: nn.Module) -> _Calls:
    """Gives what a module within a block is called with, and the first tensor that it gives."""
    found: _Calls = []
    undo = Shadows()
    undo.put(vars(module), "forward", partial(_noting, found, module.forward))
    try:
        for _ in pass_.outputs():
            pass
    finally:
        undo.end()
    return found


def _noting(found: _Calls, forward: Any, *args: Any, **kwargs: Any) -> Any:
    kept = mapped((args, kwargs), torch.clone)  # it may work in place
    result = forward(*args, **kwargs)
    found.append((*kept, output_tensors(result)[0].clone()))
    return result


def _changed(
    module: nn.Module,
    calls: _Calls,
    layers: Mapping[str, nn.Module],
    rounded: Mapping[str, Tensor],
) -> float:
    """Gives by how much a module's outputs change, in squares, with rounded weights."""
    before = {name: matrix_of(layer).clone() for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            put(layer, rounded[name])
        return math.fsum(_difference(module, *call) for call in calls)
    finally:
        for name, layer in layers.items():
            put(layer, before[name])


def _difference(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Tensor
) -> float:
    args, kwargs = mapped((args, kwargs), torch.clone)
    return float((output_tensors(module(*args, **kwargs))[0] - before).square().sum())


def _lost(
    layers: Mapping[str, nn.Module],
    rounded: Mapping[str, Tensor],
    seen: Mapping[str, LayerStatistics],
) -> float:
    """Gives by how much layers' outputs change, in squares, with rounded weights."""
    return math.fsum(
        float(output_error(rounded[name] - matrix_of(layer), seen[name].gram))
        for name, layer in layers.items()
    )
