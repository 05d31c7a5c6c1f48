"""Engines: which are tried, what is kept, and the folder that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import supple
from supple.cli.main import app
from supple.deploy import engines
from supple.deploy.engines import DESCRIPTION, Trial, deploy, load
from supple.errors import CheckpointError, ExportError, SettingError
from supple.files import read_json
from supple.models.base import build
from supple.quantize.base import baseline
from supple.recipe.schema import EngineName

X = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ROUNDS", 1)
    monkeypatch.setattr(engines, "SECONDS", 0.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return build("digits-cnn").eval()


@pytest.mark.parametrize("name", engines.ENGINES)
def test_each_engine_runs_what_was_written_for_it(tmp_path: Path, name: str) -> None:
    model = net()
    (trial,) = deploy(model, tmp_path / "there", (X,), engines=[name])
    assert (trial.engine, trial.refused) == (name, "")
    assert trial.seconds is not None
    (found,) = load(tmp_path / "there")(X)
    limit = 0.05 if name.endswith("bf16") else 1e-5
    assert (found - model(X)).abs().max() <= limit * model(X).abs().max()


def test_a_network_of_codes_runs_in_bfloat16_with_its_scales_untouched(tmp_path: Path) -> None:
    model = baseline("rtn", bits=4, group_size=32).apply(net())
    (trial,) = deploy(model, tmp_path / "there", (X,), engines=["pytorch-bf16"])
    assert trial.error is not None
    assert 0 < trial.error < 0.05


def slow(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets times be these."""

    def timed(count: int, prepare: Any, **_: Any) -> Any:
        import numpy as np

        return np.array([list(seconds.values())[:count]])

    monkeypatch.setattr(engines, "interleaved", timed)


def test_the_fastest_is_kept_and_the_rest_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow({"pytorch": 3.0, "onnxruntime": 2.0}, monkeypatch)
    trials = deploy(net(), tmp_path / "there", (X,), engines=["pytorch", "onnxruntime"])
    assert [one.engine for one in trials] == ["onnxruntime", "pytorch"]
    told = read_json(tmp_path / "there" / DESCRIPTION)
    assert told["engine"] == "onnxruntime"
    assert [Trial(**one) for one in told["trials"]] == trials
    assert {file.name for file in (tmp_path / "there").iterdir()} == {
        DESCRIPTION,
        "network.onnx",
    }


def test_an_engine_that_is_too_far_off_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow({"pytorch-bf16": 1.0, "pytorch": 2.0}, monkeypatch)
    names = ["pytorch-bf16", "pytorch"]
    trials = deploy(net(), tmp_path / "there", (X,), engines=names, tolerance=1e-6)
    assert [one.engine for one in trials] == ["pytorch", "pytorch-bf16"]
    assert "allowed is 1e-06" in trials[1].refused
    with pytest.raises(ExportError, match="no engine runs this network: pytorch-bf16: differs"):
        deploy(net(), tmp_path / "none", (X,), engines=names[:1], tolerance=1e-6)
    assert not (tmp_path / "none").exists()


class Sorting(nn.Module):
    """What OpenVINO has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(x)


def test_an_engine_that_refuses_says_why(tmp_path: Path) -> None:
    trials = deploy(Sorting(), tmp_path / "there", (X,), engines=["openvino", "pytorch"])
    assert trials[0].engine == "pytorch"
    assert "rejects operator" in trials[1].refused
    assert trials[1].seconds is None
    assert (tmp_path / "there" / "network.pt2").exists()  # of a class that no file names
    assert torch.equal(load(tmp_path / "there")(X)[0], torch.special.i0(X))


def test_only_a_folder_of_its_own_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a deployed network"):
        deploy(net(), tmp_path, (X,), engines=["pytorch"])
    for name in ("pytorch", "onnxruntime"):
        deploy(net(), tmp_path / "there", (X,), engines=[name])
    assert not (tmp_path / "there" / "network").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "there"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engines": ["openvin"]}, "there is no engine 'openvin', did you mean 'openvino'"),
        ({"engines": []}, "name at least one engine"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
    ],
)
def test_settings_that_cannot_be_used(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        deploy(net(), tmp_path / "there", (X,), **settings)


def test_recipes_know_all_engines() -> None:
    assert set(get_args(EngineName)) == {"auto", *engines.ENGINES}


def test_the_command_prints_what_came_of_each(tmp_path: Path) -> None:
    supple.save(net(), tmp_path / "net")
    words = ["export", str(tmp_path / "net"), str(tmp_path / "there"), "--input", "1x1x8x8"]
    found = CliRunner().invoke(app, [*words, "--engine", "pytorch,onnxruntime"])
    assert found.exit_code == 0, found.output
    assert {"pytorch", "onnxruntime"} <= set(found.output.split())
    assert (tmp_path / "there" / DESCRIPTION).exists()
    found = CliRunner().invoke(app, [*words, "--engine", "tensorrt"])
    assert found.exit_code != 0
    assert "there is no engine 'tensorrt'" in found.output
