"""What goes wrong ends with a message on stderr and exit code 2, without a traceback."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from supple.cli.main import app
from tests.recipe.small_recipe import SMALL, changed


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result, *words):
    """Asserts a clean refusal, and that the message says these words."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr
    return result.stderr


@pytest.fixture
def recipe(tmp_path):
    def write(text=SMALL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_an_unknown_recipe_key(recipe, tmp_path):
    path = recipe(changed("steps: 6", "stps: 6"))
    refused(invoke("run", path, "-o", tmp_path), "line 10", "'stps'", "did you mean 'steps'")


def test_a_missing_recipe(tmp_path):
    refused(invoke("run", tmp_path / "none.yaml"), "none.yaml")


def test_a_missing_data_file(recipe, tmp_path):
    path = recipe(changed("data: digits", "data: {images: {path: nowhere/at-all}}"))
    refused(invoke("run", path, "-o", tmp_path), "nowhere/at-all")


def test_a_missing_weights_file(recipe, tmp_path):
    text = changed(
        "digits-cnn: {widths: [8, 12], blocks: [1, 1]}",
        "cifar-resnet: {weights: nowhere/r.safetensors}",
    )
    refused(invoke("run", recipe(text), "-o", tmp_path), "nowhere/r.safetensors")


def test_a_forward_that_fails_on_the_example_inputs(tmp_path):
    refused(invoke("inspect", "digits-cnn", "--input", "2x3x8x8", "--no-verify"), "3")


def test_a_model_without_an_elastic_site_lists_the_reasons():
    model = "tests.cli.models:nothing_to_shrink"
    message = refused(invoke("inspect", model, "--input", "2x1x8x8"), "can vary")
    assert "1" in message


def test_a_budget_that_even_the_smallest_exceeds_names_the_nearest(recipe, tmp_path):
    path = recipe(changed("<= 4 k", "<= 10"))
    refused(invoke("run", path, "-o", tmp_path), "'half'", "params <= 10", "nearest")
    assert not (tmp_path / "small" / "train").exists()


def test_a_folder_that_can_not_be_written(recipe, tmp_path):
    (tmp_path / "file").write_text("no folder")
    refused(invoke("run", recipe(), "-o", tmp_path / "file"), "file", "--output")


def test_an_unknown_technique_room_and_model():
    refused(invoke("check", "prune/magntude"), "prune/magntude")
    refused(invoke("techniques", "--room", "prun"), "did you mean 'prune'")
    refused(invoke("reproduce", "supernet/bigans"), "did you mean 'supernet/bignas'")
    refused(invoke("inspect", "digit-cnn"), "did you mean 'digits-cnn'")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits-cnn", "widht=8"], "no setting 'widht'"),
        (["digits-cnn", "width"], "name=value"),
        (["digits-cnn", "--input", "2xx"], "2x3x32x32"),
        (["LlamaForCausalLM"], "config"),
        (["LlamaForCausalLM", "--config", "{hidden_sise: 3}"], "did you mean 'hidden_size'"),
        (["LlamaForCausalLM", "--config", "nowhere.json"], "nowhere.json"),
        (["nowhere.at:all"], "can't import"),
        (["tests.cli.models:nothing_to_shrin"], "did you mean 'nothing_to_shrink'"),
        (["tests.cli.models:no_module"], "gave a str"),
        (["digits-cnn", "--axis", "witdh"], "did you mean 'width'"),
    ],
)
def test_a_model_that_can_not_be_had(words, expected):
    refused(invoke("inspect", *words), expected)


def test_extract_wants_a_run_and_one_of_budget_and_size(tmp_path):
    refused(invoke("extract", tmp_path, "-o", tmp_path / "out"), "--where", "--config")
    refused(
        invoke("extract", tmp_path, "-o", tmp_path / "out", "--where", "params <= 3"),
        "no run's folder",
    )
    refused(
        invoke("extract", tmp_path, "-o", tmp_path / "out", "--where", "params"),
        "params <= 20 k",
    )


def test_a_folder_that_holds_no_network_is_not_exported(tmp_path):
    refused(invoke("export", tmp_path, tmp_path / "net.onnx"), str(tmp_path))


def test_an_interrupt_from_the_keyboard_ends_with_130(recipe, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("supple.recipe.run.run_recipe", interrupted)
    result = invoke("run", recipe(), "-o", tmp_path)
    assert result.exit_code == 130
    assert "go on" in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(recipe, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("supple.recipe.run.run_recipe", broken)
    result = invoke("run", recipe(), "-o", tmp_path)
    assert isinstance(result.exception, ZeroDivisionError)


def test_what_the_system_refuses_is_told_with_the_file(recipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "runs/small/train")

    monkeypatch.setattr("supple.recipe.run.run_recipe", full)
    refused(invoke("run", recipe(), "-o", tmp_path), "runs/small/train", "No space left")


def test_the_installed_command_prints_no_traceback():
    import subprocess
    import sys

    command = [sys.executable, "-m", "supple.cli.main", "run", "nowhere.yaml"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: no recipe at nowhere.yaml\n"
    assert done.stdout == ""
