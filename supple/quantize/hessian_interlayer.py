"""Bits by layer, from the loss' curvature and from what layers lose together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from supple.allocate import Curve, dynamic_program
from supple.errors import SettingError, nearest
from supple.formats import Granularity, Int, Quantized, QuantSpec, quantize
from supple.quantize._bits import Trial, hessian_traces, interactions, lowered
from supple.quantize._fold import fold_norms
from supple.quantize._ranges import fixed_ranges
from supple.quantize.base import MOST_BITS, Input, Quantizer
from supple.technique import register
from supple.training.batches import run_model
from supple.transforms import Given
from supple.weights import as_matrix, from_matrix, matrices

__all__ = ["HessianInterlayer"]

Together = Literal["rest", "pairs", "none"]


@register(title="Hessians with inter-layer dependencies", paper="arXiv:2306.04879")
@dataclass(frozen=True, kw_only=True)
class HessianInterlayer(Quantizer):
    r"""Gives each layer as few of a list of bits as the loss allows, the least sensitive first.

    How much layer $i$ minds having $b$ bits is told from the curvature of the loss and from
    how it interacts with the other layers:

    $$\Omega_i(b) = \frac{\operatorname{tr} H_i}{2 n_i} \lVert Q_b(W_i) - W_i \rVert^2 +
    \sum_{j \ne i} D_{ij}(b), \qquad D_{ij} = L_{ij} - L_i - L_j + L_\emptyset.$$

    The trace of the Hessian of its $n_i$ weights is estimated by random signs, and $L_S$ is
    the loss on the calibration data with the layers $S$ rounded. Then all layers have the most
    bits, and bisection finds how many of the least sensitive can have the next fewer ones such
    that the loss stays within `rise`; of these, how many can have the next ones; and so on. Or,
    with `mean_bits`, a dynamic program takes the bits whose sensitivities have the least sum.

    Args:
        bits: The fewest, the last of `levels`; at 16 weights stay as they are.
        levels: Bits that a layer can have, from many to few; 16 leaves a layer as it is.
        rise: By what share of itself the loss on the calibration data may grow, 0 or more.
        mean_bits: Bits of a weight's code on average over all layers, in place of `rise`.
        together: How the interactions are measured: `"rest"`, from the loss with all layers
            rounded but one (equal to the sum over pairs as long as the loss is quadratic in the
            errors), `"pairs"`, all of them, or `"none"`, which leaves them out.
        samples: Random signs for the Hessians' traces.
        group_size: Inputs of an output that share a scale; None for all.
        symmetric: Whether there are no zero points.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        granularity: Who shares the scale of an input: a `"token"` (of a convolution an
            example), found as it comes, or the whole `"tensor"`, with zero points and the range
            of the calibration data; batch norms are then folded into the layers before them,
            and engines can multiply whole numbers.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether layers hold codes in place of weights.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> small = HessianInterlayer(mean_bits=6.0, levels=(8, 4)).apply(
        ...     model,
        ...     calibration=[torch.ones(5, 3)],
        ...     loss=lambda output, batch: output.square().mean(),
        ... )
        >>> sorted(layer.spec.bits for layer in small if hasattr(layer, "spec"))
        [4, 8]

    Source:
        Schaefer et al. 2023, "Augmenting Hessians with Inter-Layer Dependencies for
        Mixed-Precision Post-Training Quantization", arXiv:2306.04879; no code was published.
    Differs:
        The paper's term for interactions and its normalisation are not known to us; this is the
        second difference of the loss, and the Hessian's term has the half that makes it a
        change of the loss, too. The floor is one of the loss, not of accuracy (a reproduction
        has accuracy), and what is saved is bits, not a measured latency. Inputs have as many
        bits in all layers.
    Checked:
        Traces and interactions of quadratic losses by hand; the search against the layers that
        a full table of losses allows; few evaluations.
    """

    distinguishing: ClassVar[str] = "by_block"
    needs: ClassVar[tuple[str, ...]] = ("calibration", "loss")

    levels: tuple[int, ...] = (16, 8, 4)
    rise: float = 0.01
    mean_bits: float | None = None
    together: Together = "rest"
    samples: int = 64
    granularity: Granularity = "token"

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(int, self.levels)))
        super().__post_init__()
        if not self.levels or sorted(set(self.levels), reverse=True) != list(self.levels):
            raise SettingError(f"levels must fall from many bits to few, got {self.levels}")
        if self.levels[-1] != self.bits or self.levels[0] > MOST_BITS:
            raise SettingError(
                f"levels must begin with {MOST_BITS} at most and end with bits={self.bits}, "
                f"got {self.levels}"
            )
        if self.granularity not in ("token", "tensor"):
            raise SettingError(f"granularity must be token or tensor, got {self.granularity!r}")
        if self.format is not None:
            raise SettingError("levels are of whole numbers: leave format=None")
        if not 0 <= self.rise < math.inf:
            raise SettingError(f"rise must be at least 0, got {self.rise}")
        if self.mean_bits is not None and not self.mean_bits >= self.bits:
            raise SettingError(
                f"mean_bits must be at least the fewest bits that a layer gets, {self.bits}, "
                f"got {self.mean_bits}; add a smaller one to levels, which are {self.levels}"
            )
        if self.samples < 1:
            raise SettingError(f"samples must be at least 1, got {self.samples}")
        if self.together not in get_args(Together):
            raise SettingError(
                f"together must be one of {', '.join(get_args(Together))}, got "
                f"{self.together!r}{nearest(str(self.together), get_args(Together))}"
            )

    @classmethod
    def examples(cls) -> list[HessianInterlayer]:
        """Gives a few samples, and levels of which the toy gets two."""
        return [cls(levels=(8, 4), mean_bits=6.0, samples=2)]

    @classmethod
    def neutral(cls) -> HessianInterlayer:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, levels=(MOST_BITS,))

    @property
    def has_fixed_inputs(self) -> bool:
        """Whether inputs are rounded with one scale for all of them."""
        return self.rounds_inputs and self.granularity == "tensor"

    @property
    def inputs_wait(self) -> bool:
        """With one scale for all inputs, as ranges are those of the rounded network."""
        return self.has_fixed_inputs

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Folds norms where engines want it, and quantizes."""
        if self.has_fixed_inputs:
            model = fold_norms(model, *given.inputs())
        return super().change(model, given)

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Gives how inputs are rounded: by token, or with the range of calibration data."""
        if not self.has_fixed_inputs:
            return super().inputs(model, given)
        assert self.activations is not None
        spec = QuantSpec(Int(self.activations, symmetric=False), "tensor", symmetric=False)
        return fixed_ranges(model, given, spec, self.layers)

    @torch.no_grad()
    def by_block(self, model: nn.Module, given: Given) -> Iterator[Mapping[str, Quantized]]:
        """Rounds the weights of a model to the bits that their layers get, all at once.

        Args:
            model: The model; it is changed.
            given: Calibration batches, loss, generator.

        Yields:
            Name of a weight to its matrix, quantized; those of 16 bits are not there.
        """
        found: dict[str, Quantized] = {}
        layers = matrices(model, self.layers) if self.rounds_weights else {}
        bits = self.allocate(model, given) if layers else {}
        for name, few in bits.items():
            if few < MOST_BITS:
                found[name], rounded = self._as_rounded(layers[name], few)
                model.get_parameter(name).copy_(rounded)
        yield found

    @torch.no_grad()
    def allocate(self, model: nn.Module, given: Given) -> dict[str, int]:
        """Gives the bits that each layer gets, without changing anything.

        Args:
            model: The model.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to its bits.

        Raises:
            BudgetError: The loss rises too far with the most bits already, or the mean can't be
                had.
        """
        trial = Trial(model, self.rounded(model), lambda one: _mean_loss(one, given))
        minds = self.sensitivities(model, given, trial)
        if self.mean_bits is not None:
            return self._within(minds, model, self.mean_bits)
        allowed = trial({})
        return lowered(trial, minds, self.levels, allowed + self.rise * abs(allowed))

    @torch.no_grad()
    def sensitivities(
        self, model: nn.Module, given: Given, trial: Trial
    ) -> dict[int, dict[str, float]]:
        """Gives how much each layer minds fewer bits, in units of the loss.

        Args:
            model: The model.
            given: Calibration batches, loss, generator.
            trial: Measures the loss with some layers rounded.

        Returns:
            Bits to name of a weight to how much it minds.
        """
        names = list(matrices(model, self.layers))
        traces = hessian_traces(model, given, names, self.samples)
        found = {}
        for bits in self.levels[1:]:
            minds = {}
            for name in names:
                weight, rounded = model.get_parameter(name), trial.rounded[bits][name]
                lost = float((rounded - weight).double().square().sum())
                minds[name] = max(traces[name], 0.0) / (2 * weight.numel()) * lost
            if self.together != "none":
                pairs = self.together == "pairs"
                for name, more in interactions(trial, names, bits, pairs=pairs).items():
                    minds[name] += more
            found[bits] = minds
        return found

    def rounded(self, model: nn.Module) -> dict[int, dict[str, Tensor]]:
        """Gives the weights of a model, rounded to each number of bits below 16.

        Args:
            model: The model.

        Returns:
            Bits to name to the rounded weight.
        """
        layers = matrices(model, self.layers)
        return {
            bits: {name: self._as_rounded(layer, bits)[1] for name, layer in layers.items()}
            for bits in self.levels
            if bits < MOST_BITS
        }

    @torch.no_grad()
    def _as_rounded(self, layer: nn.Module, bits: int) -> tuple[Quantized, Tensor]:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        found = quantize(as_matrix(layer, weight).float(), self._spec(bits))
        return found, from_matrix(layer, found.dequantize(weight.dtype))

    def _spec(self, bits: int) -> QuantSpec:
        return dataclasses.replace(self.spec(), format=Int(bits, symmetric=self.symmetric))

    def _within(
        self, minds: Mapping[int, Mapping[str, float]], model: nn.Module, mean_bits: float
    ) -> dict[str, int]:
        """Gives the bits of the least sum of sensitivities within a mean."""
        names = list(matrices(model, self.layers))
        sizes = {name: model.get_parameter(name).numel() for name in names}
        curves = {
            name: Curve(
                amounts=self.levels,  # type: ignore[arg-type]
                costs=[bits * sizes[name] for bits in self.levels],  # type: ignore[arg-type]
                losses=[0.0, *(minds[bits][name] for bits in self.levels[1:])],  # type: ignore[arg-type]
            )
            for name in names
        }
        taken = dynamic_program(curves, mean_bits * sum(sizes.values()))
        return {name: int(bits) for name, bits in taken.amounts.items()}


def _mean_loss(model: nn.Module, given: Given) -> float:
    losses = [float(given.criterion(run_model(model, one), one)) for one in given.batches]
    return math.fsum(losses) / len(losses)
