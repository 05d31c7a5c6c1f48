"""Every family of the zoo offers what somebody who knows it expects, and what is offered works.

A family that is slow to analyse or to check is slow here as a whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from supple.files import read_json
from supple.network import Elastic, elastic
from supple.space import Fixed, Site, Space
from supple.storage import load, save
from tests.graph.checks import assert_same, quietly_extracted, run, shake
from tests.guards import ROOT
from tests.zoo import EXPECTED, ZOO, Expected

#: Families that every run checks in full; the others are slow.
MEMBERS = (
    *("bidirectional_gru", "cross_stage_partial", "deeplab", "densenet", "detr"),
    *("diffusion_unet", "dit", "feature_pyramid", "gated_mlp", "graph_attention"),
    *("lstm", "lstm_cells", "mlp_mixer", "mobilenet_v3", "resnet_option_a", "shufflenet"),
    *("space_to_depth", "speaker_tdnn", "super_resolution", "temporal_convolution"),
    *("timm_vit", "unet", "vae", "wavenet", "x3d", "yolo_v8"),
    *("bert", "llama_tied", "mixtral", "swin", "t5"),
)

_NETS: dict[str, Elastic] = {}


def network(name: str) -> Elastic:
    """The elastic family, made once."""
    if name not in _NETS:
        model, args, kwargs = ZOO[name]()
        _NETS[name] = elastic(shake(model), args, kwargs)
    return _NETS[name]


def families(names: Any) -> list[Any]:
    """One case a family, slow unless it is a member."""
    return [n if n in MEMBERS else pytest.param(n, marks=pytest.mark.slow) for n in names]


def test_the_members_are_families() -> None:
    assert set(MEMBERS) <= set(ZOO)
    assert set(EXPECTED) <= set(ZOO)
    assert len(set(MEMBERS) & set(EXPECTED)) >= 25


@pytest.mark.parametrize("name", families(EXPECTED))
def test_the_sites_are_those_that_are_expected(name: str) -> None:
    assert EXPECTED[name].differences(network(name).space) == []


@pytest.mark.parametrize("name", families(ZOO))
def test_random_sizes_pass_verification_and_extract(name: str) -> None:
    net = network(name)
    report = net.verify(2)
    assert report.ok, str(report)
    assert report.checks
    full = run(net, net.args, net.kwargs)
    for config in (net.space.smallest(), net.space.random(0), net.space.random(1)):
        with net.at(config):
            active = run(net, net.args, net.kwargs)
        assert active[0].shape == full[0].shape
        standalone = run(quietly_extracted(net, config), net.args, net.kwargs)
        assert_same(active, standalone, f"active and extracted at {config}")


@pytest.mark.parametrize("name", families(ZOO))
def test_an_extracted_network_comes_back_from_its_folder(name: str, tmp_path: Any) -> None:
    net = network(name)
    small = quietly_extracted(net, net.space.random(2))
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", model=ZOO[name]()[0])
    torch.manual_seed(0)
    before = run(small, net.args, net.kwargs)
    torch.manual_seed(0)
    assert_same(run(again.eval(), net.args, net.kwargs), before, name)


@pytest.mark.slow
def test_the_docs_know_every_family() -> None:
    """`python -m benchmarks.zoo` renews what the page is made of."""
    known = read_json(ROOT / "benchmarks" / "results" / "zoo.json")["families"]
    assert set(known) == set(ZOO)


# --- what expectations say -------------------------------------------------------------------

SPACE = Space(
    (Site("a.0", "width", (1, 2), 2), Site("a.1", "width", (1, 2), 2)),
    (Fixed("a.0[1]", "an input dimension"),),
)


def test_an_expectation_that_holds_differs_in_nothing() -> None:
    assert Expected({"width a.*": 2}, {"*[1]": "input"}).differences(SPACE) == []


@pytest.mark.parametrize(
    ("sites", "fixed", "word"),
    [
        ({"width a.*": 3}, {"*[1]": "input"}, "3 sites are expected"),
        ({"width a.0": 1}, {"*[1]": "input"}, "'width a.1' is matched by nothing"),
        ({"width a.*": 2, "width a.0": 1}, {"*[1]": "input"}, "is matched by"),
        ({"heads a.*": 2}, {"*[1]": "input"}, "2 sites are expected"),
        ({"width a.*": 2}, {}, "is fixed unexpectedly"),
        ({"width a.*": 2}, {"*[1]": "kernel"}, "is fixed unexpectedly"),
        ({"width a.*": 2}, {"*[1]": "input", "*[2]": "input"}, "is not fixed"),
    ],
)
def test_an_expectation_that_does_not_hold_says_so(
    sites: dict[str, int], fixed: dict[str, str], word: str
) -> None:
    assert any(word in line for line in Expected(sites, fixed).differences(SPACE))
