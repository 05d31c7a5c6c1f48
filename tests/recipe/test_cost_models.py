"""What a search measured is computed afterwards, and how far off that is gets told."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from supple.cost import energy
from supple.cost.latency import LatencyModel
from supple.errors import RecipeError
from supple.recipe.bench import build, gather
from supple.recipe.cost_models import cost_models, model_lines
from supple.recipe.load import load_recipe
from supple.recipe.run import run_recipe
from supple.study.front import Front, Point
from supple.study.objectives import Objective
from tests.recipe.small_recipe import changed

COSTS = '["latency[batch=1]", "memory[batch=4]", params]'


def recipe_in(folder, costs=COSTS, **overrides):
    path = folder / "small.yaml"
    path.write_text(changed("[params, macs]", costs))
    alone = {"compare.alone": "false", "compare.cut": "false", **overrides}
    words = [f"output={folder / 'runs'}", *(f"{key}={value}" for key, value in alone.items())]
    return load_recipe(path, words)


def front_of(values):
    points = tuple(Point(config, one) for config, one in values)
    return Front((Objective("loss", False),), points)


def test_a_latency_model_is_learned_from_what_was_measured(tmp_path) -> None:
    bench = build(gather(recipe_in(tmp_path)), failed={})
    rows = bench.net.space.every()[:40]
    costs = bench.net.costs(rows)
    seconds = 1e-4 + 1e-9 * costs["macs"]
    bytes_ = costs["weight_bytes"] + costs["activation_bytes"]
    values = [
        (config, {"loss": 1.0, "latency[batch=1]": float(one), "memory[batch=4]": float(two)})
        for config, one, two in zip(
            bench.net.space.decode_many(rows), seconds, bytes_, strict=True
        )
    ]
    found = cost_models(bench, front_of(values), tmp_path)
    latency, memory = found.values()
    assert latency["samples"] == memory["samples"] == len(rows)
    assert latency["error"] < 0.01
    model = LatencyModel.load(tmp_path / latency["file"])
    assert model.batch == 1
    np.testing.assert_allclose(model.predict(rows), seconds, rtol=0.05)
    # Those bytes are of another batch size than the four that are named.
    assert memory["error"] > 0.01
    assert "weight_bytes + activation_bytes" in model_lines(found)[1]


def test_few_sizes_make_no_latency_model(tmp_path) -> None:
    bench = build(gather(recipe_in(tmp_path)), failed={})
    configs = bench.net.space.decode_many(bench.net.space.every()[:11])
    values = [(config, {"loss": 1.0, "latency[batch=1]": 1e-3}) for config in configs]
    assert cost_models(bench, front_of(values), tmp_path) == {}
    assert not (tmp_path / "latency.json").exists()


def test_a_run_prints_how_far_the_closed_form_is_off(tmp_path) -> None:
    out = io.StringIO()
    recipe = recipe_in(tmp_path, '["memory[batch=4]", params]')
    run_recipe(recipe, console=Console(file=out, width=300), progress=False)
    assert (
        "memory[batch=4] of 4 sizes by weight_bytes + activation_bytes: 0.00 % off"
        in out.getvalue()
    )


def test_a_budget_in_a_cost_that_is_not_searched_is_refused_before_the_training(
    tmp_path,
) -> None:
    with pytest.raises(RecipeError, match="bounds 'params', which is not searched"):
        recipe_in(tmp_path, '["memory[batch=4]"]')


def test_energy_that_cannot_be_measured_is_refused_before_the_training(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(energy, "ROOT", tmp_path / "nothing")
    with pytest.raises(RecipeError, match=r"line 17.*'energy' is not measurable here"):
        recipe_in(tmp_path, "[params, energy]")
