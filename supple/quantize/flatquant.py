"""FlatQuant: what is rounded is flattened first, by small maps that are learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import BlockPass, block_by_block, blocks_of
from supple.errors import SettingError
from supple.formats import Int, Quantized, QuantSpec, quantize
from supple.graph.feeds import Feed, feeds
from supple.layers.rotations import KroneckerAffine, Rotation
from supple.quantize._equivalent import scaled
from supple.quantize._flat import FlatBlock, FlatLinear, LearnedMap, matrix_of
from supple.quantize._keys_values import (
    attention_paths,
    cache_spec,
    rounding_keys,
    watching,
)
from supple.quantize._reconstruct import Example, reconstruct, relative_error
from supple.quantize._rotations import inner, rotated
from supple.quantize.base import MOST_BITS, Quantizer
from supple.technique import register
from supple.transforms import Given, evaluating
from supple.weights import from_matrix, matrices

__all__ = ["FlatQuant"]

_FLOOR, _DECAY = 1e-3, 0.01


@register(title="FlatQuant", paper="arXiv:2410.09426")
@dataclass(frozen=True, kw_only=True)
class FlatQuant(Quantizer):
    r"""Rounds weights and inputs that learned maps have made flat.

    Layers that see the same $x$ of $n = n_1 n_2$ channels, with $n_1$ and $n_2$ as close as can
    be, see $x\,\mathrm{diag}(d)\,P$ instead, and have the weight
    $W\,\mathrm{diag}(d)^{-1} P^{-T}$:

    $$P = P_1 \otimes P_2, \quad P_i = U_i\,\mathrm{diag}(s_i)\,V_i^T,$$

    with orthogonal $U_i$ and $V_i$ (Cayley's map of a skew matrix), so that a map costs
    $n (n_1 + n_2)$ multiply-accumulates and has a cheap inverse. $d$ begins as in SmoothQuant,
    $w_\text{max}^{1 - \alpha} / x_\text{max}^\alpha$, and is taken in by the norm or the weight
    that gives $x$; where nothing can, there is no $d$. Keys and values of attention have a map
    of their own for each head's channels.

    Maps, and for each output and each layer's input the share of the range that is kept, are
    learned block by block: a block is given what the unrounded network gives it, and its
    squared error is made small by AdamW. Then weights are rounded to the nearest.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        kv_bits: Bits of attention's keys and values, with zero points, or None to leave them as
            they are.
        alpha: $\alpha$ of the factors that learning begins with, in [0, 1].
        steps: Updates for each block, each with one calibration batch; 0 leaves random maps.
        lr: Learning rate, above 0; that of shares is ten times as large.

    Raises:
        UnsupportedModelError: Keys and values are to be rounded, and there are none to be seen.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(12, 6), nn.ReLU()), torch.randn(20, 12)
        >>> small = FlatQuant(steps=2).apply(model, calibration=[(x,)])
        >>> small[0].rotation, small[0].layer.input.format.name
        (KroneckerAffine(left=3, right=4), 'int4')

    Source:
        Sun et al. 2024, "FlatQuant: Flatness Matters for LLM Quantization", arXiv:2410.09426;
        ruikangliu/FlatQuant.
    Differs:
        What layers see is found in a recorded run, so any network will do. The input of the
        output projection of attention has one map of $n_1 \times n_2$ channels like all others
        (there: of heads and of a head's channels), and the map of values runs at the product
        (there: within the weights before and behind). Symmetric ranges have one share (there:
        two, of which the larger end counts), and shares of keys' and values' ranges stay 1.
        Factors $d$ are learned by their logarithms, so that they stay above 0. Each layer
        multiplies by the map itself: layers are replaced, not a model's code.
    Checked:
        Maps against explicit Kronecker products, the function before rounding against the
        network's, gradients by hand, and a network with outliers in the tests.
    """

    distinguishing: ClassVar[str] = "change"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    activations: int | None = 4
    kv_bits: int | None = None
    alpha: float = 0.3
    steps: int = 480
    lr: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.number_format(), Int):
            raise SettingError(
                f"FlatQuant learns ranges of whole numbers: leave format=None, got "
                f"{self.format!r}"
            )
        if self.kv_bits is not None and not 2 <= self.kv_bits <= MOST_BITS:
            raise SettingError(f"kv_bits must be from 2 to {MOST_BITS}, got {self.kv_bits}")
        if not 0 <= self.alpha <= 1:
            raise SettingError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.steps < 0:
            raise SettingError(f"steps must be 0 or more, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise SettingError(f"lr must be above 0 and finite, got {self.lr}")

    @classmethod
    def examples(cls) -> list[FlatQuant]:
        """Gives a short run."""
        return [cls(steps=1)]

    @classmethod
    def neutral(cls) -> FlatQuant:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, activations=None)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives one layer behind a norm: blocks take their time."""
        random = torch.Generator().manual_seed(5)
        model = nn.Sequential(nn.LayerNorm(6), nn.utils.skip_init(nn.Linear, 6, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5, generator=random)
        return model, (torch.randn(13, 6, generator=random),)

    # -- what is rounded, and how

    @property
    def _rounds_keys(self) -> bool:
        return (self.kv_bits or MOST_BITS) < MOST_BITS

    def input_spec(self) -> QuantSpec | None:
        """Gives how inputs of layers are rounded."""
        if not self.rounds_inputs:
            return None
        assert self.activations is not None
        return QuantSpec(Int(self.activations), "token")

    def key_spec(self) -> QuantSpec | None:
        """Gives how keys and values are rounded."""
        return cache_spec(self.kv_bits) if self._rounds_keys and self.kv_bits else None

    # -- how it is done

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Learns the maps of the network as it is, then puts them in and rounds."""
        if not (self.rounds_weights or self.rounds_inputs or self._rounds_keys):
            return model
        attending = _heads(model, given) if self._rounds_keys else {}
        flat: list[FlatBlock] = []
        for part in self._parts(model, given, attending):
            self.learn(part, given)
            flat.append(part)
        return self._installed(model, flat, given)

    def learn(self, part: FlatBlock, given: Given) -> None:
        """Learns the maps and ranges of a part of the network.

        Args:
            part: The part, with maps as they begin.
            given: The generator of the order of the calls.
        """
        groups = part.parameters_of(self.lr)
        if self.steps and groups:
            reconstruct(
                part.module,
                part.examples,
                groups,
                lr=self.lr,
                steps=self.steps,
                loss=_normalised,
                generator=given.random,
                before=part.forget,
                floor=_FLOOR,
                weight_decay=_DECAY,
            )
        part.forget()
        part.examples.clear()

    def _parts(
        self, model: nn.Module, given: Given, attending: Mapping[str, tuple[int, int]]
    ) -> Iterator[FlatBlock]:
        """Yields the blocks of a network, then layers outside of them, with maps that begin.

        The network is not changed, so each is given what the network as it is gives it.
        """
        args, kwargs = given.inputs()
        seen = feeds(model, args, kwargs, self.layers)
        left = {
            name: layer
            for name, layer in matrices(model, self.layers).items()
            if isinstance(layer, nn.Linear | Conv1D)
        }
        paths = [p for p in blocks_of(model) if any(name.startswith(f"{p}.") for name in left)]
        blocks = block_by_block(model, given.batches, blocks=paths) if paths else iter(())
        for block in blocks:
            held = {name: left.pop(name) for name in block.layers(self.layers) if name in left}
            within = {p: head for p, head in attending.items() if _within(p, block.path)}
            yield self._part(block, held, seen, within, given)
        for feed in seen:
            names = [name for name in feed.consumers if name in left]
            for name in names:
                layer, path = {name: left[name]}, name.rpartition(".")[0]
                for block in block_by_block(model, given.batches, blocks=[path]):
                    yield self._part(block, layer, seen, {}, given)

    def _part(
        self,
        block: BlockPass,
        held: Mapping[str, nn.Module],
        seen: Sequence[Feed],
        attending: Mapping[str, tuple[int, int]],
        given: Given,
    ) -> FlatBlock:
        part = FlatBlock(block)
        largest = block.statistics(("absmax",), self.layers) if held else {}
        for feed in seen:
            names = [name for name in feed.consumers if name in held]
            if not names:
                continue
            whole = feed.producer is not None and names == list(feed.consumers)
            learned = LearnedMap(feed.size, feed.units if whole else None, given.random)
            if whole:
                tops = torch.stack([matrix_of(held[name]).abs().amax(0) for name in names])
                learned.begin(tops.amax(0), largest[names[0]].absmax, self.alpha)
            for name in names:
                part.flatten(
                    name,
                    feed if whole else None,
                    FlatLinear(
                        held[name],
                        learned,
                        self.spec() if self.rounds_weights else None,
                        self.input_spec(),
                    ),
                )
        spec = self.key_spec()
        for path, head in attending.items():
            assert spec is not None
            keys, values = (
                LearnedMap(channels, None, given.random, left=1) for channels in head
            )
            part.attend(path, keys, values, spec)
        return part

    def _installed(
        self, model: nn.Module, flat: Sequence[FlatBlock], given: Given
    ) -> nn.Module:
        """Puts maps and rounded weights into the network."""
        maps: dict[str, Rotation] = {}
        clips: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}
        folded: dict[int, tuple[Feed, Tensor]] = {}
        made: dict[int, KroneckerAffine] = {}
        for part in flat:
            for name, (feed, layer) in part.linear.items():
                factor = layer.map.channels()
                if feed is not None and factor is not None:
                    folded[id(feed)] = (feed, factor)
                maps[name] = made.setdefault(id(layer.map), layer.map.plain())
                shares[inner(name)] = layer.weight_share()
                if self.rounds_inputs:
                    clips[name] = layer.input_share()
        for feed, factor in folded.values():
            model = scaled(model, feed, factor.reciprocal())
        names = [inner(one) if one in maps else one for one in matrices(model, self.layers)]
        model = rotated(model, maps, clips)
        paths = ", ".join(name.rpartition(".")[0] for name in names)
        within = dataclasses.replace(self, layers=paths)
        model = within.install(model, within.solved(model, shares), given)
        spec = self.key_spec()
        if spec is None:
            return model
        pairs = {path: pair for part in flat for path, pair in part.attention.items()}
        return rounding_keys(
            model,
            list(pairs),
            spec,
            {path: keys.plain() for path, (keys, _) in pairs.items()},
            {path: values.plain() for path, (_, values) in pairs.items()},
        )

    def solved(self, model: nn.Module, shares: Mapping[str, Tensor]) -> dict[str, Quantized]:
        """Rounds the weights of a network, which then holds the rounded ones.

        Args:
            model: The network; it is changed.
            shares: Name of a weight to the share of each output's range that is kept, (out, 1);
                of others all is kept.

        Returns:
            Name of a weight to its matrix, quantized.
        """
        found: dict[str, Quantized] = {}
        if not self.rounds_weights:
            return found
        for name, layer in matrices(model, self.layers).items():
            observer = partial(_clipped_range, shares.get(name))
            found[name] = quantize(matrix_of(layer), self.spec(), observer=observer)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weight.copy_(from_matrix(layer, found[name].dequantize()))
        return found


def _heads(model: nn.Module, given: Given) -> dict[str, tuple[int, int]]:
    """Gives the modules that attend, with the channels of their heads' keys and values."""
    found: dict[str, tuple[int, int]] = {}

    def see(path: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        found[path] = (key.shape[-1], value.shape[-1])

    args, kwargs = given.inputs()
    with evaluating(model), watching(model, attention_paths(model, args, kwargs), see):
        model(*args, **kwargs)
    return found


def _clipped_range(
    share: Tensor | None, values: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    least, most = values.amin(-1), values.amax(-1)
    return (least, most) if share is None else (least * share, most * share)


def _normalised(output: Tensor, example: Example) -> Tensor:
    """The error divided by itself, so that all blocks learn equally fast."""
    error = relative_error(output, example)
    return error / error.detach().clamp_min(torch.finfo(error.dtype).tiny)


def _within(path: str, block: str) -> bool:
    return not block or path == block or path.startswith(f"{block}.")
