"""One network for every number of bits, trained from the largest down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supple.axes.bits import Bits, BitsSite
from supple.errors import SettingError
from supple.network import Elastic, elastic
from supple.quantize._supernet import BitsRule, BitsSampler, fit_steps, of_bits
from supple.technique import register
from supple.training.batches import Loss
from supple.training.losses import Criterion, Earlier, learnable, logits_of, soft_cross_entropy
from supple.training.step import Pass, Sampler

__all__ = ["EQNet", "distribution_penalty"]


@register(title="EQ-Net: elastic quantization networks", paper="arXiv:2308.07650")
@dataclass(frozen=True, kw_only=True)
class EQNet(BitsRule):
    r"""Trains one set of weights to serve any number of bits, granularity and symmetry.

    The network is elastic along `Bits(learned=True)`: each layer has a step for each mode and
    number of bits, for its weight and for its input. Each training step runs the size with the
    most bits, a random one and the one with the fewest. The first learns from labels. Each of
    the others minimises half the user's loss and half the divergence from what the size
    before it gave, so what is learned at many bits reaches few in small strides (group
    progressive guidance). Modes are drawn at random in all of them.

    Weights that lie flat suit few levels as well as many, so the first pass also minimises,
    averaged over all layers but the first,

    $$\lambda_k\,(\text{kurtosis} - 1.8)^2 + \lambda_s\,\text{skewness}^2,$$

    where 1.8 is the kurtosis of a uniform distribution. `supple.train` first fits all steps to
    weights, and to what the layers are given on the network's example inputs (for more data,
    call `supple.quantize._supernet.fit_steps`).

    The full choice of `Bits`, in which nothing is rounded, is not trained by itself. Where
    there are batch norms, recalibrate sizes before use. A predictor for searching is
    `supple.predictors.MLP(hidden=(400, 400, 400))`.

    Args:
        aggregate: How the gradients of a step's passes meet: `sum`, `mean` or `masked_mean`.
        random: Random sizes per step, at least 0.
        soft: Weight of the divergence in the loss of all but the first size.
        labels: Weight of the user's loss there.
        kurtosis: $\lambda_k$, at least 0.
        skewness: $\lambda_s$, at least 0.
        ends: Whether the first and the last layer keep the most bits in all sizes that are
            trained.

    Example:
        ```python
        axis = Bits((2, 3, 4, 8), inputs=(2, 3, 4, 8), learned=True)
        net = supple.elastic(model, x, axes=[axis])
        supple.train(net, loader, loss, method=EQNet(), optimizer="adam", lr=1e-3, epochs=3)
        small = net.extract(net.space.smallest())
        ```

    Source:
        Xu et al. 2023, "EQ-Net: Elastic Quantization Neural Networks", arXiv:2308.07650;
        xuke225/EQ-Net.
    Differs:
        Zero points stay as they were fitted, as the paper says; the authors' code trains those
        of asymmetric modes. Gradients are clipped by norm, if the user says so, where theirs
        are by value at 1. Steps are held in float16. The penalty is part of the first pass.
    Checked:
        Penalty and losses by hand; which sizes a step trains; fitted steps against the error
        of LSQ's first ones.
    """

    distinguishing: ClassVar[str] = "criterion"

    random: int = 1
    soft: float = 0.5
    labels: float = 0.5
    kurtosis: float = 0.015
    skewness: float = 1.0
    ends: bool = True

    def __post_init__(self) -> None:
        for name in ("random", "soft", "labels", "kurtosis", "skewness"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.soft + self.labels > 0:
            raise SettingError("soft and labels are both 0: there is nothing to learn")

    @classmethod
    def examples(cls) -> list[EQNet]:
        """Gives one with all layers at few bits."""
        return [cls(ends=False)]

    @classmethod
    def toy(cls) -> Elastic:
        """Gives a small network whose bits are elastic."""
        source = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5, generator=source)
        axis = Bits((4, 8), inputs=(8,), learned=True)
        return elastic(model.train(), (torch.ones(2, 5),), axes=[axis], verify=False)

    def sampler(self, net: Elastic, generator: torch.Generator) -> Sampler:
        return _Descending(net, generator, self)

    def criterion(self, net: Elastic, loss: Loss) -> Criterion:
        return _Guided(net, loss, self)

    def prepare(self, net: Elastic) -> None:
        """Fits the steps.

        Args:
            net: The network.
        """
        fit_steps(net)


class _Descending(BitsSampler):
    """The most bits, random ones, the fewest."""

    def __init__(self, net: Elastic, generator: torch.Generator, method: EQNet) -> None:
        super().__init__(net, generator)
        self.net, self.method = net, method
        self.kept = _ends(net) if method.ends else frozenset[str]()

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes, in roles `largest`, `random` and `smallest`."""
        largest = self._of_bits(most=True)
        kept = {name: largest[name] for name in self.kept if name in largest}
        drawn = [
            Pass(self.net.space.config({**self.random(), **kept}), "random")
            for _ in range(self.method.random)
        ]
        smallest = Pass(self._of_bits(most=False), "smallest")
        return [Pass(largest, "largest"), *drawn, smallest]

    def _of_bits(self, *, most: bool) -> Any:
        return of_bits(self.net, self.generator, most=most, kept=self.kept)


def _ends(net: Elastic) -> frozenset[str]:
    """Names of the sites of the first and of the last layer."""
    sites = [site for site in net.space.sites if isinstance(site, BitsSite)]
    ends = {sites[0].path, sites[-1].path} if sites else set()
    return frozenset(site.name for site in sites if site.path in ends)


class _Guided:
    """Each size learns from labels and from the one before it; weights are to lie flat."""

    teachers = frozenset({"largest", "random"})

    def __init__(self, net: Elastic, loss: Loss, method: EQNet) -> None:
        self.loss, self.method = loss, method
        sites = [s for s in net.space.sites if isinstance(s, BitsSite) and not s.input]
        self.weights = [net.module.get_submodule(site.path) for site in sites[1:]]

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the loss of a pass."""
        own = self.loss(output, batch)
        if entry.role == "largest":
            return own + self._penalty()
        before = earlier.get("random") or earlier["largest"]
        student = logits_of(output)
        guided = soft_cross_entropy(
            student, logits_of(before[-1]), where=learnable(batch, student, -1)
        )
        return self.method.labels * own + self.method.soft * guided

    def _penalty(self) -> Tensor | float:
        method = self.method
        if not self.weights or not (method.kurtosis or method.skewness):
            return 0.0
        owned = [layer._parameters["weight"] for layer in self.weights]
        each = [
            distribution_penalty(weight, method.kurtosis, method.skewness)
            for weight in owned
            if weight is not None
        ]
        return torch.stack(each).mean()


def distribution_penalty(weight: Tensor, kurtosis: float, skewness: float) -> Tensor:
    r"""Tells how far weights are from lying flat and even.

    Args:
        weight: The weights.
        kurtosis: What $(\text{kurtosis} - 1.8)^2$ is multiplied by.
        skewness: What $\text{skewness}^2$ is multiplied by.

    Returns:
        A scalar.

    Example:
        >>> even = torch.linspace(-1, 1, 1001)
        >>> round(distribution_penalty(even, 1.0, 1.0).item(), 3)
        0.0
        >>> distribution_penalty(even.exp(), 1.0, 1.0) > 0.1
        tensor(True)
    """
    centred = (weight - weight.mean()) / weight.std().clamp_min(1e-12)
    flat = (centred.pow(4).mean() - 1.8).square()
    return kurtosis * flat + skewness * centred.pow(3).mean().square()
