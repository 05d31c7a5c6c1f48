"""What a sub-network is asked to learn in a pass: labels, or a teacher's output.

A *criterion* is called once per pass, as `criterion(entry, output, batch, earlier)`, where
`earlier` holds the detached outputs of the passes (and teachers) that came before it on the
same part of the batch, by role. It names the roles it wants to see in `teachers`, so that no
other output is kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from supple.errors import SettingError
from supple.training.batches import Loss

if TYPE_CHECKING:
    from supple.training.step import Pass

__all__ = [
    "Criterion",
    "Distillation",
    "Earlier",
    "Labels",
    "angular_margin",
    "given_by",
    "learnable",
    "logits_of",
    "soft_cross_entropy",
]

Earlier = Mapping[str, Sequence[Any]]
_IGNORED = -100


class Criterion(Protocol):
    """The loss of a pass, by its role."""

    @property
    def teachers(self) -> frozenset[str]:
        """The roles whose outputs later passes of a step look at."""

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the scalar to minimise."""


@dataclass(frozen=True)
class Labels:
    """Every pass minimises the user's loss.

    Args:
        loss: `loss(output, batch) -> scalar`.
    """

    loss: Loss
    teachers: frozenset[str] = frozenset()

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the user's loss, whatever the role."""
        return self.loss(output, batch)


@dataclass(frozen=True)
class Distillation:
    r"""One role learns from labels, and the others from its output on the same batch.

    A student minimises
    $w\,\text{loss} + v\,T^2\,H(\text{softmax}(z_t / T), \text{softmax}(z_s / T))$,
    where $z_t$ are the teacher's detached logits, averaged over its passes where there are
    several, $w$ is `labels` and $v$ is `soft`. Positions that are labelled -100 don't count.

    Args:
        loss: `loss(output, batch) -> scalar`, what the teacher minimises.
        teacher: The role whose output the others learn from; it must come first in a step.
        temperature: $T$, above 0; softens both distributions.
        labels: $w$, at least 0: weight of the user's loss in the students' loss.
        dim: The dimension of the classes in the logits.
        taught: The roles that learn so; None for all but the teacher.
        soft: $v$, at least 0: weight of the teacher's part in the students' loss.
    """

    loss: Loss
    teacher: str = "largest"
    temperature: float = 1.0
    labels: float = 0.0
    dim: int = -1
    taught: frozenset[str] | None = None
    soft: float = 1.0
    teachers: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SettingError(f"temperature must be above 0, got {self.temperature}")
        for name in ("labels", "soft"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be at least 0, got {getattr(self, name)}")
        object.__setattr__(self, "teachers", frozenset({self.teacher}))

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the user's loss for the teacher, and the soft cross-entropy for the others."""
        if entry.role == self.teacher or (self.taught and entry.role not in self.taught):
            return self.loss(output, batch)
        taught = given_by(self.teacher, entry, earlier)
        student = logits_of(output)
        where = learnable(batch, student, self.dim)
        each = [
            soft_cross_entropy(
                student,
                logits_of(seen),
                temperature=self.temperature,
                dim=self.dim,
                where=where,
            )
            for seen in taught
        ]
        total = self.soft * torch.stack(each).mean()
        if self.labels:
            total = total + self.labels * self.loss(output, batch)
        return total


def given_by(teacher: str, entry: Pass, earlier: Earlier) -> Sequence[Any]:
    """Gives the outputs that a pass learns from.

    Args:
        teacher: The role that gave them.
        entry: The pass.
        earlier: Outputs of the passes before it, by role.

    Returns:
        The teacher's outputs, at least one.

    Raises:
        SettingError: The teacher has not run in this step.
    """
    if not earlier.get(teacher):
        raise SettingError(
            f"the pass in role '{entry.role}' learns from role '{teacher}', which has not run "
            "in this step; the sampler must give it first"
        )
    return earlier[teacher]


def logits_of(output: Any) -> Tensor:
    """Finds the logits in what a model returns.

    Args:
        output: A tensor; a mapping or object with `logits`; or a tuple or list, whose first
            item they are.

    Returns:
        The logits, of the shape the model gives them.

    Raises:
        SettingError: There are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else None
    if found is None:
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    raise SettingError(
        f"can't find logits in an output of type {type(output).__name__}; distillation needs a "
        "tensor, an output with .logits, or a tuple that starts with them: have the model or "
        "forward= return one of these"
    )


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    dim: int = -1,
    where: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of a student to a teacher's softened distribution.

    $-T^2 \sum_c \text{softmax}(z_t/T)_c \log \text{softmax}(z_s/T)_c$, averaged over
    everything but the classes. Its gradient equals that of the KL divergence. No gradient
    flows to the teacher.

    Args:
        student: Logits, classes along `dim`.
        teacher: Logits of the same shape.
        temperature: $T$, above 0. The factor $T^2$ keeps gradients of one size across $T$.
        dim: The dimension of the classes.
        where: Mask of the logits' shape without `dim`; only where it is true counts.

    Returns:
        A scalar, computed in float32 at least.

    Raises:
        SettingError: The shapes differ.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> round(soft_cross_entropy(z, z).item(), 4)   # the entropy of a fair coin, ln 2
        0.6931
    """
    if student.shape != teacher.shape:
        raise SettingError(
            "student and teacher must give logits of one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.dtype.itemsize < 4:
        student = student.float()
    target = (teacher.detach().to(student.dtype) / temperature).softmax(dim)
    each = -(target * F.log_softmax(student / temperature, dim)).sum(dim) * temperature**2
    if where is None:
        return each.mean()
    return (each * where).sum() / where.sum().clamp(min=1)


def angular_margin(
    cosines: Tensor, labels: Tensor, *, margin: float = 0.2, scale: float = 30.0
) -> Tensor:
    r"""Cross-entropy of classes by angle, where the right one must be nearer by a margin.

    The logit of class $j$ is $s \cos(\theta_j + m [j = y])$. Where $\theta_y + m$ would exceed
    $\pi$, it is $s (\cos \theta_y - m \sin m)$, which still falls with the angle.

    Args:
        cosines: $\cos \theta$ of embeddings to classes, shape (N, classes).
        labels: $y$, whole numbers, shape (N,).
        margin: $m$ in radians, at least 0.
        scale: $s$, above 0.

    Returns:
        A scalar, averaged over the batch.

    Raises:
        SettingError: The margin is negative, or the scale is not above 0.

    Example:
        >>> import torch
        >>> cosines, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> round(angular_margin(cosines, labels, margin=0.0, scale=1.0).item(), 4)
        0.3133

    Source:
        Deng et al. 2019, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
        arXiv:1801.07698; defaults as in mechanicalsea/sugar.
    """
    if not margin >= 0 or not scale > 0:
        raise SettingError(
            f"margin must be at least 0 and scale above 0, got {margin} and {scale}"
        )
    right = labels[:, None]
    own = cosines.gather(1, right)
    # The clamp keeps the root's gradient finite where an angle is 0.
    sine = (1 - own**2).clamp(min=1e-7).sqrt()
    nearer = own * math.cos(margin) - sine * math.sin(margin)
    pushed = torch.where(
        own > math.cos(math.pi - margin), nearer, own - margin * math.sin(margin)
    )
    return F.cross_entropy(scale * cosines.scatter(1, right, pushed), labels)


def learnable(batch: Any, logits: Tensor, dim: int = -1) -> Tensor | None:
    """Finds where a batch's labels say that a position counts (padding is labelled -100).

    Args:
        batch: A mapping with `labels`, or a tuple whose second item they are.
        logits: The logits; only labels of their shape without `dim` are looked at.
        dim: The dimension of the classes.

    Returns:
        A mask, or None where every position counts.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        labels = batch[1]
    shape = list(logits.shape)
    shape.pop(dim)
    if (
        not isinstance(labels, Tensor)
        or list(labels.shape) != shape
        or labels.is_floating_point()
    ):
        return None
    return labels != _IGNORED
