"""Whole runs on small recipes: what is left behind, what resumes, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import supple
from supple.errors import BudgetError, CheckpointError, ExportError
from supple.files import read_json
from supple.recipe.load import apply_overrides, load_recipe, parse_source, validate
from supple.recipe.run import reopen, run_recipe, search_recipe
from supple.report.summary import summary_from_json
from tests.recipe.small_recipe import SMALL

ROOT = Path(__file__).parents[2]
NO_BASELINES = "compare={alone: false, cut: false}"


def small(folder, *overrides):
    source = apply_overrides(parse_source(SMALL), [f"output={folder}", *overrides])
    return validate(source)


def run(folder, *overrides, **options):
    return run_recipe(small(folder, *overrides), progress=False, **options)


def without_baselines(folder, *overrides):
    return run(folder, NO_BASELINES, *overrides)


def seconds_of(folder, stage):
    return read_json(folder / "small" / stage / "done.json")["seconds"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_a_run_leaves_the_report_the_study_and_the_networks(finished):
    for name in ("recipe.yaml", "report.html", "summary.json", "search/study.db"):
        assert (finished.folder / name).is_file()
    for name in ("full", "half"):
        assert list((finished.folder / "deploy" / name / "network").iterdir())
    assert not list(finished.folder.rglob("checkpoint"))
    told = summary_from_json(read_json(finished.folder / "summary.json"))
    assert told == finished.summary


@pytest.mark.slow
def test_every_size_is_compared_with_itself_trained_alone_and_cut(finished):
    full, half = finished.summary.networks
    assert [outcome.way for outcome in full.outcomes] == ["elastic", "alone"]
    assert [outcome.way for outcome in half.outcomes] == ["elastic", "alone", "cut"]
    assert half.costs["params"] <= 4000 < full.costs["params"]
    assert full.outcomes[0].passes == 18
    assert [outcome.passes for outcome in half.outcomes] == [18, 6, 6]
    assert finished.summary.tests == 544


@pytest.mark.slow
def test_the_deployed_network_is_the_one_that_was_evaluated(finished):
    bench, front = reopen(finished.folder)
    half = finished.summary.networks[1]
    config = bench.net.space.config(half.config)
    assert config in {point.config for point in front.evaluated}
    figures = bench.evaluate(config, bench.splits.test)
    assert figures["accuracy"] == half.outcomes[0].metrics["accuracy"]


@pytest.mark.slow
def test_a_second_run_computes_nothing(finished, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("computed twice")

    for name in ("train", "pareto", "export", "save"):
        monkeypatch.setattr(supple, name, fail)
    again = run_recipe(load_recipe(finished.folder / "recipe.yaml"), progress=False)
    assert again.summary.networks == finished.summary.networks
    assert {reused for name, _, reused in again.summary.stages} == {True}


@pytest.mark.slow
def test_a_change_computes_only_what_depends_on_it(tmp_path):
    without_baselines(tmp_path)
    trained = (tmp_path / "small/train/done.json").read_text()
    without_baselines(tmp_path, "search.evaluations=6")
    assert (tmp_path / "small/train/done.json").read_text() == trained
    front = search_recipe(small(tmp_path, "search.evaluations=6"), progress=False)
    assert len(front.evaluated) == 6
    without_baselines(tmp_path, "train.lr=3e-3")
    assert (tmp_path / "small/train/done.json").read_text() != trained


@pytest.mark.slow
def test_a_flipped_byte_in_the_weights_is_refused_by_name(tmp_path):
    without_baselines(tmp_path)
    path = tmp_path / "small/train/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        without_baselines(tmp_path)


@pytest.mark.slow
def test_a_budget_that_nothing_evaluated_meets_names_the_nearest(tmp_path):
    with pytest.raises(BudgetError, match=r"budget 'half'.*nearest"):
        without_baselines(tmp_path, "deploy.budgets.0={name: half, accuracy: '>= 100 %'}")


@pytest.mark.slow
def test_transforms_are_applied_in_order_and_judged(tmp_path, monkeypatch):
    import supple.recipe.deployment as deployment

    seen = []

    class Toy:
        def __init__(self, name):
            self.name = name

        def apply(self, model, *, calibration, loss, generator):
            seen.append((self.name, len(list(calibration)), generator.initial_seed()))
            return model

    monkeypatch.setattr(deployment, "from_settings", lambda key, settings: Toy(key))
    done = without_baselines(tmp_path, "deploy.compress=[prune/a, {prune/b: {}}]")
    assert [name for name, _, _ in seen] == ["prune/a", "prune/b"] * 2
    assert {batches for _, batches, _ in seen} == {2}
    assert len({seed for _, _, seed in seen}) == 2
    full = done.summary.networks[0]
    assert [outcome.way for outcome in full.outcomes] == ["compressed", "elastic"]
    assert full.outcomes[0].metrics == full.outcomes[1].metrics


@pytest.mark.slow
def test_an_operator_that_the_format_lacks_is_named(tmp_path):
    overrides = ("model=tests.cli.models:bessel", "deploy.export=[onnx]", "deploy.budgets=[]")
    with pytest.raises(ExportError, match="bessel_j0"):
        run_recipe(
            small(tmp_path, NO_BASELINES, *overrides),
            allow_code=True,
            progress=False,
        )


@pytest.mark.slow
def test_a_run_killed_between_baselines_trains_only_those_that_are_left(tmp_path, monkeypatch):
    import supple.recipe.compare as compare

    run(tmp_path)
    stages = sorted((tmp_path / "small" / "alone").iterdir())
    assert len(stages) == 2
    (stages[0] / "done.json").unlink()
    sent = []
    real = compare.run_jobs
    monkeypatch.setattr(
        compare, "run_jobs", lambda f, jobs, n: sent.extend(jobs) or real(f, jobs, n)
    )
    run(tmp_path)
    assert [job.stage for job in sent] == [f"alone/{stages[0].name}"]


@pytest.mark.slow
def test_code_named_in_a_recipe_runs_only_where_that_is_allowed(tmp_path):
    with pytest.raises(supple.errors.SettingError, match="allow_code"):
        without_baselines(tmp_path, "model=tests.cli.models:bessel")


def write_images(folder):
    import io

    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        labels = [index % 10 for index in range(count)]
        table = pyarrow.table({"image": images, "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{part}.parquet")


DRY = (NO_BASELINES, "deploy.budgets=[]", "deploy.export=[]")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar-resnet", "llama-text"])
def test_every_shipped_recipe_runs_dry(tmp_path, name):
    overrides = {
        "digits": [],
        "cifar-resnet": [
            f"data={{images: {{path: {tmp_path}, validation: 0.2}}}}",
            "model.cifar-resnet={depth: 20}",
            "search.costs=[macs, params]",
        ],
        "digits-latency": [],
        "digits-memory": [],
        "llama-text": [f"data.text.path={tmp_path / 'a.txt'}", "data.text.length=16"],
    }[name]
    write_images(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question; " * 40)
    short = ["train.epochs=1", "search.evaluations=3", "train.batch_size=16"]
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path, [f"output={tmp_path}", *DRY, *short, *overrides])
    done = run_recipe(recipe, progress=False)
    assert done.summary.space_size > 100
    assert {axis for _, axis, _ in done.summary.sites} >= {"width", "depth"}
    assert len(done.summary.points) == 3
