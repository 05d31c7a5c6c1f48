"""Fast scaling: grow mostly in width, which costs the fewest activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from supple.errors import SettingError
from supple.search._scaling import Factors, ScalingRule, Spec, by_shares
from supple.technique import register

__all__ = ["FastScaling", "Spec"]


@register(title="Fast compound scaling", paper="arXiv:2103.06877")
@dataclass(frozen=True, kw_only=True)
class FastScaling(ScalingRule):
    r"""Scales a convolutional network so that it stays fast: mostly in width.

    Multiply-accumulates grow with $d w^2 r^2$ (depth, width, resolution), but the sizes of all
    activations with $d w r^2$ only, and on hardware that waits for memory the time follows the
    activations. A growth by $s$ is split into $s^{e_d}$ for depth, $s^{e_w / 2}$ for width and
    $s^{e_r / 2}$ for resolution with $e_w = \alpha$ and $e_d = e_r = (1 - \alpha) / 2$, so that
    activations grow by $s^{1 - \alpha / 2}$: $s^{0.6}$ at the default, $s^{0.83}$ where all
    three grow alike ($\alpha = 1/3$). Widths of groups grow as widths do.

    On an elastic network the sites of width (and heads), depth and resolution follow the rule,
    all others stay at their full choice, and the search tries ever finer values of $s$.

    Args:
        alpha: Share of the growth that goes into width, from 0 to 1 (width alone).
        divisor: Widths are multiples of it.
        resolution_divisor: Resolutions are multiples of it.

    Example:
        >>> from supple.models.base import build
        >>> from supple.search.fast_scaling import Spec
        >>> base = Spec(depth=(2, 2, 2), width=(16, 32, 64), resolution=32)
        >>> spec = FastScaling().scale(base, 16)
        >>> spec
        Spec(depth=(3, 3, 3), width=(48, 96, 192), resolution=36, group=())
        >>> net = build("digits-cnn", blocks=spec.depth, widths=spec.width, channels=3)

    Source:
        Dollár, Singh and Girshick 2021, "Fast and Accurate Model Scaling", arXiv:2103.06877;
        facebookresearch/pycls, `pycls/models/scaler.py`, preset `d1_w8_g8_r1`.
    Differs:
        No stage has a bottleneck of another width. `scale` can move the widths until a cost is
        met (`macs=`); the authors take what rounding gives.
    Checked:
        Factors and rounding against the authors' scaler, by hand; exponents of activations.
    """

    distinguishing: ClassVar[str] = "factors"

    alpha: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise SettingError(f"alpha must be in [0, 1], got {self.alpha}")

    def factors(self, s: float) -> Factors:
        rest = (1.0 - self.alpha) / 2
        return by_shares(s, depth=rest, width=self.alpha, resolution=rest)
