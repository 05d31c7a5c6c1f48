"""Rounding that can be trained through: numbers of a few bits in the forward pass.

`FakeQuantize` rounds one tensor. It joins a `supple.formats.QuantSpec` with where the range of
the numbers comes from and with what stands for the gradient of rounding, which is zero almost
everywhere. `FakeQuantized` stands in the place of a layer and rounds its weight and its input:

    spec = QuantSpec("int4", "channel")
    layer = FakeQuantized(linear, FakeQuantize(spec, scales=spec.scale_shape(weight.shape)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from supple.errors import SettingError, UnsupportedModelError, nearest
from supple.formats import SCALE_SLACK, Int, NumberFormat, Quantized, QuantSpec, quantize
from supple.observers import RANGES, RangeObserver

__all__ = ["Estimator", "FakeQuantize", "FakeQuantized"]

Estimator = Literal["ste", "clipped", "trust", "lsq", "pact", "noise"]
_LEARNED = ("lsq", "pact")
_SMALLEST = 1e-5  # of a learned scale


class FakeQuantize(nn.Module):
    r"""Rounds a tensor, and lets gradients through.

    A number $x$ becomes $s\,(\text{round}(x / s + z) - z)$. Ways to have a gradient:

    - `"ste"`: that of the identity, everywhere.
    - `"clipped"`: that of the identity, and zero where $x$ lies outside the format's range.
    - `"trust"`: that of the identity where rounding moves $x$ by at most `trust` steps.
    - `"lsq"`: the scale is learned, too. With $v = x / s$, clipped to $[n, p]$, its gradient is
      $\text{round}(v) - v$ inside, $n$ or $p$ outside, times $1 / \sqrt{N p}$ for $N$ numbers
      with one scale.
    - `"pact"`: the bound $p s$ is learned: its gradient is that of clipping to it.
    - `"noise"`: in training nothing is rounded, and noise is added, uniform within half a step;
      `seed` decides which.

    Args:
        spec: How the tensor is quantized, or what `QuantSpec.settings` gave.
        observer: Where ranges come from: a name of `supple.observers.RANGES`, found anew in
            each call; `"ema"`, running averages of the batches' least and most; `"learned"`,
            with the estimators that learn.
        estimator: What stands for the gradient.
        scales: Shape of the scales, `spec.scale_shape(...)`, where they are held.
        decay: Of the running averages, in [0, 1).
        trust: In steps, above 0.
        shift: Size of the last dimension, to learn what is added to the input before and after
            it is rounded; 0 for neither.
        rotation: Maps the last dimension before anything is rounded, and not back: a weight and
            an input that were mapped by the same orthogonal matrix have the same product.

    Attributes:
        scale: What is learned: scales, or None.
        bound: What is learned: bounds, or None.
        seed: Of the noise.

    Shape:
        Any, and the same.

    Raises:
        SettingError: A setting can't be used, or settings don't go together.

    Example:
        >>> x = torch.tensor([[3.0, 1.2, -9.0]], requires_grad=True)
        >>> rounds = FakeQuantize(QuantSpec("int3"), observer="rms", estimator="clipped")
        >>> x.grad, = torch.autograd.grad(rounds(x).sum(), x)
        >>> rounds(x).tolist(), x.grad.tolist()
        ([[4.0, 2.0, -8.0]], [[1.0, 1.0, 1.0]])
    """

    scale: nn.Parameter | None
    bound: nn.Parameter | None
    zero: Tensor | None
    least: Tensor | None
    most: Tensor | None
    before: nn.Parameter | None
    after: nn.Parameter | None

    def __init__(
        self,
        spec: QuantSpec | Mapping[str, Any],
        *,
        observer: str = "minmax",
        estimator: Estimator = "ste",
        scales: tuple[int, int] = (1, 1),
        decay: float = 0.99,
        trust: float = 0.5,
        shift: int = 0,
        rotation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec if isinstance(spec, QuantSpec) else QuantSpec(**spec)
        self.observer, self.estimator, self.scales_shape = observer, estimator, tuple(scales)
        self.decay, self.trust, self.shift = decay, trust, shift
        self._check()
        self.rotation = rotation
        # One dimension, since optimizers leave such parameters out of weight decay.
        for name, kind in (("scale", "lsq"), ("bound", "pact")):
            learned = nn.Parameter(torch.ones(math.prod(scales)))
            self.register_parameter(name, learned if estimator == kind else None)
        shifted = observer == "learned" and not self.spec.symmetric
        self.register_buffer("zero", torch.zeros(scales) if shifted else None)
        for name in ("least", "most"):
            self.register_buffer(name, torch.zeros(scales) if observer == "ema" else None)
        for name in ("before", "after"):
            own = nn.Parameter(torch.zeros(shift)) if shift else None
            self.register_parameter(name, own)
        self.seed = 0

    def _check(self) -> None:
        if self.estimator not in get_args(Estimator):
            raise SettingError(
                f"estimator must be one of {', '.join(get_args(Estimator))}, got "
                f"{self.estimator!r}{nearest(str(self.estimator), get_args(Estimator))}"
            )
        observers = (*RANGES, "ema", "learned")
        if self.observer not in observers:
            raise SettingError(
                f"there is no observer '{self.observer}'{nearest(self.observer, observers)} "
                f"(observers: {', '.join(observers)})"
            )
        if (self.observer == "learned") != (self.estimator in _LEARNED):
            raise SettingError(
                f"observer='learned' goes with estimator {' or '.join(_LEARNED)} and only with "
                f"them, got {self.observer!r} and {self.estimator!r}"
            )
        if self.observer == "learned" and not isinstance(self.spec.format, Int):
            raise SettingError(
                f"what is learned are scales of whole numbers, got '{self.spec.format.name}'"
            )
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")
        if not self.trust > 0 or self.shift < 0:
            raise SettingError(
                f"trust must be above 0 and shift at least 0, got {self.trust} and {self.shift}"
            )

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {
            "spec": self.spec.settings(),
            "observer": self.observer,
            "estimator": self.estimator,
            "scales": self.scales_shape,
            "decay": self.decay,
            "trust": self.trust,
            "shift": self.shift,
            "rotation": self.rotation,
        }

    @property
    def held(self) -> bool:
        """Whether scales are held, and not found anew for each tensor."""
        return self.observer in ("ema", "learned")

    @torch.no_grad()
    def begin(self, x: Tensor) -> FakeQuantize:
        r"""Sets what is held from numbers that are like those to come.

        Bounds and running averages begin at least and most, learned scales where the numbers
        are rounded with the least error. (LSQ's begin at $2\,\text{mean}|x| / \sqrt{p}$, which
        leaves more to learn: a ResNet-20 with 4 bits throughout begins with 26 % of images
        right, and from the least error with 70 %.)

        Args:
            x: The numbers. Of a spec for whole tensors they may be of any shape.

        Returns:
            The layer itself.
        """
        x = self._mapped(x)
        if self.least is not None and self.most is not None:
            for held, found in zip((self.least, self.most), self._ends(x), strict=True):
                held.copy_(found)
        elif self.scale is not None:
            self.scale.copy_(self._least_error(x).flatten())
        elif self.bound is not None:
            self.bound.copy_((self.spec.scales(x)[0] * self.spec.format.most).flatten())
        return self

    def _least_error(self, x: Tensor) -> Tensor:
        if self.spec.granularity != "tensor":
            return self.spec.scales(x, RANGES["mse"])[0]
        observer = RangeObserver(self.spec, "mse")  # which looks at some of many numbers
        observer.see(x)
        return observer.result()[0]

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives scales and zero points for a tensor; those that are learned have a gradient.

        Args:
            x: The tensor, mapped already.

        Returns:
            As `QuantSpec.scales`.
        """
        spec = self.spec
        if self.scale is not None:
            return self._stored(self.scale), self.zero
        if self.bound is not None:
            return self._stored(self.bound / spec.format.most), self.zero
        if self.least is not None and self.most is not None:
            return spec.scales_of(self.least, self.most)
        return spec.scales(x.detach(), RANGES[self.observer])

    def _stored(self, scale: Tensor) -> Tensor:
        """Rounds learned scales to what their format has."""
        scale = scale.reshape(self.scales_shape)
        stored = self.spec.stored_scale(scale.detach().clamp_min(_SMALLEST))
        return _with_gradient_of(scale, stored)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        assert self.least is not None
        assert self.most is not None
        for held, found in zip((self.least, self.most), self._ends(x), strict=True):
            held.lerp_(found, 1 - self.decay)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [part.float() for part in self.spec.blocks(x)]
        least, most = [part.amin(-1) for part in parts], [part.amax(-1) for part in parts]
        return torch.cat(least, 1), torch.cat(most, 1)

    def _mapped(self, x: Tensor) -> Tensor:
        found: Tensor = x if self.rotation is None else self.rotation(x)
        return found

    @torch.no_grad()
    def quantized(self, x: Tensor) -> Quantized:
        """Gives the codes that a tensor is rounded to when it is not trained.

        Args:
            x: The tensor; `shift` has no part in it.
        """
        x = self._mapped(x)
        return quantize(x, self.spec, *self.scales(x))

    def forward(self, x: Tensor) -> Tensor:
        """Rounds a tensor."""
        if self.before is not None:
            x = x + self.before
        x = self._mapped(x)
        if self.training and self.observer == "ema":
            self._watch(x)
        spec = self.spec
        scale, zero = (
            None if one is None else spec.spread(one, x.shape) for one in self.scales(x)
        )
        assert scale is not None
        # One scale for all needs no rows, and no copy of what does not lie in order.
        one = spec.granularity == "tensor" and x.dim() > 1
        rows = (x if one else x.reshape(spec.matrix_shape(x.shape))).float()
        if self.estimator == "noise" and self.training:
            found = rows + self._noise(rows) * scale.detach()
        else:
            found = _ESTIMATORS[self.estimator](self, rows, scale, zero)
        found = found.reshape(x.shape).to(x.dtype)
        return found if self.after is None else found + self.after

    def _noise(self, rows: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(self.seed)
        return (torch.rand(rows.shape, generator=source) - 0.5).to(rows.device)

    def extra_repr(self) -> str:
        """Tells format, range and gradient."""
        spec = self.spec
        return f"{spec.format.name}, {spec.granularity}, {self.observer}, {self.estimator}"


# ------------------------------------------------------------------------------ estimators


def _back(form: NumberFormat, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Gives what the codes of numbers stand for, without a gradient."""
    rows, scale = rows.detach(), scale.detach()
    if zero is None:
        return form.round(rows / scale) * scale
    return (form.round(rows / scale + zero) - zero) * scale


def _with_gradient_of(x: Tensor, found: Tensor) -> Tensor:
    """What was found, to the last bit, with the gradient of something else."""
    return found + (x - x.detach())


def _ste(layer: FakeQuantize, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return _with_gradient_of(rows, _back(layer.spec.format, rows, scale, zero))


def _clipped(layer: FakeQuantize, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    form = layer.spec.format
    level = rows.detach() / scale + (0.0 if zero is None else zero)
    # Ends of a range that are half a step beyond the values pass, a rounded scale or not.
    low, high = (form.least, form.most) if zero is not None else form.ends
    passes = (level >= SCALE_SLACK * low) & (level <= SCALE_SLACK * high)
    return _with_gradient_of(rows * passes, _back(form, rows, scale, zero))


def _trust(layer: FakeQuantize, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    found = _back(layer.spec.format, rows, scale, zero)
    passes = (found - rows.detach()).abs() <= layer.trust * scale
    return _with_gradient_of(rows * passes, found)


def _lsq(layer: FakeQuantize, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    form = layer.spec.format
    assert layer.scale is not None
    share = 1 / math.sqrt(rows.numel() / layer.scale.numel() * form.most)
    step = _with_gradient_of(scale * share, scale.detach())
    level = rows / step if zero is None else rows / step + zero
    inside = level.clamp(form.least, form.most)
    found = _with_gradient_of(inside, form.round(level).detach())
    return (found if zero is None else found - zero) * step


def _pact(layer: FakeQuantize, rows: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    form = layer.spec.format
    kept = torch.minimum(torch.maximum(rows, scale * form.least), scale * form.most)
    return _with_gradient_of(kept, _back(form, rows, scale, zero))


_Through = Callable[[FakeQuantize, Tensor, Tensor, Tensor | None], Tensor]
_ESTIMATORS: Mapping[str, _Through] = {
    "ste": _ste,
    "clipped": _clipped,
    "trust": _trust,
    "lsq": _lsq,
    "pact": _pact,
    "noise": _ste,
}


# ---------------------------------------------------------------------------------- layers


class FakeQuantized(nn.Module):
    r"""A layer that is trained with a rounded weight and a rounded input.

    A batch norm that follows the layer can be taken in. Its gain over its deviation is then
    folded into the weight before that is rounded, with the running deviation, so that weights
    do not flicker; the batch's own mean and deviation $\sigma_B$ correct what comes out, by
    $\sigma / \sigma_B$. Once `frozen` is set, and in evaluation mode, running statistics serve
    for both.

    Args:
        layer: A linear layer, a convolution, an embedding, or another module with a weight that
            takes one tensor.
        of_weight: Rounds the weight as a matrix (out, columns); see `matrix`.
        of_input: Rounds the input.
        norm: The batch norm.

    Attributes:
        frozen: Whether the norm's running statistics stay and count.

    Shape:
        That of the layer.

    Raises:
        UnsupportedModelError: The layer is a transposed convolution.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[3.5, 1.2]]))
        >>> FakeQuantized(linear, FakeQuantize(QuantSpec("int3")))(torch.eye(2)).tolist()
        [[3.0], [1.0]]

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference: A
        whitepaper", arXiv:1806.08342, section 3.2.2, for the norm.
    """

    def __init__(
        self,
        layer: nn.Module,
        of_weight: nn.Module | None = None,
        of_input: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if isinstance(layer, _ConvTransposeNd):
            raise UnsupportedModelError(
                "a transposed convolution can't be trained with rounded weights; leave it out "
                "by layers="
            )
        self.layer, self.of_weight, self.of_input = layer, of_weight, of_input
        self.norm = norm
        self.frozen = False

    @property
    def weight(self) -> Any:
        """The layer's weight, as it is trained."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's bias."""
        return getattr(self.layer, "bias", None)

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {
            "layer": self.layer,
            "of_weight": self.of_weight,
            "of_input": self.of_input,
            "norm": self.norm,
        }

    def matrix(self) -> Tensor:
        """Gives the weight as a matrix, the norm's factor in it, not rounded."""
        # As `supple.weights.as_matrix` does.
        weight: Tensor = self.weight.T if self._transposed else self.weight.flatten(1)
        return weight if self.norm is None else weight * self._factors(self.norm)[0][:, None]

    def rounded(self) -> Tensor:
        """Gives the weight that the layer computes with, of the weight's shape."""
        matrix = self.matrix()
        if self.of_weight is not None:
            matrix = self.of_weight(matrix)
        return matrix.T if self._transposed else matrix.reshape(self.weight.shape)

    @property
    def _transposed(self) -> bool:
        return isinstance(self.layer, Conv1D)

    def folded_bias(self) -> Tensor | None:
        """Gives the bias of a layer that does without the norm."""
        bias: Tensor | None = self.bias
        if self.norm is None:
            return bias
        factor, added = self._factors(self.norm)
        return added if bias is None else added + bias * factor

    def _factors(self, norm: Any) -> tuple[Tensor, Tensor]:
        """What the norm multiplies each channel by, and then adds, in evaluation mode."""
        factor = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        added: Tensor = -norm.running_mean * factor
        return factor, added if norm.bias is None else added + norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Rounds the input and gives what the layer with a rounded weight makes of it."""
        if self.of_input is not None:
            x = self.of_input(x)
        if self.of_weight is None and self.norm is None:
            plain: Tensor = self.layer(x)
            return plain
        if self.norm is None:
            return self._made(x, self.rounded(), self.bias)
        if self.training and not self.frozen:
            return self._with_batch_statistics(self.norm, x)
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        added = self.folded_bias()
        assert added is not None
        return self._made(x, self.rounded(), None) + added.reshape(shape)

    def _made(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = {"weight": weight}
        if self.bias is not None:
            given["bias"] = torch.zeros_like(self.bias) if bias is None else bias
        found: Tensor = functional_call(self.layer, given, (x,))
        return found

    def _with_batch_statistics(self, norm: Any, x: Tensor) -> Tensor:
        plain = self._made(x, self.weight, self.bias)
        shape = [-1 if dim == 1 else 1 for dim in range(plain.dim())]
        over = [dim for dim in range(plain.dim()) if dim != 1]
        running = (norm.running_var + norm.eps).sqrt()
        variance, mean = torch.var_mean(plain, over, correction=0)
        deviation = (variance + norm.eps).sqrt()
        corrected = self._made(x, self.rounded(), None) * (running / deviation).reshape(shape)
        _track(norm, mean.detach(), variance.detach(), plain.numel() // len(mean))
        offset = -mean if self.bias is None else self.bias - mean
        added: Tensor = offset / deviation * (1.0 if norm.weight is None else norm.weight)
        added = added if norm.bias is None else added + norm.bias
        found: Tensor = corrected + added.reshape(shape)
        return found


@torch.no_grad()
def _track(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """Takes a batch into a norm's running statistics, as the norm itself would."""
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
