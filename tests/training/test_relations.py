"""Attention relations: what they are, how far apart two are, and where a model makes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.training.relations import (
    Attended,
    WithAttended,
    attended,
    relation_loss,
    relations,
)

SOURCE = torch.Generator().manual_seed(0)
NARROW = torch.randn(2, 5, 7, generator=SOURCE)
WIDE = torch.randn(2, 5, 12, generator=SOURCE)


def by_hand(student, teacher, heads, where):
    """The definition, one token at a time."""
    total, count = 0.0, 0
    for n in range(len(student)):
        inside = [t for t in range(student.shape[1]) if where[n][t]]
        for t in inside:
            count += 1
            for h in range(heads):
                p = []
                for x in (student[n], teacher[n]):
                    d = x.shape[1] // heads
                    part = x[:, h * d : (h + 1) * d]
                    scores = torch.stack([part[t] @ part[u] for u in inside]) / d**0.5
                    p.append(scores.softmax(0))
                total += float((p[1] * (p[1] / p[0]).log()).sum()) / heads
    return total / count


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_divergence_over_tokens_and_heads(padded):
    where = torch.ones(2, 5, dtype=torch.long)
    if padded:
        where[0, 3:] = 0
    found = relation_loss(NARROW, WIDE, 3, where if padded else None)
    assert found.item() == pytest.approx(by_hand(NARROW, WIDE, 3, where), rel=1e-4)


def test_heads_split_the_features_and_leave_the_rest():
    found = relations(NARROW, 2)
    assert found.shape == (2, 2, 5, 5)
    torch.testing.assert_close(
        found[1, 1], NARROW[1, :, 3:6] @ NARROW[1, :, 3:6].T / 3**0.5, rtol=1e-5, atol=1e-6
    )


def test_gradients_reach_the_student_only():
    ours, theirs = NARROW.clone().requires_grad_(), WIDE.clone().requires_grad_()
    relation_loss(ours, theirs, 3).backward()
    assert theirs.grad is None
    assert ours.grad[..., :6].any()
    assert not ours.grad[..., 6].any()  # left over


def test_fewer_features_than_heads_are_an_error():
    with pytest.raises(SettingError, match="fewer heads"):
        relations(NARROW, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        names = ("query", "q_norm", "key", "value", "out")
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.LayerNorm(4) if "norm" in n else nn.Linear(4, 4) for n in names}
            )
            for _ in range(2)
        )
        self.depth = 2

    def forward(self, x):
        for layer in self.layers[: self.depth]:
            x = layer["out"](layer["query"](x) + layer["key"](x) + layer["value"](x))
        return x


def test_layers_are_found_by_name_or_by_pattern():
    model = Model()
    expected = [
        Attended(*(f"layers.{i}.{n}" for n in ("query", "key", "value"))) for i in (0, 1)
    ]
    assert attended(model) == expected
    assert attended(model, ("*.query", "*.key", "*.value")) == expected
    swapped = attended(model, ("*.key", "*.query", "*.value"))
    assert swapped[0].queries == "layers.0.key"


def test_what_can_not_be_found_is_an_error():
    with pytest.raises(SettingError, match="name them by patterns"):
        attended(nn.Linear(2, 2))
    with pytest.raises(SettingError, match="equally many"):
        attended(Model(), ("*.query", "layers.0.key", "*.value"))


@pytest.mark.parametrize("depth", [1, 2])
def test_features_are_those_of_the_last_layer_that_ran(depth):
    model = Model()
    model.depth = depth
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    seen = WithAttended(attended(model))(model, x)
    inside = x if depth == 1 else Model.forward(_cut(model), x)
    for kind, name in (("queries", "query"), ("keys", "key"), ("values", "value")):
        torch.testing.assert_close(seen.features[kind], model.layers[depth - 1][name](inside))
    assert torch.equal(seen.output, model(x))


def _cut(model):
    shorter = Model()
    shorter.load_state_dict(model.state_dict())
    shorter.depth = 1
    return shorter


def test_no_layer_that_ran_is_an_error():
    model = Model()
    model.depth = 0
    with pytest.raises(SettingError, match="ran at this size"):
        WithAttended(attended(model))(model, torch.ones(1, 2, 4))
