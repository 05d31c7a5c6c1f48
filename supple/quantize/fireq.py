"""FireQ: 4-bit weights looked up as 8-bit floats, and 4-bit keys whose scales pass RoPE."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import LayerStatistics
from supple.errors import SettingError, SuppleWarning
from supple.formats import Float, Quantized, QuantSpec, quantize
from supple.graph.feeds import Feed
from supple.layers.lookup_linear import LookedUp, LookupLinear
from supple.layers.quantized_attention import HeadScale
from supple.quantize._keys_values import (
    attention_paths,
    cache_spec,
    rounding_keys,
    watching,
)
from supple.quantize._rotary import RotaryKeys, rotary_keys, scale_pairs
from supple.quantize._smooth import Scaling, smoothing
from supple.quantize.base import MOST_BITS, Input, Solved
from supple.technique import register
from supple.training.batches import batch_size, example_of, run_model, split
from supple.transforms import Given, evaluating

__all__ = ["FireQ"]

_EIGHT = Float(4, 3)


@register(title="FireQ: 4-bit weights and keys, 8-bit inputs", paper="arXiv:2505.20839")
@dataclass(frozen=True, kw_only=True)
class FireQ(Scaling):
    r"""Rounds weights, keys and values to 4 bits, inputs of layers and queries to e4m3.

    A group of weights has a scale $\sigma$ in e4m3, and its codes stand for entries of a table,
    $\mathrm{e4m3}(c\,\sigma)$, $c = -8 \ldots 7$: a kernel multiplies 8-bit floating-point
    numbers. One factor for the matrix keeps small scales above the format's bottom. Before,
    channels of inputs are divided by
    $s_j = \max|X_j|^\alpha / \max|W_j|^{1 - \alpha}$, where what comes before can take it.

    Keys have few channels that are far larger than the rest, which rotary positions mix by
    pairs. Both channels of a pair are divided by the largest norm that the pair has, which no
    turn changes: by the weights that make keys, and queries are multiplied by theirs. What is
    left differs after the turn: there channels whose largest magnitude is above the head's
    geometric mean are divided down to it, and queries multiplied.

    Args:
        bits: Of a weight's code, 2 to 4; at 16 weights stay as they are.
        group_size: Weights of an output that share a scale.
        activations: 8, bits of the layers' inputs and of queries, or None to leave them.
        kv_bits: Bits of attention's keys and values, or None to leave attention as it is.
        alpha: How much of the differences of input channels is moved to weights, in [0, 1].
        pairs: Whether pairs of channels of keys are scaled before rotary positions.
        channels: Whether channels of keys are scaled after them.

    Raises:
        UnsupportedModelError: Keys and values are to be rounded, and there are none to be seen.

    Warns:
        SuppleWarning: Pairs of some keys can't be scaled: they don't come from a layer of their
            own, or are normalised.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), torch.randn(20, 8)
        >>> small = FireQ(kv_bits=None).apply(model, calibration=[(x,)])
        >>> small[0].input.format.name, small[0].nbytes
        ('e4m3', 58)

    Source:
        Baek et al. 2025, "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM
        Inference Acceleration", arXiv:2505.20839. No code was found.
    Differs:
        The paper's kernels are not part of it: the layer computes what they would, by a plain
        product. The abstract tells where scales are put, not from what; the statistics above
        are the choice made here, and so are symmetric codes for keys and values.
    Checked:
        Tables against e4m3 by hand; the function unchanged by pairs and changed by factors that
        differ within one; both layouts of pairs, and queries that share keys.
    """

    distinguishing: ClassVar[str] = "solve"

    group_size: int | None = 128
    scale_format: str = "e4m3"
    activations: int | None = 8
    kv_bits: int | None = 4
    alpha: float = 0.5
    pairs: bool = True
    channels: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds_weights and (self.bits > 4 or self.format or not self.symmetric):
            raise SettingError(
                "tables hold whole numbers of up to 4 bits without zero points: leave format "
                f"and symmetric alone and set bits to 2, 3, 4 or {MOST_BITS}; got bits="
                f"{self.bits}, format={self.format!r}, symmetric={self.symmetric}"
            )
        if self.scale_format != "e4m3":
            raise SettingError(f"scale_format must be e4m3, got {self.scale_format!r}")
        if self.activations not in (8, None):
            raise SettingError(
                f"activations must be 8, bits of e4m3, or None, got {self.activations}"
            )
        if self.kv_bits is not None and not 2 <= self.kv_bits <= MOST_BITS:
            raise SettingError(f"kv_bits must be from 2 to {MOST_BITS}, got {self.kv_bits}")
        if not 0 <= self.alpha <= 1:
            raise SettingError(f"alpha must be in [0, 1], got {self.alpha}")

    @classmethod
    def examples(cls) -> list[FireQ]:
        """Gives groups small enough for the toy, which has no attention."""
        return [cls(group_size=4, kv_bits=None)]

    @classmethod
    def neutral(cls) -> FireQ:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, activations=None, kv_bits=None)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives one layer: exporting tables takes its time."""
        random = torch.Generator().manual_seed(5)
        model = nn.Sequential(nn.utils.skip_init(nn.Linear, 7, 3), nn.ReLU())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5, generator=random)
        return model, (torch.randn(13, 7, generator=random),)

    # -- linear layers

    def factors(
        self, model: nn.Module, found: Sequence[Feed], given: Given
    ) -> Iterable[tuple[Feed, Tensor]]:
        """Gives factors from the largest inputs and weights, where they cost nothing."""
        return smoothing(model, found, given, self.alpha)

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Rounds to the nearest codes, which are then looked up."""
        return LookedUp.of(quantize(matrix, spec))

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Says that inputs are rounded to e4m3, token by token."""
        return {
            name: (QuantSpec(_EIGHT, spec.granularity, scale_format="bf16"), None)
            for name, (spec, _) in super().inputs(model, given).items()
        }

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer that looks codes up; convolutions stay as they are, rounded."""
        assert isinstance(solved, Quantized)
        if type(module) not in (nn.Linear, Conv1D):
            return None
        spec = None if given is None else given[0]
        return LookupLinear.from_quantized(module, solved, input=spec)

    # -- attention

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Scales keys, then channels of inputs; rounds weights, and lets attention round."""
        if (self.kv_bits or MOST_BITS) >= MOST_BITS:
            return super().change(model, given)
        assert self.kv_bits is not None
        paths = attention_paths(model, *_one_example(given))
        if self.pairs:
            self._scale_pairs(model, paths, given)
        maps = self._maps(model, paths, given) if self.channels else {}
        inner = super().change(model, given)
        queries = None
        if self.activations is not None:
            queries = QuantSpec(_EIGHT, "token", scale_format="bf16")
        spec = cache_spec(self.kv_bits, symmetric=True)
        return rounding_keys(inner, paths, spec, maps, queries=queries)

    def _scale_pairs(self, model: nn.Module, paths: Sequence[str], given: Given) -> None:
        largest = _largest_keys(model, paths, given)
        sizes = {path: one.shape[-1] for path, one in largest.items()}
        found = rotary_keys(model, sizes, *_one_example(given))
        norms = _largest_keys(model, paths, given, found)
        for path, keys in found.items():
            scale_pairs(model, keys, _even(_by_key_head(model, keys, norms[path])))
        left = [path for path in paths if path not in found]
        if left:
            warnings.warn(
                f"pairs of channels of keys of '{left[0]}'"
                f"{f' and {len(left) - 1} more' if left[1:] else ''} can't be scaled: keys and "
                "queries must come from a linear layer each, and not be normalised; set "
                "pairs=False if that is known",
                SuppleWarning,
                stacklevel=4,
            )

    def _maps(
        self, model: nn.Module, paths: Sequence[str], given: Given
    ) -> dict[str, HeadScale]:
        maps: dict[str, HeadScale] = {}
        for path, largest in _largest_keys(model, paths, given).items():
            maps[path] = HeadScale(*largest.shape).to(largest.device)
            maps[path].scale.copy_(_even(largest).clamp_max(1))
        return maps


def _one_example(given: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives a call with one example of the first batch: trying layouts takes many runs."""
    batch = given.batches[0]
    return example_of(split(batch, batch_size(batch))[0])


def _largest_keys(
    model: nn.Module,
    paths: Sequence[str],
    given: Given,
    pairs: Mapping[str, RotaryKeys] | None = None,
) -> dict[str, Tensor]:
    """Gives the largest magnitudes of channels of keys or their pairs, (heads, channels)."""
    found: dict[str, Tensor] = {}

    def see(path: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        size = key.detach().float().abs()
        if pairs is not None and path in pairs:
            size = (size.square() + size[..., pairs[path].partner].square()).sqrt()
        now = size.movedim(-3, 0).flatten(1, -2).amax(1)
        found[path] = torch.maximum(found[path], now) if path in found else now

    with evaluating(model), watching(model, paths, see):
        for batch in given.batches:
            run_model(model, batch)
    return found


def _by_key_head(model: nn.Module, keys: RotaryKeys, largest: Tensor) -> Tensor:
    """Gives the values of the heads that there are weights for: attention may see repeats."""
    layer = model.get_submodule(keys.key)
    assert isinstance(layer, nn.Linear)
    heads = layer.weight.shape[0] // keys.channels
    return largest.reshape(heads, -1, largest.shape[-1]).amax(1)


def _even(largest: Tensor) -> Tensor:
    """Gives factors that make channels of a head equally large, with a geometric mean of 1."""
    logs = largest.double().clamp_min(1e-5).log()
    return (logs.mean(-1, keepdim=True) - logs).exp()
