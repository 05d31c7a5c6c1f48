"""Linear attention against all pairs, formed one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.cost import count
from supple.errors import SettingError
from supple.layers.attention import CosformerAttention, LinearAttention, SoftmaxAttention
from supple.layers.choice import Choice

HEADS, LENGTH = 3, 17


def drawn(tokens, others, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 15), (2, others, 15), (2, others, 21)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_pairs(query, key, value, similarity, causal):
    """Gives every output as a sum over keys, head by head."""
    rows = []
    for q, k, v in zip(query.split(5, -1), key.split(5, -1), value.split(7, -1), strict=True):
        weights = similarity(q, k)
        if causal:
            weights = weights.tril()
        rows.append(weights / weights.sum(-1, keepdim=True).clamp_min(1e-6) @ v)
    return torch.cat(rows, dim=-1)


def cosine(q, k):
    apart = (torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])).double()
    return F.relu(q) @ F.relu(k).mT * torch.cos(math.pi / 2 * apart / LENGTH)


def elu(q, k):
    return (F.elu(q) + 1) @ (F.elu(k) + 1).mT


def softmax(q, k):
    return (q @ k.mT / math.sqrt(5)).exp()


KINDS = [
    (lambda **settings: CosformerAttention(HEADS, length=LENGTH, **settings), cosine),
    (lambda **settings: LinearAttention(HEADS, **settings), elu),
]


@pytest.mark.parametrize(("make", "similarity"), KINDS)
@pytest.mark.parametrize(("tokens", "chunk"), [(11, 4), (11, 1), (12, 4), (5, 32), (17, 16)])
def test_causal_chunks_give_the_sums_over_all_pairs(make, similarity, tokens, chunk):
    inputs = drawn(tokens, tokens)
    given = make(causal=True, chunk=chunk)(*inputs)
    torch.testing.assert_close(given, by_pairs(*inputs, similarity, True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("make", "similarity"), KINDS)
@pytest.mark.parametrize(("tokens", "others"), [(11, 11), (7, 13), (13, 7)])
def test_sums_over_all_keys_are_the_sums_over_all_pairs(make, similarity, tokens, others):
    inputs = drawn(tokens, others)
    given = make()(*inputs)
    torch.testing.assert_close(
        given, by_pairs(*inputs, similarity, False), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_attention_is_the_quadratic_formula(causal):
    inputs = drawn(11, 11)
    given = SoftmaxAttention(HEADS, causal=causal)(*inputs)
    torch.testing.assert_close(given, by_pairs(*inputs, softmax, causal))


def test_cosformer_is_within_1e_5_of_all_pairs_in_single_precision():
    inputs = drawn(17, 17, torch.float32)
    for causal in (False, True):
        given = CosformerAttention(HEADS, length=LENGTH, causal=causal)(*inputs)
        expected = by_pairs(*(x.double() for x in inputs), cosine, causal)
        torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_comes_later_does_not_change_what_came_before():
    inputs = drawn(17, 17)
    layer = CosformerAttention(HEADS, length=LENGTH, causal=True, chunk=4)
    first = layer(*(x[:, :9] for x in inputs))
    torch.testing.assert_close(layer(*inputs)[:, :9], first)


def test_a_query_that_is_alike_to_no_key_gives_zeros_and_finite_gradients():
    query = torch.full((1, 3, 2), -1.0, requires_grad=True)
    value = torch.ones(1, 3, 2, requires_grad=True)
    given = CosformerAttention(1, length=3, causal=True)(query, torch.ones(1, 3, 2), value)
    torch.testing.assert_close(given, torch.zeros(1, 3, 2))
    for gradient in torch.autograd.grad(given.sum(), [query, value]):
        assert gradient.isfinite().all()


def test_linear_attention_costs_less_where_the_context_is_long():
    def macs(layer, tokens):
        x = torch.zeros(1, tokens, 32)
        return count.macs(layer, (x, x, x))

    linear = CosformerAttention(2, length=256, causal=True, chunk=16)
    assert macs(linear, 256) < macs(SoftmaxAttention(2, causal=True), 256) / 2
    assert macs(linear, 256) == 2 * macs(linear, 128)
    assert macs(linear, 16) > macs(SoftmaxAttention(2, causal=True), 16)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.attention = Choice(
            CosformerAttention(3, length=5, causal=True, chunk=2),
            SoftmaxAttention(3, causal=True),
        )
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.out(self.attention(self.query(x), self.key(x), self.value(x)))


def test_kinds_of_attention_are_choices_that_share_projections():
    model = nn.Sequential(Layer(), Layer())
    net = supple.elastic(
        model, torch.randn(2, 5, 6), axes=[supple.Operator(), supple.Heads()], verify=False
    )
    assert {site.axis for site in net.space.sites} == {"operator", "heads"}
    x = torch.randn(2, 5, 6)
    for row in net.space.every():
        config = net.space.decode(row)
        alone = net.extract(config)
        kinds = (CosformerAttention, SoftmaxAttention)
        assert type(alone[0].attention) is kinds[config["0.attention"]]
        with torch.no_grad(), net.at(config):
            torch.testing.assert_close(model(x), alone(x))
        priced = net.costs([config])
        assert priced["macs"][0] == count.macs(alone, (x,))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SoftmaxAttention(0), "num_heads"),
        (lambda: LinearAttention(1, chunk=0), "chunk"),
        (lambda: CosformerAttention(1, length=0), "length"),
        (lambda: CosformerAttention(3, length=4)(*drawn(5, 5)), "5 tokens"),
        (lambda: LinearAttention(3, causal=True)(*drawn(5, 7)), "as many keys"),
    ],
)
def test_settings_and_inputs_are_checked(make, named):
    with pytest.raises(SettingError, match=named):
        make()
