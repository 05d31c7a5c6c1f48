"""Operators and exits: one option runs, is priced and is extracted; the others are gone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import supple
from supple.axes.exit import Exit
from supple.axes.operator import Operator
from supple.cost.count import count
from supple.errors import SettingError
from supple.layers.choice import Choice, Exits
from supple.network import Elastic, elastic
from tests.graph.checks import assert_active_equals_extracted, run, shake


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def convolution(width: int, kernel: int) -> nn.Module:
    return nn.Conv2d(width, width, kernel, padding=kernel // 2)


def bottleneck(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 1))


def cell(width: int = 8) -> nn.Module:
    """Two places with alternatives; the second within a residual branch."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        Choice(nn.Identity(), bottleneck(width, 6), convolution(width, 3)),
        nn.ReLU(),
        Residual(Choice(convolution(width, 1), convolution(width, 5))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )
    return shake(model).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Elastic:
    return elastic(cell(), (image(),), axes=[Operator(), supple.Width(None)])


class Blocks(nn.Module):
    def __init__(self, width: int = 10, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.Sequential(
            *(
                Residual(
                    nn.Sequential(nn.Linear(width, 5 + i), nn.Tanh(), nn.Linear(5 + i, width))
                )
                for i in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(width)
        early = {2: nn.Linear(width, 3), 4: nn.Sequential(nn.Linear(width, 9), nn.Linear(9, 3))}
        self.classifier = Exits(early, nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.blocks(self.stem(x))))


def vector() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exits() -> Elastic:
    axes = [Exit("classifier"), supple.Width(None)]
    return elastic(shake(Blocks()).eval(), (vector(),), axes=axes)


def test_every_option_runs_where_it_is_chosen(net: Elastic) -> None:
    model = net.module
    for first in (0, 1, 2):
        for second in (0, 1):
            model[1].active, model[3].inner.active = first, second
            expected = run(model, (image(),), {})
            model[1].active, model[3].inner.active = 2, 1
            with net.at({"1": first, "3.inner": second}):
                got = run(net, (image(),), {})
            assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("made", ["net", "exits"])
def test_sizes_are_extracted_and_priced_exactly(
    made: str, request: pytest.FixtureRequest
) -> None:
    net = request.getfixturevalue(made)
    space = net.space
    for config in [space.smallest(), space.largest(), *map(space.random, range(12))]:
        assert_active_equals_extracted(net, config)
        small = net.extract(config)
        assert not any(isinstance(m, Choice) for m in small.modules())
        priced = {name: int(values[0]) for name, values in net.costs(config).items()}
        counted = count(small, net.args, net.kwargs)
        if 1 not in (config.get(s.name) for s in space.sites if s.axis == "width"):
            assert priced == counted, config.to_json()
        assert priced["params"] == counted["params"], config.to_json()


@pytest.mark.parametrize("made", ["net", "exits"])
def test_files_give_the_extracted_network_back(
    made: str, request: pytest.FixtureRequest, tmp_path
) -> None:
    net = request.getfixturevalue(made)
    fresh = {"net": cell, "exits": Blocks}[made]
    for seed in range(4):
        small = net.extract(net.space.random(seed)).eval()
        supple.save(small, tmp_path / str(seed))
        again = supple.load(tmp_path / str(seed), model=fresh()).eval()
        assert torch.equal(run(again, net.args, {})[0], run(small, net.args, {})[0])
    net.save(tmp_path / "net")
    whole = supple.load(tmp_path / "net", model=fresh())
    assert [s.choices for s in whole.space.sites] == [s.choices for s in net.space.sites]


def test_widths_inside_an_option_exist_only_where_it_is_chosen(net: Elastic) -> None:
    inner = net.space.site("1.options.1.0")
    assert inner.inside == (("1", frozenset({1})),)
    assert "1.options.1.0" not in net.space.config({"1": 0})


def test_widths_of_options_follow_the_network_around_them(net: Elastic) -> None:
    with net.at({"0": 3, "1": 2}):
        assert net.module[1].options[2].weight.shape == (3, 3, 3, 3)


def test_every_option_is_trained(net: Elastic) -> None:
    model = net.module
    for choice in (1, 2):
        model.zero_grad()
        with net.at({"1": choice}):
            model(image()).sum().backward()
        got = [o.weight.grad is not None for o in (model[1].options[1][0], model[1].options[2])]
        assert got == [choice == 1, choice == 2]


def test_an_early_exit_leaves_out_the_blocks_behind_it(exits: Elastic) -> None:
    small = exits.extract({"classifier": 2})
    assert len(small.blocks) == 2
    assert small.classifier.weight.shape[0] == 3
    model = exits.module
    x = model.stem(vector())
    expected = model.classifier.options[0](model.norm(model.blocks[1](model.blocks[0](x))))
    torch.testing.assert_close(small(vector()), expected)


def test_sites_of_blocks_behind_an_exit_do_not_exist(exits: Elastic) -> None:
    config = exits.space.config({"classifier": 2})
    assert "blocks.1.inner.0" in config
    assert "blocks.2.inner.0" not in config


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (Exit("norm"), "'norm', which is LayerNorm"),
        (Exit("classifier", stack="nothing"), r"one of \['blocks'\]"),
    ],
)
def test_a_wrong_place_is_named(axis: Exit, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        elastic(Blocks(), (vector(),), axes=[axis])


def test_an_exit_behind_the_last_block_is_refused() -> None:
    with pytest.raises(SettingError, match=r"before the last of the 4 blocks.*got \[4\]"):
        elastic(Blocks(blocks=4), (vector(),), axes=[Exit("classifier")])


@pytest.mark.parametrize("options", [(), (nn.Identity(),)])
def test_a_choice_needs_two_options(options) -> None:
    with pytest.raises(SettingError, match="at least two options"):
        Choice(*options)
