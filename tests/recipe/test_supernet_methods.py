"""Recipes that train by each family of supernet methods."""

from __future__ import annotations

import pytest
import yaml

from supple.recipe.load import parse_source, validate
from supple.recipe.run import run_recipe
from tests.recipe.small_recipe import SMALL

#: One of each family, with settings that suit six steps.
FAMILIES = {
    "a delay": {"supernet/deps": {}},
    "phases": {
        "supernet/once-for-all": {"phases": [{"share": 1}, {"share": 1, "enable": ["all"]}]}
    },
    "adaptive draws": {"supernet/pa-da": {}},
    "bands of cost": {"supernet/elasticvit": {}},
    "less sharing": {"supernet/few-shot-nas-gm": {"leaves": 2, "repeats": 1}},
}


def recipe(folder, method):
    content = yaml.safe_load(SMALL)
    plain = {key: value for key, value in content["train"].items() if "/" not in key}
    content |= {"train": method | plain, "output": str(folder)}
    return validate(parse_source(yaml.safe_dump(content)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_trains_by_each_family_and_a_second_run_takes_it_up(tmp_path, family):
    done = run_recipe(recipe(tmp_path, FAMILIES[family]), progress=False)
    [full, half] = done.summary.networks
    assert half.costs["params"] <= 4000 < full.costs["params"]
    assert [outcome.way for outcome in half.outcomes] == ["elastic", "alone", "cut"]
    assert done.summary.watched
    (done.folder / "search" / "done.json").unlink()
    again = run_recipe(recipe(tmp_path, FAMILIES[family]), progress=False)
    assert {name: reused for name, _, reused in again.summary.stages}["train"]
    for one, other in zip(done.summary.networks, again.summary.networks, strict=True):
        assert one.outcomes[0].metrics == other.outcomes[0].metrics
