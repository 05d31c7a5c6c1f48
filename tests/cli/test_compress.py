"""`supple prune`, `supple quantize`, and `supple run` on a recipe that compresses."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from supple import load
from supple.cli.main import app
from supple.layers.packed import PackedConv2d, PackedLinear

PRUNE = ["prune", "digits-cnn", "--data", "digits"]
QUANTIZE = ["quantize", *PRUNE[1:]]


def called(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(words))
    return found.exit_code, found.output


def test_prune_prints_a_table_and_leaves_the_network(tmp_path) -> None:
    code, text = called(
        *PRUNE, "--method", "units/l1:round_to=1", "--target", "macs=50%", "-o", str(tmp_path),
        "--name", "small",
    )  # fmt: skip
    assert code == 0, text
    assert "(50%)" in text
    assert (tmp_path / "small" / "report.html").is_file()
    assert (tmp_path / "small" / "1-units-l1" / "network" / "supple.json").is_file()


def test_quantize_leaves_packed_codes(tmp_path) -> None:
    code, text = called(
        *QUANTIZE, "--method", "codes/rtn-mse:bits=3,layers=stages.2.*", "-o", str(tmp_path),
        "--name", "small",
    )  # fmt: skip
    assert code == 0, text
    network = load(tmp_path / "small" / "1-codes-rtn-mse" / "network")
    packed = [one for one in network.modules() if isinstance(one, PackedLinear | PackedConv2d)]
    assert packed
    assert {layer.spec.bits for layer in packed} == {3}
    weights = sum(layer.dense_weight().numel() for layer in packed)
    assert sum(layer.codes.nbytes for layer in packed) == 3 / 8 * weights


def test_a_recipe_with_steps_runs(tmp_path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "name: small\nmodel: digits-cnn\ndata: digits\nexport: []\n"
        "compress: [{weights/magnitude: {sparsity: 0.5}}]\n"
    )
    code, text = called("run", str(recipe), "-o", str(tmp_path), "--quiet")
    assert code == 0, text
    assert "50.0%" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "units/l1", "--target", "mac=50%"], "did you mean 'macs'"),
        (["--method", "units/l1", "--target", "macs=0.1%"], "smallest"),
        (["--method", "units/l2s"], "there is no baseline 'units/l2s'"),
        (["--method", "weights/magnitude", "--target", "macs=50%"], "has no setting 'target'"),
        (["--method", "weights/magnitude:sparsity=2"], "sparsity must be"),
        (["--method", "weights/magnitude:sparsity"], "wants NAME=VALUE"),
        (["--method", "supernet/bignas"], "wants one of prune/..., weights/..., units/..."),
        (["--method", "prune/granet"], "works while the network trains: give --steps"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, words, message) -> None:
    code, text = called(*PRUNE, *words, "-o", str(tmp_path))
    assert code != 0
    assert message in " ".join(text.split())
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "codes/rtm"], "there is no baseline 'codes/rtm', did you mean 'rtn'"),
        (["--method", "codes/rtn:bits=1"], "bits must be from 2 to 16"),
        (["--method", "prune/global-mp"], "wants one of quantize/..., codes/..., qat/..."),
        (["--method", "qat/lsq"], "works while the network trains: give --steps"),
        (["--method", "quantize/fast-2bit:share=1"], "share must be in"),
        (["--method", "codes/rtn", "--engine", "tensorflow"], "engines"),
    ],
)
def test_what_is_wrong_with_quantizing_is_said_in_a_line(tmp_path, words, message) -> None:
    code, text = called(*QUANTIZE, *words, "-o", str(tmp_path))
    assert code != 0
    assert message in " ".join(text.split())
    assert "Traceback" not in text
