"""Recipes that make one network smaller: what is left behind, what resumes, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import supple
from supple.errors import RecipeError, SettingError, UnknownTechniqueError
from supple.files import read_json
from supple.rebuild import provenance_of
from supple.recipe.baselines import technique_named
from supple.recipe.compress import run_compression
from supple.recipe.dump import recipe_text
from supple.recipe.load import is_compression, load_compression, load_recipe, read_source
from tests.recipe.test_run import write_images

ROOT = Path(__file__).parents[2]
RECIPE = """
name: small
model: digits-cnn
data: digits
compress:
  - weights/magnitude: {sparsity: 0.5}
  - train: {steps: 3, lr: 1e-3}
export: []
fast: {compress.1.train.steps: 1}
"""


def written(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def run(folder: Path, *overrides: str):
    recipe = load_compression(written(folder), [f"output={folder}", *overrides])
    return run_compression(recipe, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), "export=[pt2]")


def test_each_step_leaves_its_network_and_its_figures(finished) -> None:
    names = [step["name"] for step in finished.summary.steps]
    assert names == ["start", "1-weights-magnitude", "2-train"]
    zeros = [step["zeros"] for step in finished.summary.steps]
    assert zeros[0] == 0
    assert zeros[1] == pytest.approx(0.5, abs=0.01)
    assert zeros[2] == zeros[1]  # training kept them
    for name in names:
        supple.load(finished.folder / name / "network")
    assert finished.report.is_file()
    assert read_json(finished.folder / "summary.json")["metric"] == "accuracy"
    assert [file.name for file in finished.files] == ["network.pt2"]


def test_the_last_network_is_the_one_that_was_judged(finished) -> None:
    from supple.recipe.tasks import task_of

    network = supple.load(finished.network)
    data = supple.data.base.load("digits", batch_size=64).test
    figures = task_of(data.example()).evaluate(network, data.batches())
    assert figures == finished.summary.steps[-1]["figures"]


def test_a_second_run_computes_only_what_changed(finished, monkeypatch) -> None:
    folder = finished.folder.parent
    before = (finished.folder / "1-weights-magnitude" / "done.json").stat().st_mtime_ns

    def fail(*_, **__):
        raise AssertionError("computed twice")

    with monkeypatch.context() as patched:
        patched.setattr("supple.train", fail)
        again = run(folder, "export=[pt2]")
        assert again.summary.steps[-1]["figures"] == finished.summary.steps[-1]["figures"]
        with pytest.raises(AssertionError, match="computed twice"):
            run(folder, "export=[pt2]", "compress.1.train.steps=2")
    after = (finished.folder / "1-weights-magnitude" / "done.json").stat().st_mtime_ns
    assert after == before


def test_a_rule_prunes_while_it_trains(tmp_path) -> None:
    found = run(
        tmp_path,
        "compress=[{train: {prune/hesso: {target: macs=50%}, steps: 12, lr: 1e-3}}]",
    )
    start, trained = (step["costs"]["macs"] for step in found.summary.steps)
    assert 0.45 < trained / start <= 0.5
    again = supple.load(found.network)
    assert provenance_of(again)["steps"][-1]["key"] == "prune/hesso"


def test_zeros_grow_again_where_that_is_asked_for(tmp_path) -> None:
    found = run(tmp_path, "compress.1.train.keep_zeros=false")
    assert found.summary.steps[-1]["zeros"] == 0


def test_the_recipe_survives_being_written(tmp_path) -> None:
    recipe = load_compression(written(tmp_path))
    assert load_compression(written(tmp_path, recipe_text(recipe))) == recipe


def test_fast_changes_steps(tmp_path) -> None:
    recipe = load_compression(written(tmp_path), fast=True)
    assert recipe.name == "small-fast"
    assert recipe.compress[1].train is not None
    assert recipe.compress[1].train.steps == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sparsity: 0.5", "sparcity: 0.5", r"line 6.*has no setting 'sparcity'.*'sparsity'"),
        ("sparsity: 0.5", "sparsity: 2", r"line 6.*sparsity must be"),
        ("weights/magnitude", "weights/magnitute", r"line 6.*did you mean 'magnitude'"),
        (
            "weights/magnitude: {sparsity: 0.5}",
            "prune/global-mpp: {}",
            r"line 6.*prune/global-mp.",
        ),
        ("steps: 3", "stepz: 3", r"line 7.*unknown key 'stepz' in compress.1.train.*'steps'"),
        ("train: {", "train: {supernet/bignas: {}, ", None),
        ("weights/magnitude: {sparsity: 0.5}", "search/nsga2: {}", r"wants a transform"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, old, new, message) -> None:
    path = written(tmp_path, RECIPE.replace(old, new))
    if message is not None:
        with pytest.raises(RecipeError, match=message):
            load_compression(path)
        return
    with pytest.raises(SettingError, match="trains a supernet"):
        run_compression(
            load_compression(path, [f"output={tmp_path}", "compress.0={weights/random: {}}"])
        )


def test_the_kinds_of_recipes_are_told_apart(tmp_path) -> None:
    path = written(tmp_path)
    assert is_compression(read_source(path))
    with pytest.raises(RecipeError, match="compresses one network and has no supernet"):
        load_recipe(path)
    assert not is_compression(read_source(ROOT / "recipes" / "digits.yaml"))


def test_a_saved_network_can_be_compressed_further(finished, tmp_path) -> None:
    folder = str(finished.folder / "1-weights-magnitude" / "network")
    text = yaml.safe_dump(yaml.safe_load(RECIPE) | {"model": {folder: {}}})
    recipe = load_compression(written(tmp_path, text), [f"output={tmp_path}"])
    found = run_compression(recipe, progress=False)
    start = found.summary.steps[0]
    assert start["figures"] == finished.summary.steps[1]["figures"]


def test_names_of_baselines_are_found() -> None:
    assert technique_named("weights/wanda").kind == "transform"
    assert technique_named("units/l1", {"target": "params=50%"}).kind == "transform"
    with pytest.raises(SettingError, match="did you mean 'wanda'"):
        technique_named("weights/wandaa")
    with pytest.raises(UnknownTechniqueError, match="prune/global-mp"):
        technique_named("prune/global-mpp")


def test_a_network_of_the_users_own_code_is_compressed(tmp_path) -> None:
    text = RECIPE.replace("digits-cnn", "tests.recipe.test_compress:own")
    recipe = load_compression(written(tmp_path, text), [f"output={tmp_path}"])
    with pytest.raises(SettingError, match="would run code"):
        run_compression(recipe)
    found = run_compression(recipe, allow_code=True, progress=False)
    assert len(found.summary.steps) == 3
    assert len(run_compression(recipe, allow_code=True).summary.steps) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-resnet", "prune-llama"])
def test_every_shipped_recipe_of_a_compression_runs_dry(tmp_path, name) -> None:
    write_images(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question; " * 60)
    small = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
    }  # fmt: skip
    overrides = {
        "prune-resnet": [
            f"data={{images: {{path: {tmp_path}, validation: 0.2}}}}",
            "model.cifar-resnet={depth: 20}",
        ],
        "prune-llama": [
            f"data={{text: {{path: {tmp_path / 'a.txt'}, tokenizer: bytes, length: 16}}}}",
            f"model={{LlamaForCausalLM: {{config: {small}}}}}",
        ],
    }[name]
    path = ROOT / "recipes" / f"{name}.yaml"
    short = ["compress.1.train.steps=2", "batch_size=8", "calibration_batches=1", "export=[]"]
    recipe = load_compression(path, [f"output={tmp_path}", *overrides, *short])
    found = run_compression(recipe, progress=False)
    costs = [step["costs"]["macs"] * (1 - step["zeros"]) for step in found.summary.steps]
    assert costs[1] < 0.75 * costs[0]
    assert costs[2] == costs[1]


def own() -> torch.nn.Module:
    """A network that only code can build."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_engines_are_tried_on_the_network_and_on_what_it_was_made_from(tmp_path) -> None:
    found = run(
        tmp_path, "compress=[{weights/magnitude: {sparsity: 0.5}}]", "engines=[pytorch]"
    )
    assert [one.engine for one in found.summary.engines.trials] == ["pytorch"]
    assert [one.engine for one in found.summary.engines.before] == ["pytorch"]
    assert (found.folder / "deploy" / "deployed" / "engine.json").is_file()
    again = run(
        tmp_path, "compress=[{weights/magnitude: {sparsity: 0.5}}]", "engines=[pytorch]"
    )
    assert again.summary.engines == found.summary.engines
    assert run(tmp_path).summary.engines is None


@pytest.mark.slow
def test_the_shipped_recipe_of_few_bits_runs_dry(tmp_path) -> None:
    write_images(tmp_path)
    overrides = [
        f"output={tmp_path}",
        f"data={{images: {{path: {tmp_path}, validation: 0.2}}}}",
        "model.cifar-resnet={depth: 20}",
        "compress.0.quantize/hessian-interlayer.samples=2",
        "calibration_batches=1",
        "export=[]",
        "engines=[onnxruntime]",
    ]
    recipe = load_compression(ROOT / "recipes" / "quantize-resnet.yaml", overrides)
    found = run_compression(recipe, progress=False)
    sizes = [step["file_bytes"] for step in found.summary.steps]
    assert sizes[1] < sizes[0] / 5
    assert found.summary.engines.trials[0].seconds > 0
