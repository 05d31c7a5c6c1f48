"""Verification holds on real families, and catches an index plan that is wrong by one unit."""

import copy

import pytest
import torch
from torch import nn

import supple
from supple.graph.dims import ONE, Atom, Product, Sum, find, split
from supple.graph.verify import drop_failing_sites
from supple.network import Elastic, elastic
from tests.zoo import ZOO

FAMILIES = [
    "bert",
    "gpt2",
    "llama",
    "vit",
    "convnext",
    "resnet_basic",
    "mobilenet_v2",
    "t5",
    "densenet",
    "squeeze_excite",
    "transformer_encoder",
    "resnet_option_a",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_a_family_is_verified(family: str) -> None:
    model, args, kwargs = ZOO[family]()
    net = elastic(model, args, kwargs)
    report = net.verify(n=2)
    assert report.ok, str(report)
    assert report.checks.keys() >= {"active and extracted", "full and permuted"}
    assert not [f for f in net.space.fixed if "verification failed" in f.reason]


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("bert", {"width", "heads", "depth"}),
        ("gpt2", {"width", "heads", "depth"}),
        ("llama", {"width", "heads", "depth"}),
        ("vit", {"width", "heads", "depth"}),
        ("t5", {"width", "heads", "depth"}),
        ("convnext", {"width", "depth"}),
        ("resnet_basic", {"width", "depth"}),
        ("mobilenet_v2", {"width", "depth"}),
        ("transformer_encoder", {"width", "depth"}),
        ("resnet_option_a", {"width", "depth"}),
        ("densenet", {"width"}),
    ],
)
def test_a_family_has_the_axes_that_an_expert_expects(family: str, axes: set[str]) -> None:
    model, args, kwargs = ZOO[family]()
    net = elastic(model, args, kwargs, verify=False)
    assert {site.axis for site in net.space.sites} == axes


def gpt2_like() -> tuple[Elastic, str]:
    model, args, kwargs = ZOO["bert"]()
    net = elastic(model, args, kwargs, axes=[supple.Heads()], verify=False)
    return net, "bert.encoder.layer.0.attention.self.query.weight"


def test_a_plan_that_is_off_by_one_head_is_caught() -> None:
    net, name = gpt2_like()
    assert net.verify(n=1).ok
    rows, columns = net.graph.tensors[name]
    heads = find(rows)
    assert isinstance(heads, Product)
    outer, inner = heads.factors
    site = next(s for s in net.space.sites if s.name.startswith("bert.encoder.layer.0"))
    assert find(outer) in site.group.atoms
    # the query's rows are taken to begin with the second head: the last one wraps around
    wrong = _rotated(outer, inner)
    net.graph.tensors[name] = [wrong, columns]
    net._plans.clear()
    assert not net.verify(n=1).ok
    drop_failing_sites(net)
    reasons = {f.name: f.reason for f in net.space.fixed}
    assert "verification failed" in reasons[site.name]
    assert all(s.name != site.name for s in net.space.sites)


class _Rotated(Product):
    """A product whose outer positions are counted from the second one on."""


def _rotated(outer: object, inner: object) -> Product:
    return _Rotated((outer, inner))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `positions` treat a rotated product as the fault that it stands for."""
    import numpy as np

    from supple import plan
    from supple.graph import dims, order, verify

    true = dims.positions

    def positions(dim: object, chosen: object) -> np.ndarray:
        found = true(dim, chosen)  # type: ignore[arg-type]
        if isinstance(dim, _Rotated):
            row = dim.factors[1].size
            return (found + row) % dim.size
        return found

    for module in (plan, order, verify):
        monkeypatch.setattr(module, "positions", positions)


def test_a_missed_bias_is_caught() -> None:
    net, _ = gpt2_like()
    name = "bert.encoder.layer.0.attention.self.value.bias"
    net.graph.tensors[name] = [Atom(net.graph.tensors[name][0].size)]
    net._plans.clear()
    report = net.verify(n=1)
    assert not report.ok


def test_a_bias_that_broadcasts_wrongly_is_caught_without_a_crash() -> None:
    """A gain of one channel fits every width, so only the values can give it away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    net = elastic(model, (torch.randn(4, 5),), verify=False)
    first, second = split(Atom(8), 4)
    net.graph.tensors["2.weight"][1] = Sum((second, first))
    assert ONE.size == 1
    group = net.space.sites[0].group
    object.__setattr__(group, "atoms", (*group.atoms, find(second)))
    assert not net.verify(n=1).ok


def test_verification_leaves_the_model_as_it_was() -> None:
    model, args, kwargs = ZOO["squeeze_excite"]()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    elastic(model, args, kwargs).verify(n=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
