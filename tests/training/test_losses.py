"""Distillation losses against references, and logits wherever a model puts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from supple.errors import SettingError
from supple.training.losses import (
    Distillation,
    angular_margin,
    learnable,
    logits_of,
    soft_cross_entropy,
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_hard_targets_give_the_ordinary_cross_entropy():
    student, labels = random(5, 7), torch.tensor([0, 3, 6, 2, 2])
    teacher = F.one_hot(labels, 7) * 1000.0
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher), F.cross_entropy(student, labels)
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_its_gradient_is_that_of_the_kl_divergence(temperature):
    student, teacher = random(5, 7).requires_grad_(), random(7, 5).T
    ours = soft_cross_entropy(student, teacher, temperature=temperature)
    (a,) = torch.autograd.grad(ours, student)
    kl = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).softmax(-1),
        reduction="batchmean",
    )
    (b,) = torch.autograd.grad(kl * temperature**2, student)
    torch.testing.assert_close(a, b)


def test_no_gradient_flows_to_the_teacher():
    student, teacher = random(2, 3).requires_grad_(), random(3, 2).T.requires_grad_()
    soft_cross_entropy(student, teacher).backward()
    assert teacher.grad is None


def test_classes_may_lie_along_any_dimension():
    student, teacher = random(2, 5, 3, 7), random(7, 2, 5, 3).permute(1, 2, 3, 0)
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, dim=1),
        soft_cross_entropy(student.movedim(1, -1), teacher.movedim(1, -1)),
    )


def test_half_precision_is_computed_in_float32():
    student = random(5, 7)
    ours = soft_cross_entropy(student.bfloat16(), student.bfloat16())
    exact = soft_cross_entropy(student.bfloat16().float(), student.bfloat16().float())
    assert ours.dtype == torch.float32
    assert torch.equal(ours, exact)


def test_shapes_that_differ_are_refused():
    with pytest.raises(SettingError, match=r"\(2, 3\) and \(2, 5\)"):
        soft_cross_entropy(random(2, 3), random(2, 5))


@pytest.mark.parametrize("wrap", ["mapping", "tuple"])
def test_positions_labelled_minus_100_do_not_count(wrap):
    student, teacher = random(2, 5, 7), random(7, 5, 2).permute(2, 1, 0)
    labels = torch.ones(2, 5, dtype=torch.long)
    labels[1, 2:] = -100
    batch = {"labels": labels} if wrap == "mapping" else (None, labels)
    where = learnable(batch, student)
    assert where is not None
    counted = torch.cat([(student[0]), student[1, :2]]), torch.cat([teacher[0], teacher[1, :2]])
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, where=where), soft_cross_entropy(*counted)
    )


@pytest.mark.parametrize(
    "batch",
    [(None, torch.ones(2, 5)), {"x": torch.ones(2)}, (None, torch.ones(3).long()), None],
)
def test_other_labels_mask_nothing(batch):
    assert learnable(batch, random(2, 5, 7)) is None


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: {"logits": z},
        lambda z: Output(z),
        lambda z: (z, None),
        lambda z: [z],
    ],
)
def test_logits_are_found_in_what_models_return(wrap):
    z = random(2, 3)
    assert logits_of(wrap(z)) is z


@pytest.mark.parametrize("output", [None, {}, {"hidden": torch.ones(1)}, (), "text"])
def test_outputs_without_logits_are_refused(output):
    with pytest.raises(SettingError, match="can't find logits"):
        logits_of(output)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"labels": -0.1}])
def test_settings_are_checked(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        Distillation(lambda output, batch: output, **settings)


def test_the_right_class_must_be_nearer_by_an_angle():
    angles = torch.tensor([[0.5, 1.0, 2.0], [1.2, 3.1, 0.3]])
    moved = torch.tensor([[0.7, 1.0, 2.0], [1.2, 3.1, 0.5]])
    expected = F.cross_entropy(7 * moved.cos(), torch.tensor([0, 2]))
    labels = torch.tensor([0, 2])
    torch.testing.assert_close(
        angular_margin(angles.cos(), labels, margin=0.2, scale=7.0), expected
    )


def test_at_the_opposite_side_the_margin_still_pushes():
    angles = torch.tensor([[2.8, 0.1], [3.1, 0.1]], requires_grad=True)
    labels = torch.tensor([0, 0])
    losses = [
        angular_margin(angles[i : i + 1].cos(), labels[:1], margin=0.5).item() for i in (0, 1)
    ]
    assert losses[1] > losses[0]
    expected = F.cross_entropy(
        30 * torch.tensor([[math.cos(3.1) - 0.5 * math.sin(0.5), math.cos(0.1)]]), labels[:1]
    )
    torch.testing.assert_close(torch.tensor(losses[1]), expected)
    exact = torch.ones(1, 2, requires_grad=True)
    angular_margin(exact, labels[:1]).backward()
    assert exact.grad is not None
    assert exact.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{"margin": -0.1}, {"scale": 0.0}])
def test_settings_of_the_margin_are_checked(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        angular_margin(torch.zeros(1, 2), torch.tensor([0]), **settings)
