"""QuantNAS: operators and bits are searched at once, under noise of the rounding's size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from supple.axes.operator import Operator, each_option
from supple.cost.count import MacCounter, inference, run_forward
from supple.errors import SettingError, UnsupportedModelError
from supple.layers.choice import Choice
from supple.layers.quantized import QuantizedConv2d, bits_of
from supple.network import Elastic, elastic
from supple.plan import Shadows
from supple.search._relaxed import (
    OutputMixture,
    Relaxation,
    RelaxedRun,
    RelaxedSearch,
    Weights,
)
from supple.technique import register
from supple.training.seeds import derive, kept
from supple.training.step import Sampler, WholeOnly

__all__ = ["BitOps", "NoisyMixture", "QuantNASSR"]

_SEEDS = 2**31
_QUIET = 0.25
"""Share of the search, after the delay, without any pull to a decision."""


@register(title="QuantNAS", paper="arXiv:2208.14839")
@dataclass(frozen=True, kw_only=True)
class QuantNASSR(RelaxedSearch):
    r"""Searches which convolutions a network has and how many bits each computes with.

    The network has `supple.layers.quantized.QuantizedConv2d`, which choose among bits, wherever
    it likes, also in the options of a `supple.layers.Choice`. It is trained as a mixture of its
    options; but bits are not tried by rounding. A convolution runs once for all $B$ numbers of
    bits, with its weight and its input (after a ReLU) replaced by

    $$\tilde x = \tfrac{1}{B + 1}\,x
      + \tfrac{B}{B + 1} \sum_b a_b\,\text{detach}(x + n_b), \qquad
      n_b = \tfrac{\max x - \min x}{2^b - 1} \cdot \tfrac12\,\mathcal N(0, 1),$$

    where $a$ are the bits' weights: noise stands for rounding errors, and gradients flow
    through the first term alone. The architecture parameters minimise, beside the loss,

    $$\epsilon\,m(t)\,H
      + \lambda\,\frac{\text{expected BitOps}}{\text{those of an even mixture}}, \qquad
      m(t) = t \cdot \log_{10}\!\big(2 + 8\,\tfrac{t - 1/4}{3/4}\big).$$

    $H$ is the entropy of all decisions, so that each comes to prefer one choice; $t$ goes from
    0 to 1 between `delay` and the end, and $m = 0$ up to $t = 1/4$. A convolution's BitOps are
    its multiply-accumulates times its bits squared (inputs and weights have the same).

    Extract what `derive` gives and train it anew: it rounds, with trained steps. In networks
    for super-resolution, put bodies into `supple.layers.adaptive_deviation_norm`.

    Args:
        lr: Learning rate of the architecture parameters.
        weight_decay: Of the architecture parameters.
        entropy: $\epsilon$, at least 0.
        bit_ops: $\lambda$, at least 0.
        delay: Share of the steps in which weights are trained alone, in [0, 1).
        order: `first`; noise that differs from forward to forward leaves no second order.
        frozen: Whether the architecture parameters stay where they start.

    Example:
        ```python
        model = nn.Sequential(..., AdaptiveDeviationNorm(Choice(*convolutions), 48), ...)
        net = supple.elastic(model, (x,), axes=[supple.Operator()])
        config = QuantNASSR(bit_ops=0.1).search(net, train, validation, l1, optimizer=adam)
        small = net.extract(config)
        ```

    Source:
        Shvetsov, Osin, Zaytsev, Koryakovskiy, Buchnev, Trofimov and Burnaev 2022, "QuantNAS for
        super resolution: searching for efficient quantization-friendly architectures against
        quantization noise", arXiv:2208.14839; On-Point-RND/QuantNAS, `search_sr.py` and
        `sr_models/quant_conv_lsq.py`.
    Differs:
        Operators and bits have parameters of their own, whose products are the authors' joint
        ones; $H$ is the joint entropy. The authors weigh bits by
        $a_b / (\sum a + 1 / (B + 1))$, which doesn't sum to 1 with the first term. $\lambda$ is
        2.2 times theirs, and they count bits, not squared, while they search. Their logarithm
        depends on the number of epochs; ours is that of 20. Inputs are rounded with a trained
        step, not a fixed one.
    Checked:
        Noise and its gradients by hand; BitOps against hand-counted ones; the weight of the
        entropy against the authors' at each epoch.
    """

    distinguishing: ClassVar[str] = "relaxation"

    weight_decay: float = 0.0
    entropy: float = 1e-3
    bit_ops: float = 0.1
    delay: float = 0.45

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("entropy", "bit_ops"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.delay < 1:
            raise SettingError(f"delay must lie in [0, 1), got {self.delay}")
        if self.order != "first":
            raise SettingError(
                f"order must be 'first', got {self.order!r}: noise differs from forward to "
                "forward, so that their difference is no derivative"
            )

    @classmethod
    def examples(cls) -> list[QuantNASSR]:
        return [cls(lr=0.1, delay=0.0)]

    @classmethod
    def toy(cls) -> Elastic:
        with kept(0):
            layers = nn.Sequential(
                *(nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 4, 1)),
                Choice(QuantizedConv2d(4, 4, 1), QuantizedConv2d(4, 4, (1, 3))),
                *(nn.Flatten(), nn.Linear(20, 3)),
            )
        return elastic(layers.train(), (torch.zeros(2, 5),), axes=[Operator()], verify=False)

    def relaxation(self) -> Relaxation:
        return NoisyMixture()

    def sampler(self, run: RelaxedRun) -> Sampler:
        return _Counted(bit_ops=BitOps(run.net))

    def rests(self, run: RelaxedRun) -> bool:
        return super().rests(run) or self._time(run) < 0

    def penalty(self, run: RelaxedRun, weights: Weights) -> Tensor | None:
        counted = run.weights.sampler
        assert isinstance(counted, _Counted)
        pull = self.entropy * pull_to_decide(self._time(run))
        return pull * joint_entropy(weights) + self.bit_ops * counted.bit_ops.relative(weights)

    def _time(self, run: RelaxedRun) -> float:
        """Gives where the search is: 0 when the delay ends, 1 at the last step."""
        steps = run.options.steps
        if steps is None:
            raise SettingError("QuantNASSR needs to know the number of steps; pass steps=")
        first = round(self.delay * steps)
        return (run.weights.steps - first) / max(1, steps - 1 - first)


def pull_to_decide(time: float) -> float:
    """Gives how much the entropy counts, from 0 to 1.

    Args:
        time: From 0, when architecture parameters begin to be trained, to 1 at the end.

    Example:
        >>> pull_to_decide(0.2), pull_to_decide(1.0)
        (0.0, 1.0)
    """
    if time < _QUIET:
        return 0.0
    return time * math.log10(2 + 8 * (time - _QUIET) / (1 - _QUIET))


# ------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class NoisyMixture(OutputMixture):
    """Mixes options by their outputs, but numbers of bits by noise of their rounding errors.

    Args:
        generator: What noise is drawn from, anew each time that the mixture is applied; None
            for the same noise each time.
        seed: Of the noise, where there is no generator.
    """

    generator: torch.Generator | None = None
    seed: int = 0

    def drawing_from(self, generator: torch.Generator) -> NoisyMixture:
        return dataclasses.replace(self, generator=generator)

    @contextlib.contextmanager
    def applied(self, net: Elastic, weights: Weights) -> Iterator[None]:
        if self.generator is None:
            with super().applied(net, weights):
                yield
            return
        # What backward recomputes must have the same noise: the seed is drawn once.
        seed = int(torch.randint(_SEEDS, (), generator=self.generator))
        with NoisyMixture(seed=seed).applied(net, weights):
            yield

    @contextlib.contextmanager
    def mixed(self, net: Elastic, weights: Weights) -> Iterator[None]:
        shadows = Shadows()
        rest = dict(weights)
        try:
            for name in weights:
                layer = net.module.get_submodule(name)
                if bits := bits_of(layer):
                    forward = functools.partial(self._noisy, name, bits, rest.pop(name))
                    shadows.put(vars(layer), "forward", forward)
            with super().mixed(net, rest):
                yield
        finally:
            shadows.end()

    def _noisy(
        self, name: str, bits: Sequence[int], weights: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Adds noise to what a convolution sees and to its weight, instead of rounding."""
        return tuple(
            noisy(x, weights, bits, _source(x.device, self.seed, name, i))
            for i, x in enumerate(tensors)
        )


def noisy(x: Tensor, weights: Tensor, bits: Sequence[int], source: torch.Generator) -> Tensor:
    """Mixes a tensor with copies that have the noise of so many bits.

    Args:
        x: Any tensor.
        weights: Of the numbers of bits, shape (numbers of bits,).
        bits: Bits per number.
        source: Of the noise, on the tensor's device.

    Returns:
        The mixture, of the shape of `x`. Its gradient reaches `x` through the copy without
        noise alone, and the weights through the others.
    """
    share = len(bits) / (len(bits) + 1)
    values = x.detach()
    least, most = values.aminmax()
    sizes = (most - least) / (2.0 ** torch.tensor(bits, device=x.device) - 1) / 2
    total = (1 - share) * x

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype)

    if not weights.requires_grad:
        # Noises that are added up are one noise, drawn once.
        size = share * (weights * sizes).norm()
        return total + noise().mul_(size).add_(share * weights.sum() * values)
    for weight, size in zip(weights, sizes, strict=True):
        total = total + (share * weight) * noise().mul_(size).add_(values)
    return total


def _source(device: torch.device, seed: int, *names: int | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(derive(seed, *names))


# ------------------------------------------------------------------------- what the search pays


class BitOps:
    """Bit operations of the quantized convolutions of a network, for its example inputs.

    Each counts its multiply-accumulates times its bits squared; other operators don't count.

    Args:
        net: An elastic network.

    Raises:
        UnsupportedModelError: There is no quantized convolution, or one could not be run.

    Example:
        >>> layer = QuantizedConv2d(2, 3, 1)
        >>> net = elastic(layer, torch.zeros(1, 2, 5, 5), axes=[Operator()], verify=False)
        >>> ops = BitOps(net)
        >>> ops({"precision": 0}) == 2 * 3 * 25 * 4**2, ops({"precision": 1}) == 2 * 3 * 25 * 64
        (True, True)
    """

    def __init__(self, net: Elastic) -> None:
        self._choices = {site.name: site.choices for site in net.space.sites}
        layers = _convolutions(net)
        macs = _multiply_accumulates(net, layers)
        self._terms = [(path, macs[path], layer.bits) for path, layer in layers.items()]
        even = {name: torch.full((len(c),), 1 / len(c)) for name, c in self._choices.items()}
        self._even = float(self.expected(even))

    def __call__(self, config: Mapping[str, int]) -> float:
        """Counts those of a config."""
        weights = {
            name: torch.tensor([float(each == config.get(name)) for each in choices])
            for name, choices in self._choices.items()
        }
        return float(self.expected(weights))

    def expected(self, weights: Weights) -> Tensor:
        """Gives those of a mixture, differentiably.

        Args:
            weights: Of all sites, as probabilities of their choices.
        """
        total = torch.zeros((), dtype=torch.float64)
        for path, macs, bits in self._terms:
            squares = torch.tensor(bits, dtype=torch.float64) ** 2
            chosen = weights.get(f"{path}.precision".lstrip("."), torch.ones(1))
            total = total + macs * presence(path, weights) * (squares * chosen.cpu()).sum()
        return total

    def relative(self, weights: Weights) -> Tensor:
        """Gives those of a mixture, relative to an even one."""
        return self.expected(weights) / self._even


def presence(path: str, weights: Weights) -> Tensor:
    """Gives how probable it is that a module, or a site, is in the network.

    Args:
        path: Where it is, perhaps inside options of choices.
        weights: By site, as probabilities of its choices.

    Returns:
        The product over the options that it lies in, a scalar.

    Example:
        >>> presence("cell.options.1.precision", {"cell": torch.tensor([0.25, 0.75])}).item()
        0.75
    """
    share = torch.ones(())
    for name, each in weights.items():
        head, options, tail = path.partition(f"{name}.options.".lstrip("."))
        if options and not head:
            share = share * each[int(tail.partition(".")[0])].cpu()
    return share


def joint_entropy(weights: Weights) -> Tensor:
    """Gives the entropy of all decisions in nats, where those inside options may not arise.

    Args:
        weights: By site, as probabilities of its choices.

    Example:
        >>> coin = torch.tensor([0.5, 0.5])
        >>> joint_entropy({"cell": coin, "cell.options.1.precision": coin}).item() / math.log(2)
        1.5
    """
    each = {
        # 0 log 0 is 0, with a finite gradient.
        name: -(w * w.clamp_min(torch.finfo(w.dtype).tiny).log()).sum().cpu()
        for name, w in weights.items()
    }
    return torch.stack([presence(name, weights) * h for name, h in each.items()]).sum()


def _convolutions(net: Elastic) -> dict[str, QuantizedConv2d]:
    modules = net.module.named_modules()
    found = {path: module for path, module in modules if isinstance(module, QuantizedConv2d)}
    if not found:
        raise UnsupportedModelError(
            f"{type(net.module).__name__} has no convolution whose bits could be chosen; use "
            "supple.layers.quantized.QuantizedConv2d"
        )
    return found


def _multiply_accumulates(
    net: Elastic, layers: Mapping[str, QuantizedConv2d]
) -> dict[str, int]:
    """Counts those of each layer, running each option once."""
    found: dict[str, int] = {}
    shadows = Shadows()
    try:
        for path, layer in layers.items():
            count = functools.partial(_count, found, path, layer)
            shadows.put(vars(layer), "forward", count)
        choices = [m for m in net.module.modules() if isinstance(m, Choice)]
        for option in each_option(choices) or [contextlib.nullcontext()]:
            with option, inference(net.module):
                run_forward(net.module, net.args, net.kwargs)
    finally:
        shadows.end()
    missing = [path for path in layers if path not in found]
    if missing:
        raise UnsupportedModelError(
            f"the bit operations of {', '.join(missing)} can't be counted: they never ran when "
            "each option of the network was run once"
        )
    return found


def _count(found: dict[str, int], path: str, layer: QuantizedConv2d, x: Tensor) -> Tensor:
    with MacCounter() as counter:
        out = type(layer).forward(layer, x)
    found[path] = counter.total
    return out


@dataclass(frozen=True)
class _Counted(WholeOnly):
    """Trains the mixture, and holds what the architecture parameters pay for."""

    role: str = "weights"
    bit_ops: BitOps = dataclasses.field(kw_only=True)
