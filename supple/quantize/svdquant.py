"""A product of low rank, on inputs as they are, takes in what rounding would lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import LayerStatistics, Observer
from supple.errors import SettingError
from supple.formats import Int, QuantSpec, fake_quantize, quantize
from supple.graph.feeds import Feed
from supple.layers.low_rank_branch import LowRankBranch, LowRankCorrected
from supple.quantize._equivalent import by_column, matrix_of, put
from supple.quantize._sample import RowSample
from supple.quantize._smooth import Scaling, in_turn, largest_weights
from supple.quantize.base import MOST_BITS, Input, Solved, packable
from supple.technique import register
from supple.transforms import Given

__all__ = ["SVDQuant"]


@register(title="SVDQuant", paper="arXiv:2411.05007")
@dataclass(frozen=True, kw_only=True)
class SVDQuant(Scaling):
    r"""Rounds inputs and weights to 4 bits, beside a product of low rank that sees neither.

    Outliers of the inputs are moved to the weights: channel $j$ is divided by
    $\lambda_j = \max|X_j|^\alpha / \max|W_j|^\beta$ and the weights multiplied by it. Then a
    product of two thin matrices takes in the weights' largest directions, and only what is
    left of them is rounded:

    $$X W^T \approx X (L_1 L_2)^T + Q(X)\,Q(W - L_1 L_2)^T.$$

    The best product of rank $r$ for $W$ comes first; it is then refined to the best one for
    $W - Q(W - L_1 L_2)$, over and over, until outputs no longer get better. Exponents are the
    pair, of $(0, 0)$, $(\frac in, 0)$ and $(\frac in, 1 - \frac in)$, with which outputs
    change least, the first product beside them.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        group_size: Weights of an output, and channels of a token, that share a scale; None for
            all.
        rank: $r$, at most the smaller width; 0 for no product.
        iterations: How often the product is found, at most.
        candidates: $n$; 1 leaves inputs as they are.
        rows: Tokens of each layer on which outputs are compared.
        format: Name of the weights' number format in place of whole numbers.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether layers hold codes in place of weights; they have to where inputs are
            rounded.

    Example:
        >>> layer = nn.Linear(4, 3, bias=False)
        >>> rows = torch.tensor([[9.0, 3.0, 1.0, 0.0]] * 3) + torch.eye(3, 4) / 8
        >>> _ = layer.weight.data.copy_(rows)
        >>> x = torch.tensor([[1.0, 0.3, -2.0, 0.7], [0.2, -0.4, 0.8, 1.0]])
        >>> lost = [float((SVDQuant(rank=rank).apply(layer, calibration=[(x,)])(x) - layer(x))
        ...                .detach().norm()) for rank in (0, 1)]
        >>> lost[1] < 0.2 * lost[0]
        True

    Source:
        Li et al. 2024, "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit
        Diffusion Models", arXiv:2411.05007; mit-han-lab/deepcompressor, `calib/lowrank.py`
        and `calib/config/smooth.py`.
    Differs:
        Layers that share an input have a product each, as no kernel here runs one for all of
        them; the paper's share the first thin matrix. Inputs are not shifted to be unsigned
        behind activations. Convolutions, and what something else than linear layers reads,
        are rounded without factors and product.
    Checked:
        Factors, product and where refining stops against the definition in the tests; the
        product's input by hand; bits against the file.
    """

    distinguishing: ClassVar[str] = "solve"
    want: ClassVar[tuple[str, ...]] = ("sample",)

    activations: int | None = 4
    group_size: int | None = 64
    rank: int = 32
    iterations: int = 100
    candidates: int = 20
    rows: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 0), ("iterations", 1), ("candidates", 1), ("rows", 1)):
            if getattr(self, name) < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.rank and not self.packed and self.input_spec() is not None:
            raise SettingError(
                "the product has to see inputs as they are, which only layers of codes keep "
                "apart from rounded ones: leave packed=True, or set activations=None"
            )

    @classmethod
    def examples(cls) -> list[SVDQuant]:
        """Gives groups and a rank small enough for the toy."""
        return [cls(group_size=4, rank=2, candidates=3)]

    @classmethod
    def neutral(cls) -> SVDQuant:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, activations=MOST_BITS)

    def observers(self) -> Mapping[str, Callable[[], Observer]]:
        """Gives what keeps tokens, on which outputs are compared."""
        return {"sample": partial(RowSample, self.rows)}

    def input_spec(self) -> QuantSpec | None:
        """Says how the inputs of linear layers are rounded: groups of a token's channels."""
        if self.activations is None or not self.rounds_inputs:
            return None
        form = Int(self.activations)
        if self.group_size is None:
            return QuantSpec(form, "token")
        return QuantSpec(form, "group", self.group_size)

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Says that inputs of linear layers are rounded by groups.

        Args:
            model: The model, with rounded weights.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to the spec of its layer's input, and None.
        """
        spec = self.input_spec()
        return {
            name: (spec if spec is not None and one.granularity == "token" else one, scales)
            for name, (one, scales) in super().inputs(model, given).items()
        }

    # -- factors

    @torch.no_grad()
    def factors(
        self, model: nn.Module, found: Sequence[Feed], given: Given
    ) -> Iterator[tuple[Feed, Tensor]]:
        """Gives the factors with which outputs change least, a product of low rank beside."""
        if not self.rounds_weights or self.candidates == 1:
            return
        linear = [one for one in found if all(_linear(model, name) for name in one.consumers)]
        observers = self.observers()
        for _, inside, seen in in_turn(model, linear, given, self.want, observers):
            for feed in inside:
                yield feed, self._factors(model, feed, seen)

    def _factors(
        self, model: nn.Module, feed: Feed, seen: Mapping[str, LayerStatistics]
    ) -> Tensor:
        """Tries all pairs of exponents on one feed."""
        sample = seen[feed.consumers[0]]["sample"]
        layers = [model.get_submodule(name.rpartition(".")[0]) for name in feed.consumers]
        inputs = feed.tied(sample.abs().amax(0))
        weights = feed.tied(largest_weights(model, feed))
        best, least = torch.ones_like(inputs), float("inf")
        for alpha, beta in self._exponents():
            scale = inputs.clamp_min(1e-5).pow(alpha) / weights.clamp_min(1e-5).pow(beta)
            error = 0.0
            for layer in layers:
                matrix = matrix_of(layer) * by_column(layer, scale)
                error += self._split(matrix, self.spec(), sample / scale, 1)[1]
            if error < least:
                best, least = scale, error
        return best

    def _exponents(self) -> list[tuple[float, float]]:
        shares = [number / self.candidates for number in range(1, self.candidates)]
        return [(0, 0), *((one, 0) for one in shares), *((one, 1 - one) for one in shares)]

    # -- weights

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Splits a weight into a product of low rank and what is rounded.

        Args:
            matrix: (out, columns), float32.
            spec: How the rest is rounded.
            seen: Tokens that the layer was given.

        Returns:
            Both parts.
        """
        assert seen is not None
        return self._split(matrix, spec, seen["sample"], self.iterations)[0]

    def _split(
        self, matrix: Tensor, spec: QuantSpec, sample: Tensor, iterations: int
    ) -> tuple[Solved, float]:
        """Gives the best split, and by how much it changes outputs, in squares."""
        rounding = self.input_spec()
        rounded = sample if rounding is None else fake_quantize(sample, rounding)
        best: LowRankCorrected | None = None
        least, codes = float("inf"), torch.zeros_like(matrix)
        for _ in range(iterations if self.rank else 1):
            up, down = _thin(matrix - codes, self.rank)
            rest = matrix - up.float() @ down.float()
            quantized = quantize(rest, spec)
            codes = quantized.dequantize()
            error = float((sample @ rest.T - rounded @ codes.T).square().sum())
            if best is not None and not error <= least:
                break
            best, least = LowRankCorrected(quantized, up, down), error
        assert best is not None
        return best if self.rank else best.quantized, least

    def _rounded(self, name: str, module: nn.Module, seen: LayerStatistics | None) -> Solved:
        # Beside anything else than a plain linear layer no product can stand.
        alone = self.rank and (isinstance(module, nn.Conv2d) or not packable(module))
        if not alone:
            return super()._rounded(name, module, seen)
        matrix = matrix_of(module)
        solved = quantize(matrix, self.spec_of(name, matrix))
        put(module, solved.dequantize())
        return solved

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer of packed codes, with the product beside it.

        Args:
            module: The layer, with the rounded weight.
            solved: What `solve` gave for it.
            given: How its input is rounded; the product's is not.

        Returns:
            The layer, or None for one that can't be packed, which has no product.
        """
        if not isinstance(solved, LowRankCorrected):
            return super().pack(module, solved, given)
        layer = super().pack(module, solved.quantized, given)
        assert layer is not None
        return LowRankBranch.of(layer, solved.up, solved.down)


def _thin(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Gives the best product of low rank in float16: (out, rank) and (rank, in).

    It is found by the eigenvectors of the smaller product of the matrix with itself, in double
    precision, which takes far less time than its singular values do.
    """
    if not rank:
        return matrix.new_zeros(len(matrix), 0).half(), matrix.new_zeros(
            0, len(matrix.T)
        ).half()
    wide = matrix.double()
    turned = wide.shape[0] > wide.shape[1]
    wide = wide.T if turned else wide
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    vectors, values = vectors.flip(1)[:, :rank], values.flip(0)[:rank]
    root = values.clamp_min(1e-12).pow(0.25)
    up, down = (vectors * root).half(), (vectors.T @ wide / root[:, None]).half()
    return (down.T.contiguous(), up.T.contiguous()) if turned else (up, down)


def _linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D)
