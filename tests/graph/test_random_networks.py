"""Random networks: whatever is offered is true of `at`, `extract`, files and costs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import supple
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.cost.closed import COSTS
from supple.cost.count import count
from supple.errors import UnsupportedModelError
from supple.network import Elastic, elastic
from tests.graph import grammar
from tests.graph.checks import (
    assert_active_equals_extracted,
    assert_same,
    assert_untouched,
    quietly_extracted,
    run,
    state_of,
)

#: Programs that failed once, with what was wrong.
FAILED_ONCE: dict[str, grammar.Program] = {
    "random weights let the full network overflow": (
        [("product", 8), ("residual", 6), ("residual", 10), ("residual", 6)],
        [
            ("glu", 6),
            ("linear attention", 6),
            ("linear attention", 8),
            ("linear attention", 6),
        ],
        [],
        "flat",
    ),
    "the input of a left-out block was counted twice": (
        [("stage", 8), ("residual", 10)],
        [("encoder", 10)],
        [],
        "mean",
    ),
    "a feature map that is not zero at zero was taken for a wrong coupling": (
        [],
        [("linear attention", 10), ("attention", 8)],
        [],
        "mean",
    ),
}

#: Every word of the grammar by itself, so that none depends on luck.
WORDS = [
    (kind, name, n) for kind, names in grammar.BLOCKS.items() for name in names for n in (8, 10)
]

unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def made_elastic(program: grammar.Program) -> Elastic | None:
    """The program's network with all axes, arbitrary depth; None if nothing can vary."""
    axes = [Width(None, head_dim=True), Heads(None), Depth(pattern="any")]
    try:
        return elastic(grammar.build(program), (grammar.image(1),), axes=axes, verify=False)
    except UnsupportedModelError:
        return None


def assert_costs_are_exact(net: Elastic, config: supple.Config) -> None:
    priced = {name: int(values[0]) for name, values in net.costs(config).items()}
    counted = count(quietly_extracted(net, config), net.args, net.kwargs)
    if any(config.get(s.name) == 1 for s in net.space.sites if s.axis != "depth"):
        # with one unit PyTorch takes other operators: no copies, products as multiplications
        same = ("params", "weight_bytes")
        assert all(priced[name] == counted[name] for name in same), config.to_json()
    else:
        assert {name: priced[name] for name in COSTS} == counted, config.to_json()


def assert_files_give_the_same(net: Elastic, program: grammar.Program) -> None:
    config = net.space.random(7)
    small = quietly_extracted(net, config).eval()
    with tempfile.TemporaryDirectory() as folder:
        net.save(Path(folder, "net"))
        supple.save(small, Path(folder, "small"))
        whole = supple.load(Path(folder, "net"), model=grammar.build(program))
        again = supple.load(Path(folder, "small"), model=grammar.build(program)).eval()
    expected = run(small, net.args, {})
    assert all(map(torch.equal, run(again, net.args, {}), expected))
    assert [s.choices for s in whole.space.sites] == [s.choices for s in net.space.sites]
    with whole.at(config):
        assert_same(run(whole, net.args, {}), expected, "loaded and active")


def check(program: grammar.Program) -> None:
    """Everything that must be true of the elastic network of a program."""
    net = made_elastic(program)
    if net is None:
        return
    before, full = state_of(net.module), run(net, net.args, {})
    report = net.verify(2)
    assert report.ok, str(report)
    for config in (net.space.smallest(), *(net.space.random(seed) for seed in range(3))):
        assert_active_equals_extracted(net, config)
        assert_costs_are_exact(net, config)
    assert_costs_are_exact(net, net.space.largest())
    assert_untouched(net.module, before)
    assert_same(run(net, net.args, {}), full)
    assert_files_give_the_same(net, program)
    generator = torch.Generator().manual_seed(0)
    units = {s.name: s.full for s in net.space.sites if s.axis in ("width", "heads")}
    net.sort({name: torch.rand(full, generator=generator) for name, full in units.items()})
    assert_same(run(net, net.args, {}), full, "reordered")


@given(grammar.programs)
@settings(max_examples=60, derandomize=True, **unhurried)
def test_random_networks_hold_every_promise(program: grammar.Program) -> None:
    check(program)


@pytest.mark.slow
@given(grammar.programs)
@settings(max_examples=300, **unhurried)
def test_300_random_networks_hold_every_promise(program: grammar.Program) -> None:
    check(program)


@pytest.mark.parametrize("name", FAILED_ONCE)
def test_a_network_that_failed_once_holds_every_promise(name: str) -> None:
    check(FAILED_ONCE[name])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "number"), WORDS)
def test_every_word_is_elastic(kind: str, name: str, number: int) -> None:
    words = {"image": [], "sequence": [], "vector": []}
    words[kind] = [(name, number)]
    check((words["image"], words["sequence"], words["vector"], "mean"))
