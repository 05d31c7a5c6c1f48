"""A recipe searches by a latency model from a file, and sets what it said beside what it is."""

from __future__ import annotations

import numpy as np
import pytest

import supple
from supple.cost.latency import fit_measured
from supple.errors import CheckpointError, RecipeError
from supple.recipe.bench import build, gather
from supple.recipe.load import load_recipe
from supple.recipe.run import run_recipe
from supple.report.table import networks_table
from supple.space import Config
from tests.recipe.small_recipe import SMALL, changed


def recipe_in(folder, text=None, **overrides):
    path = folder / "small.yaml"
    path.write_text(text or changed("[params, macs]", '[params, "latency[predicted]"]'))
    words = [f"output={folder / 'runs'}", f"search.latency={folder / 'latency.json'}"]
    return load_recipe(path, [*words, *(f"{key}={value}" for key, value in overrides.items())])


@pytest.fixture
def model(tmp_path):
    """A model of the small recipe's network, from made-up times, in `latency.json`."""
    net = build(gather(recipe_in(tmp_path)), failed={}).net
    rows = net.space.every()
    found = fit_measured(net, rows, 1e-4 + 1e-9 * net.costs(rows)["macs"])
    found.save(tmp_path / "latency.json")
    return found


def test_a_run_searches_by_the_model_and_tells_what_it_said(model, tmp_path) -> None:
    alone = {"compare.alone": "false", "compare.cut": "false"}
    finished = run_recipe(recipe_in(tmp_path, **alone), progress=False)
    full = finished.summary.networks[0]
    largest = model.space.largest()
    assert full.predicted == {"seconds": model.predict(largest)[0], "error": model.error}
    assert full.latency > 0
    front = (finished.folder / "search" / "front.json").read_text()
    assert supple.study.front.Front.from_json(front).errors == {model.name: model.error}
    assert "(predicted " in (finished.folder / "report.html").read_text()
    cells = [str(cell) for column in networks_table(finished.summary).columns
             for cell in column.cells]  # fmt: skip
    assert any("(predicted " in cell and "±" in cell for cell in cells)
    chosen = Config(finished.summary.networks[1].config)
    assert finished.summary.networks[1].predicted["seconds"] == model.predict(chosen)[0]


def test_a_predicted_cost_without_a_model_is_refused_at_its_line(tmp_path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(changed("[params, macs]", '[params, "latency[predicted]"]'))
    with pytest.raises(RecipeError, match=r"line 17.*needs search\.latency"):
        load_recipe(path)


def test_a_model_of_another_network_is_refused(model, tmp_path) -> None:
    from supple.recipe.latency import latency_model

    text = changed("[params, macs]", '[params, "latency[predicted]"]')
    other = recipe_in(tmp_path, text.replace("widths: [8, 12]", "widths: [8, 16]"))
    with pytest.raises(RecipeError, match="model of another network"):
        latency_model(build(gather(other), failed={}))


def test_a_model_that_predicts_another_cost_is_refused(model, tmp_path) -> None:
    from supple.recipe.latency import latency_model

    with pytest.raises(RecipeError, match="no predicted latency"):
        latency_model(build(gather(recipe_in(tmp_path, SMALL)), failed={}))


def test_a_damaged_or_missing_model_is_named(tmp_path) -> None:
    from supple.recipe.latency import latency_model

    bench = build(gather(recipe_in(tmp_path)), failed={})
    with pytest.raises(CheckpointError, match=r"latency\.json"):
        latency_model(bench)


def test_a_profile_in_a_recipe_rounds_its_widths(tmp_path) -> None:
    from supple.cost.profile import DeviceProfile, Divisor

    divisors = {"conv": Divisor("conv", 4)}
    profile = DeviceProfile("a device", "1.0", 1, "", True, {}, divisors)
    profile.save(tmp_path / "device.json")
    text = changed("[0.5, 1.0], divisor: 4", "[0.4, 1.0]").replace("[8, 12]", "[32, 40]")
    plain = build(gather(recipe_in(tmp_path, text)), failed={}).net
    words = {"profile": tmp_path / "device.json"}
    rounded = build(gather(recipe_in(tmp_path, text, **words)), failed={}).net
    smallest = [
        np.min([site.choices[0] for site in net.space.sites]) for net in (plain, rounded)
    ]
    assert smallest == [13, 12]
