"""Alpha-divergences against their formula, finite differences and their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supple.errors import SettingError
from supple.training.divergence import (
    AlphaDistillation,
    adaptive_divergence,
    alpha_divergence,
    mean_of,
)
from supple.training.losses import Labels
from supple.training.step import Pass

ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def formula(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The definition, by plain probabilities, with gradients through everything."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if alpha == 1:
        return (p * (p / q).log()).sum(-1)
    if alpha == 0:
        return (q * (q / p).log()).sum(-1)
    return (q * ((p / q) ** alpha - 1)).sum(-1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_value_and_the_gradient_are_the_formulas(alpha):
    student, teacher = random(5, 7).requires_grad_(), random(7, 5).T
    ours, plain = alpha_divergence(student, teacher, alpha), formula(student, teacher, alpha)
    torch.testing.assert_close(ours, plain)
    (a,) = torch.autograd.grad(ours.sum(), student)
    (b,) = torch.autograd.grad(plain.sum(), student)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_that_of_finite_differences(alpha):
    student, teacher = random(2, 3).requires_grad_(), random(3, 2).T
    assert torch.autograd.gradcheck(lambda z: alpha_divergence(z, teacher, alpha), student)


@pytest.mark.parametrize("alpha", [-1.0, 2.0])
def test_powers_are_bounded_in_the_value_and_in_the_gradient(alpha):
    student = torch.tensor([0.9, 0.05, 0.05]).double().log().requires_grad_()
    teacher = torch.tensor([0.05, 0.9, 0.05]).double()
    q, p = student.exp(), teacher
    power = torch.tensor([1.5, (0.9 / 0.05) ** alpha, 1.0]).double().clamp(max=1.5)
    if alpha > 0:
        power = torch.tensor([(0.05 / 0.9) ** alpha, 1.5, 1.0]).double()
    ours = alpha_divergence(student, p.log(), alpha, limit=1.5)
    torch.testing.assert_close(ours, (q * (power - 1)).sum() / (alpha * (alpha - 1)))
    (found,) = torch.autograd.grad(ours, student)
    slope = power / alpha
    expected = -(q * (slope - (q * slope).sum())).detach()  # through the softmax
    torch.testing.assert_close(found, expected)


def test_certain_distributions_give_finite_numbers():
    student = torch.tensor([[200.0, 0.0, 0.0]]).requires_grad_()
    teacher = torch.tensor([[0.0, 200.0, -200.0]])
    loss = adaptive_divergence(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0, 0] > 0  # it is told to leave what the teacher excludes


def test_the_worse_side_counts_for_each_example():
    peaked, flat = torch.tensor([4.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    student = torch.stack([flat, peaked]).double().requires_grad_()
    teacher = torch.stack([peaked, flat]).double()
    sides = [formula(student, teacher, alpha) for alpha in (-1.0, 1.0)]
    assert sides[0][0] > sides[1][0]
    assert sides[1][1] > sides[0][1]
    ours = adaptive_divergence(student, teacher, limit=1e9)
    plain = (sides[0][0] + sides[1][1]) / 2
    torch.testing.assert_close(ours, plain)
    (a,) = torch.autograd.grad(ours, student)
    (b,) = torch.autograd.grad(plain, student)
    torch.testing.assert_close(a, b)


def test_no_gradient_flows_to_the_teacher_and_only_marked_positions_count():
    student, teacher = random(2, 3, 5).requires_grad_(), random(5, 3, 2).permute(2, 1, 0)
    teacher = teacher.requires_grad_()
    where = torch.tensor([[True, False, True], [False, False, True]])
    ours = adaptive_divergence(student, teacher, where=where)
    ours.backward()
    assert teacher.grad is None
    torch.testing.assert_close(ours, adaptive_divergence(student[where], teacher[where]))


def test_the_mean_is_that_of_probabilities():
    a, b = random(3, 4), random(4, 3).T
    expected = (a.softmax(-1) + b.softmax(-1)) / 2
    torch.testing.assert_close(mean_of([a, {"logits": b}]).exp(), expected)


def loss(output, batch):
    return output.square().mean()


def test_the_criterion_teaches_the_roles_it_names():
    criterion = AlphaDistillation(loss, "random", frozenset({"smallest"}), labels=0.5)
    output, seen = random(2, 3), [random(3, 2).T, random(2, 3) + random(3, 2).T]
    assert criterion.teachers == {"random"}
    for role in ("random", "other"):
        found = criterion(Pass(None, role), output, None, {})
        assert found == Labels(loss)(Pass(None, role), output, None, {})
    found = criterion(Pass(None, "smallest"), output, None, {"random": seen})
    expected = adaptive_divergence(output, mean_of(seen)) + 0.5 * loss(output, None)
    torch.testing.assert_close(found, expected)
    with pytest.raises(SettingError, match="must give it first"):
        criterion(Pass(None, "smallest"), output, None, {})


@pytest.mark.parametrize("settings", [{"alphas": ()}, {"limit": 0.0}, {"labels": -1.0}])
def test_settings_are_checked(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        AlphaDistillation(loss, **settings)


def test_shapes_that_differ_are_refused():
    with pytest.raises(SettingError, match=r"\(2, 3\) and \(2, 5\)"):
        alpha_divergence(random(2, 3), random(2, 5), 1.0)
