"""`supple profile` measures, tells, writes whole files only, and refuses early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from supple.cli.main import app
from supple.cost.latency import LatencyModel, fit_measured
from supple.cost.measure import device_name
from supple.cost.profile import DeviceProfile, Divisor, OperatorTable, ThreadTimes


def invoke(*words):
    return CliRunner().invoke(app, ["profile", *map(str, words)])


@pytest.fixture
def measured(monkeypatch):
    """Makes up what is measured; returns the settings that were asked for."""
    asked = {}

    def profile_device(**settings):
        asked.update(settings)
        settings["progress"]("operators", 1, 1)
        tables = {
            "conv": OperatorTable(
                ("pixels", "inner", "outer", "taps"), ((1, 2),) * 4, np.full((2,) * 4, 8e-9)
            ),
            "matmul": OperatorTable(
                ("rows", "inner", "outer"), ((1, 2),) * 3, np.full((2,) * 3, 8e-9)
            ),
            "copy": OperatorTable(("elements",), ((1, 4),), np.array([2e-9, 2e-9])),
        }
        return DeviceProfile(
            device=device_name("cpu", settings["threads"]),
            torch_version=torch.__version__,
            threads=settings["threads"],
            date="2026-11-21T00:00:00+00:00",
            fast=settings["fast"],
            operators=tables,
            divisors={"conv": Divisor("conv", 16), "linear": Divisor("linear", 1)},
            thread_times=(ThreadTimes("some work", 1, {1: 2e-3, 2: 1e-3}),),
        )

    def fit(net, profile, **settings):
        asked.update(settings)
        rows = np.unique(net.space.random_many(30, 0), axis=0)
        seconds = 1e-4 + 1e-9 * net.costs(rows)["macs"]
        return fit_measured(net, rows, seconds, profile, threads=settings["threads"])

    monkeypatch.setattr("supple.cost.profile.profile_device", profile_device)
    monkeypatch.setattr("supple.cost.latency.fit", fit)
    return asked


def test_the_device_is_told_and_written(measured, tmp_path) -> None:
    result = invoke("--out", tmp_path / "a.json", "--fast")
    assert result.exit_code == 0, result.output
    assert measured["fast"] is True
    assert "conv      up to 2 GMAC/s" in result.output
    assert "up to 16 GB/s in a copy" in result.output
    assert "2 ns for the smallest operator" in result.output
    assert "conv: multiples of 16 channels pay" in result.output
    assert "linear: no multiple of channels pays" in result.output
    assert "1 ms best" in result.output
    assert DeviceProfile.load(tmp_path / "a.json").divisor("conv") == 16
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_model_gets_a_latency_model_that_tells_its_error(measured, tmp_path) -> None:
    out = tmp_path / "a.json"
    result = invoke("digits-cnn", "--out", out, "--samples", "20")
    assert result.exit_code == 0, result.output
    assert measured["samples"] == 20
    assert "on sizes it was not fitted on" in result.output
    assert "smallest size" in result.output
    assert " ±" in result.output
    assert LatencyModel.load(tmp_path / "a-latency.json").samples > 10


def test_a_recipe_is_modelled_with_its_axes(measured, tmp_path) -> None:
    from tests.recipe.small_recipe import SMALL

    (tmp_path / "small.yaml").write_text(SMALL)
    result = invoke(tmp_path / "small.yaml", "--out", tmp_path / "a.json", "--quiet")
    assert result.exit_code == 0, result.output
    axes = {site.axis for site in LatencyModel.load(tmp_path / "a-latency.json").space.sites}
    assert "width" in axes


def test_an_interrupted_measurement_leaves_no_file(monkeypatch, tmp_path) -> None:
    def interrupted(**settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("supple.cost.profile.profile_device", interrupted)
    assert invoke("--out", tmp_path / "a.json").exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_measuring(measured, tmp_path) -> None:
    for place in (tmp_path, tmp_path / "a.txt"):
        result = invoke("--out", place)
        assert result.exit_code == 2
        assert "ends in .json" in result.output
    (tmp_path / "file").write_text("")
    assert "is no folder" in invoke("--out", tmp_path / "file" / "a.json").output
    assert measured == {}


def test_wrong_settings_are_told(measured, tmp_path) -> None:
    out = tmp_path / "a.json"
    assert "did you mean 'digits-cnn'" in invoke("digits-cn", "--out", out).output
    assert "no recipe at" in invoke("no.yaml", "--out", out).output
    assert measured == {}
