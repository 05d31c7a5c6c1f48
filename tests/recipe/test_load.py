from pathlib import Path

import pytest

from supple.errors import RecipeError
from supple.recipe.dump import recipe_text
from supple.recipe.load import (
    apply_overrides,
    checked_compression,
    is_compression,
    load_compression,
    load_recipe,
    parse_source,
    read_source,
    validate,
)
from supple.recipe.references import check_references
from tests.recipe.small_recipe import SMALL, changed


def read(text, overrides=()):
    source = apply_overrides(parse_source(text, "r.yaml"), overrides)
    recipe = validate(source)
    check_references(recipe, source)
    return recipe


def test_numbers_written_as_text_become_numbers_of_the_fields_type():
    recipe = read(changed("steps: 6", 'steps: "1e3"').replace("2e-3", "1e-4"))
    assert recipe.train.steps == 1000
    assert isinstance(recipe.train.steps, int)
    assert recipe.train.lr == 1e-4


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("steps: 6", "step: 6", 10, "unknown key 'step' in train, did you mean 'steps'?"),
        ("data: digits", "dta: digits", 5, "unknown key 'dta', did you mean 'data'?"),
        ("  digits-cnn", "  digit-cnn", 4, "'digit-cnn', did you mean 'digits-cnn'?"),
        ("widths:", "widhts:", 4, "no setting 'widhts', did you mean 'widths'?"),
        ("data: digits", "data: digit", 5, "'digit', did you mean 'digits'?"),
        ("  width:", "  witdh:", 7, "no axis 'witdh', did you mean 'width'?"),
        ("choices:", "choice:", 7, "no setting 'choice', did you mean 'choices'?"),
        ("[0.5, 1.0]", "[5.5, 1.0]", 7, "5.5"),
        ("bignas", "bigans", 9, "'supernet/bigans', did you mean 'supernet/bignas'?"),
        ("random: 1", "randm: 1", 9, "no setting 'randm', did you mean 'random'?"),
        ("random: 1", "random: -1", 9, "random must be at least 0, got -1"),
        ("2e-3", "-1", 11, "train.lr: Input should be greater than 0, got -1"),
        ("[params, macs]", "[params, mac]", 17, "'mac', did you mean 'macs'?"),
        ("params:", "parms:", 21, "bounds 'parms'.*did you mean 'params'?"),
        ('"<= 4 k"', '"4 k"', 21, "a bound must be"),
        ("name: half", "name: full", 19, "differ from each other and from 'full'"),
        ("name: half", "nam: half", 21, "deploy.budgets.0.name is missing"),
        ("export: []", "export: [onx]", 22, "onnx"),
        ("search/random-search", "supernet/bignas", 15, "kind 'rule'.*wants a search"),
        ("compare: {", "compare: {alone: false, ", 23, "cut needs alone"),
        ("steps: 6", "steps: 6\n  epochs: 1", 8, "either epochs or steps"),
        ("steps: 6", "steps: 6\n  steps: 7", 11, "'steps' stands here a second time"),
        ("data: digits", "data: {digits: {batch_size: 3}}", 5, "train.batch_size"),
        ("lr: 2e-3", "lr: 2e-3\n  optimizer: adamww", 12, "'adamww', did you mean 'adamw'?"),
    ],
)
def test_a_wrong_place_is_named_with_its_line_and_the_nearest_right_one(old, new, line, words):
    with pytest.raises(RecipeError, match=rf"^r\.yaml, line {line}: .*{words}"):
        read(changed(old, new))


def test_every_wrong_key_is_told_and_the_cause_comes_before_what_it_makes_missing():
    with pytest.raises(RecipeError) as caught:
        read(changed("model:", "modle:").replace("lr:", "lrr:"))
    unknown, also, missing = str(caught.value).split("\n")
    assert "unknown key 'lrr'" in unknown
    assert "unknown key 'modle', did you mean 'model'?" in also
    assert "model is missing" in missing


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stps=3", "command line, train.stps: unknown key 'stps'"),
        ("train.supernet/bignas.randm=3", "command line, .*randm: .*no setting 'randm'"),
        ("train.lr=-1", "command line, train.lr: .*greater than 0"),
        ("train", "wants section.key=value"),
        ("deploy.budgets.7.name=x", "nothing at 7"),
        ("train.lr=[", "no YAML value"),
    ],
)
def test_a_wrong_override_says_that_it_came_from_the_command_line(override, words):
    with pytest.raises(RecipeError, match=words):
        read(SMALL, [override])


def test_overrides_reach_into_lists_and_techniques():
    recipe = read(
        SMALL,
        ["deploy.budgets.0.params=<= 5 k", "train.supernet/bignas.random=3", "seed=1e1"],
    )
    assert recipe.deploy.budgets[0].where == {"params": "<= 5 k"}
    assert recipe.train.technique.settings == {"random": 3}
    assert recipe.seed == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b", "a recipe is a mapping"),
        ("name: [a\nb: c", "line 2: is no valid YAML"),
        ("a: &a [*a]", "an alias contains itself"),
        ("", "a recipe is a mapping"),
    ],
)
def test_what_is_no_mapping_is_refused(text, words):
    with pytest.raises(RecipeError, match=words):
        parse_source(text, "r.yaml")


def test_a_missing_file_is_named_with_a_near_one(tmp_path):
    (tmp_path / "digits.yaml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"digts\.yaml, did you mean 'digits\.yaml'"):
        load_recipe(tmp_path / "digts.yaml")


def test_a_file_that_is_no_text_is_refused_with_the_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(SMALL.encode()[:20] + b"\xff" + SMALL.encode()[20:])
    with pytest.raises(RecipeError, match="byte 20"):
        load_recipe(path)


def test_fast_changes_its_values_and_the_name_so_that_the_full_run_stays(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(SMALL)
    recipe = load_recipe(path, ["seed=7"], fast=True)
    assert (recipe.name, recipe.train.steps, recipe.seed) == ("small-fast", 3, 7)
    path.write_text(SMALL[: SMALL.index("fast:")])
    with pytest.raises(RecipeError, match="no section `fast`"):
        load_recipe(path, fast=True)


def test_a_wrong_value_in_fast_is_named_with_the_line_of_fast(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(changed("train.steps: 3", "train.stes: 3"))
    with pytest.raises(RecipeError, match="line 25: unknown key 'stes'"):
        load_recipe(path, fast=True)


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_being_written_and_read(path):
    compresses = is_compression(read_source(path))
    read, check = (
        (load_compression, checked_compression) if compresses else (load_recipe, validate)
    )
    for fast in (False, True):
        recipe = read(path, fast=fast)
        assert recipe.fast
        assert check(parse_source(recipe_text(recipe))) == recipe


def test_recipes_of_both_kinds_are_shipped():
    shipped = {path.stem for path in RECIPES}
    assert {"digits", "cifar-resnet", "llama-text", "prune-resnet", "prune-llama"} <= shipped
    assert "quantize-resnet" in shipped
