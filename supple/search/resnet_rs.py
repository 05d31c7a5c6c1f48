"""ResNet-RS: grow in depth where training can overfit, in width where it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from supple.errors import SettingError
from supple.search._scaling import Factors, ScalingRule, Spec, by_shares
from supple.technique import register

__all__ = ["ResNetRS", "Spec"]


@register(title="Scaling strategies of ResNet-RS", paper="arXiv:2103.07579")
@dataclass(frozen=True, kw_only=True)
class ResNetRS(ScalingRule):
    r"""Scales a convolutional network by how long it will be trained.

    Where training is long enough to overfit, depth is the better way to spend a larger cost;
    where it is short, width is. Resolution grows more slowly than under compound scaling. A
    growth of the multiply-accumulates by $s$ is split into $s^{\rho / 2}$ for resolution and,
    for the rest, $s^{1 - \rho}$ for depth or $s^{(1 - \rho) / 2}$ for width, where $\rho$ is
    `resolution_share`.

    On an elastic network the sites of depth or width, and of resolution, follow the rule, all
    others stay at their full choice, and the search tries ever finer values of $s$.

    Args:
        overfits: Whether training is long enough to overfit (the paper: hundreds of epochs of
            ImageNet). At 10 epochs width was better; at 100 neither always was.
        resolution_share: Share of the growth that goes into resolution, in [0, 1].
        divisor: Widths are multiples of it.
        resolution_divisor: Resolutions are multiples of it.

    Example:
        >>> from supple.search.resnet_rs import Spec
        >>> base = Spec(depth=(2, 2, 2), width=(16, 32, 64), resolution=32)
        >>> ResNetRS().scale(base, 4).depth, ResNetRS(overfits=False).scale(base, 4).width
        ((5, 5, 5), (24, 48, 96))

    Source:
        Bello, Fedus, Du et al. 2021, "Revisiting ResNets: Improved Training and Scaling
        Strategies", arXiv:2103.07579; configurations in tensorflow/tpu,
        `models/official/resnet/resnet_rs`.
    Differs:
        The paper gives no formula for resolution, but a family of eleven networks chosen by
        hand. From the first (50 layers, 160 pixels) to the last (420 layers, 320 pixels) the
        product of layers and pixels grows 33.6 times, 0.39 of it (in logarithms) in pixels;
        hence the default of 0.4. Compound scaling has 0.43, and so has a straight line through
        all eleven. The paper's training recipe and its changes of architecture (ResNet-D,
        squeeze-excite) are no part of the rule.
    Checked:
        Factors by hand; the default against the released family.
    """

    distinguishing: ClassVar[str] = "factors"

    overfits: bool = True
    resolution_share: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.resolution_share <= 1.0:
            raise SettingError(
                f"resolution_share must be in [0, 1], got {self.resolution_share}"
            )

    def factors(self, s: float) -> Factors:
        rest = 1.0 - self.resolution_share
        depth, width = (rest, 0.0) if self.overfits else (0.0, rest)
        return by_shares(s, depth=depth, width=width, resolution=self.resolution_share)
