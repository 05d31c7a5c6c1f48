"""Divergences that punish a student both for missing what its teacher knows and for inventing.

Cross-entropy to a teacher (`supple.training.losses`) is blind to classes that only the student
believes in: it over-estimates uncertainty freely. The family of alpha-divergences has members
for either side, and the adaptive one takes, for each example, the side that is worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.training.batches import Loss
from supple.training.losses import Earlier, given_by, learnable, logits_of
from supple.training.step import Pass

__all__ = ["AlphaDistillation", "adaptive_divergence", "alpha_divergence", "mean_of"]

_NEAR = 1e-3  # nearer to 0 or 1 than this, the limit is taken


def alpha_divergence(
    student: Tensor,
    teacher: Tensor,
    alpha: float,
    *,
    limit: float = math.inf,
    dim: int = -1,
) -> Tensor:
    r"""Divergence of a student's distribution from a teacher's, for each example.

    $D_\alpha(p \,\|\, q) = \frac{1}{\alpha (\alpha - 1)} \sum_c q_c
    \left[(p_c / q_c)^\alpha - 1\right]$ of the teacher's $p$ and the student's $q$; in the
    limit $\alpha = 1$ it is the KL divergence $\text{KL}(p \,\|\, q)$ and for $\alpha = 0$
    $\text{KL}(q \,\|\, p)$. A large $\alpha$ punishes a student that misses classes of the
    teacher, a negative one a student that believes in classes that the teacher excludes.

    The powers are bounded by `limit`, in the value and in the gradient (as factors that don't
    depend on the weights, $-\sum_c (p_c / q_c)^\alpha / \alpha \cdot \nabla q_c$), as they have
    heavy tails. $\alpha = 1$ has none and is not bounded; for $\alpha = 0$ it is the ratio
    $p_c / q_c$ itself that is.

    Args:
        student: Logits, or logarithms of probabilities, classes along `dim`.
        teacher: The same, of the same shape; no gradient flows to it.
        alpha: $\alpha$.
        limit: The largest power, above 0.
        dim: The dimension of the classes.

    Returns:
        The divergences, of the logits' shape without `dim`, in float32 at least.

    Raises:
        SettingError: The shapes differ, or `limit` is not above 0.

    Example:
        >>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> [round(alpha_divergence(student, teacher, a).item(), 4) for a in (-1.0, 1.0)]
        [0.1667, 0.1308]

    Source:
        Wang et al. 2021, "AlphaNet: Improved Training of Supernets with Alpha-Divergence",
        arXiv:2102.07954; checked against the authors' facebookresearch/AlphaNet.
    """
    if student.shape != teacher.shape:
        raise SettingError(
            "student and teacher must give logits of one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not limit > 0:
        raise SettingError(f"limit must be above 0, got {limit}")
    if student.dtype.itemsize < 4:
        student = student.float()
    log_q = student.log_softmax(dim)
    now = log_q.detach()
    log_ratio = teacher.detach().to(student.dtype).log_softmax(dim) - now
    # Products q (p / q)^alpha are formed by their logarithms: the ratio alone may overflow.
    if abs(alpha) < _NEAR:
        bounded = log_ratio.clamp(max=math.log(limit))
        value = -now.exp() * bounded
        weight = -value
    elif abs(alpha - 1) < _NEAR:
        weight = (now + log_ratio).exp()
        value = weight * log_ratio
    else:
        powered = (now + (alpha * log_ratio).clamp(max=math.log(limit))).exp()
        value = (powered - now.exp()) / (alpha * (alpha - 1))
        weight = powered / alpha
    gradient = -(weight * log_q).sum(dim)  # as dq = q d log q
    return value.sum(dim) + gradient - gradient.detach()


def adaptive_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    alphas: Sequence[float] = (-1.0, 1.0),
    limit: float = 5.0,
    dim: int = -1,
    where: Tensor | None = None,
) -> Tensor:
    r"""The alpha-divergence that is largest, example by example.

    Args:
        student: Logits, or logarithms of probabilities, classes along `dim`.
        teacher: The same, of the same shape.
        alphas: The values of $\alpha$ to choose from, at least one.
        limit: The largest power of $p / q$, above 0.
        dim: The dimension of the classes.
        where: Mask of the logits' shape without `dim`; only where it is true counts.

    Returns:
        A scalar, the mean over everything but the classes.

    Raises:
        SettingError: The shapes differ, or a setting is out of range.
    """
    if not alphas:
        raise SettingError("alphas must be at least one, got none")
    each = [alpha_divergence(student, teacher, a, limit=limit, dim=dim) for a in alphas]
    every = torch.stack(each)
    # By index: at a tie, the gradient is that of one of them, not their mean.
    worst = every.gather(0, every.argmax(0, keepdim=True))[0]
    if where is None:
        return worst.mean()
    return (worst * where).sum() / where.sum().clamp(min=1)


def mean_of(outputs: Sequence[Any], dim: int = -1) -> Tensor:
    """Gives the logarithm of the mean of several models' probabilities.

    Args:
        outputs: What the models gave; at least one.
        dim: The dimension of the classes.

    Returns:
        Logarithms of probabilities, of the logits' shape.
    """
    logs = torch.stack([logits_of(one).log_softmax(dim) for one in outputs])
    return logs.logsumexp(0) - math.log(len(outputs))


@dataclass(frozen=True)
class AlphaDistillation:
    r"""Some roles learn from others by the adaptive alpha-divergence, all others from labels.

    Where several passes (or several roles) teach, the mean of their probabilities does.
    Positions that are labelled -100 don't count.

    Args:
        loss: `loss(output, batch) -> scalar`.
        teacher: The role whose output others learn from; its passes come first in a step.
        taught: The roles that learn so; None for all but the teacher.
        alphas: The values of $\alpha$ to choose the worst from.
        limit: The largest power of $p / q$, above 0.
        labels: Weight of the user's loss beside the divergence, at least 0.
        dim: The dimension of the classes in the logits.
    """

    loss: Loss
    teacher: str = "largest"
    taught: frozenset[str] | None = None
    alphas: tuple[float, ...] = (-1.0, 1.0)
    limit: float = 5.0
    labels: float = 0.0
    dim: int = -1
    teachers: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if not self.alphas:
            raise SettingError("alphas must be at least one, got none")
        if not self.limit > 0 or not self.labels >= 0:
            raise SettingError(
                "limit must be above 0 and labels at least 0, got "
                f"{self.limit} and {self.labels}"
            )
        object.__setattr__(self, "teachers", frozenset({self.teacher}))

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the divergence for the roles taught, and the user's loss for others."""
        if entry.role == self.teacher or (self.taught and entry.role not in self.taught):
            return self.loss(output, batch)
        taught = given_by(self.teacher, entry, earlier)
        student = logits_of(output)
        total = adaptive_divergence(
            student,
            mean_of(taught, self.dim),
            alphas=self.alphas,
            limit=self.limit,
            dim=self.dim,
            where=learnable(batch, student, self.dim),
        )
        if self.labels:
            total = total + self.labels * self.loss(output, batch)
        return total
