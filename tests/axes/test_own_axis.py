"""Axes that are written outside the core, as a user would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from supple.axes.base import Axis, Patch
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.graph.couple import Graph
from supple.network import Elastic, elastic
from supple.space import Site
from tests.graph.checks import (
    assert_active_equals_extracted,
    assert_same,
    assert_untouched,
    run,
    shake,
    state_of,
)

SUPPLE = Path(elastic.__code__.co_filename).parent


@dataclass(frozen=True)
class OperatorSite(Site):
    path: str = field(default="", compare=False)


@dataclass(frozen=True)
class Operator(Axis):
    """Which activation stands at every place that `places` names: 2 is the model's own."""

    places: tuple[str, ...]
    name: ClassVar[str] = "operator"

    def sites(self, graph: Graph) -> Sequence[Site]:
        return [
            OperatorSite(f"{path}.operator", self.name, (0, 1, 2), 2, path=path)
            for path in self.places
        ]

    def patch(self, site: Site, choice: int) -> Patch:
        assert isinstance(site, OperatorSite)
        if choice == site.full:
            return Patch()
        return Patch(modules={site.path: nn.Tanh() if choice else nn.Identity()})

    def paths(self, site: Site) -> tuple[str, ...]:
        assert isinstance(site, OperatorSite)
        return (site.path,)


class Rounded(torch.autograd.Function):
    """Rounds to `bits` bits; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, bits: int) -> Tensor:
        scale = weight.abs().max() / (2 ** (bits - 1) - 1)
        return (weight / scale).round() * scale

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class BitsSite(Site):
    parameter: str = field(default="", compare=False)


@dataclass(frozen=True)
class Bits(Axis):
    """How many bits the weight matrices have."""

    choices: tuple[int, ...] = (2, 4)
    name: ClassVar[str] = "bits"

    def sites(self, graph: Graph) -> Sequence[Site]:
        return [
            BitsSite(f"{name}.bits", self.name, (*self.choices, 32), 32, parameter=name)
            for name, parameter in graph.model.named_parameters()
            if parameter.dim() == 2
        ]

    def patch(self, site: Site, choice: int) -> Patch:
        assert isinstance(site, BitsSite)
        if choice == site.full:
            return Patch()
        return Patch(tensors={site.parameter: lambda weight: Rounded.apply(weight, choice)})

    def paths(self, site: Site) -> tuple[str, ...]:
        assert isinstance(site, BitsSite)
        return (site.parameter.rpartition(".")[0],)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ACTIVATIONS = tuple(f"blocks.{i}.activation" for i in range(3))


def net(*axes: Axis) -> Elastic:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    return elastic(shake(Model()), inputs, axes=axes, verify=False)


def test_an_operator_axis_chooses_what_runs() -> None:
    found = net(Operator(ACTIVATIONS))
    assert [site.name for site in found.space.sites] == [f"{p}.operator" for p in ACTIVATIONS]
    assert found.space.size() == 27
    reference = Model()
    reference.load_state_dict(found.module.state_dict())
    reference.blocks[0].activation = nn.Tanh()
    reference.blocks[2].activation = nn.Identity()
    config = {"blocks.0.activation.operator": 1, "blocks.2.activation.operator": 0}
    before = state_of(found.module)
    with found.at(config):
        assert_same(run(found, found.args, {}), run(reference, found.args, {}))
    assert_untouched(found.module, before)
    assert isinstance(found.extract(config).blocks[0].activation, nn.Tanh)
    assert_active_equals_extracted(found, config)


def test_a_bits_axis_rounds_what_is_used_and_keeps_the_owner() -> None:
    found = net(Bits())
    owner = found.module.head.weight
    kept = owner.detach().clone()
    with found.at({"head.weight.bits": 2}):
        assert len(found.module.head.weight.unique()) <= 3
        assert dict(found.module.named_parameters())["head.weight"] is owner
        found(*found.args).square().sum().backward()
    assert torch.equal(owner, kept)
    assert owner.grad is not None
    assert owner.grad.abs().min() > 0
    assert len(found.extract({"head.weight.bits": 4}).head.weight.unique()) <= 15
    assert_active_equals_extracted(found, {"head.weight.bits": 2, "stem.weight.bits": 4})


def test_own_axes_combine_with_width_and_depth() -> None:
    found = net(Width((0.5,)), Depth(), Operator(ACTIVATIONS), Bits())
    assert {site.axis for site in found.space.sites} == {"width", "depth", "operator", "bits"}
    for seed in range(6):
        assert_active_equals_extracted(found, found.space.random(seed))
    assert_active_equals_extracted(found, found.space.smallest())


def test_the_rounding_follows_the_slice() -> None:
    """Two bits of a sliced weight are the two bits of what is left of it."""
    found = net(Width((0.5,)), Bits())
    weight = found.module.head.weight.detach()
    with found.at({"stem": 6, "head.weight.bits": 2}):
        active = found.module.head.weight.detach().clone()
    torch.testing.assert_close(active, Rounded.apply(weight[:, :6], 2))


def test_sites_of_own_axes_vanish_with_their_block() -> None:
    found = net(Depth(), Operator(ACTIVATIONS), Bits())
    config = found.space.config({"blocks.depth": 1})
    assert "blocks.0.activation.operator" in config
    assert "blocks.1.activation.operator" not in config
    assert "blocks.2.up.weight.bits" not in config
    assert "head.weight.bits" in config
    per_block = 3 * 3 * 3  # its activation and the bits of two matrices
    assert found.space.size() == 9 * sum(per_block**kept for kept in (1, 2, 3))


def test_encoding_and_mutation_know_own_sites() -> None:
    found = net(Operator(ACTIVATIONS), Bits())
    config = found.space.random(4)
    assert found.space.decode(found.space.encode(config)) == config
    for neighbour in found.space.neighbours(config)[:20]:
        assert found.space.contains(neighbour)


def test_an_operator_axis_works_inside_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    found = elastic(shake(model), torch.randn(4, 5), axes=[Operator(("1",))], verify=False)
    assert_active_equals_extracted(found, {"1.operator": 1})


@pytest.mark.skipif(
    not (SUPPLE / "graph" / "verify.py").exists(), reason="verification has not landed"
)
def test_verification_passes_for_own_axes() -> None:
    inputs = torch.randn(4, 5)
    axes = [Width((0.5,)), Operator(ACTIVATIONS), Bits()]
    found = elastic(shake(Model()), inputs, axes=axes)
    assert {site.axis for site in found.space.sites} == {"width", "operator", "bits"}
    report = found.verify(2)
    assert report.ok, str(report)


@pytest.mark.skipif(
    not (SUPPLE / "cost" / "closed.py").exists(), reason="closed-form costs have not landed"
)
def test_costs_of_own_axes_are_those_of_the_extracted_network() -> None:
    found = net(Width((0.5,)), Depth(), Operator(ACTIVATIONS))
    configs = [found.space.random(seed) for seed in range(5)]
    params = found.costs(configs)["params"]
    counted = [sum(p.numel() for p in found.extract(c).parameters()) for c in configs]
    assert params.tolist() == counted


def test_the_toy_rounding_rounds() -> None:
    weight = torch.linspace(-1, 1, 7)
    torch.testing.assert_close(Rounded.apply(weight, 16), weight, atol=1e-4, rtol=0)
    assert Rounded.apply(weight, 2).unique().tolist() == [-1.0, 0.0, 1.0]
