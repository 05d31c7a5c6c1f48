"""Truths about objectives."""

from __future__ import annotations

import pytest

from supple.errors import SettingError
from supple.study.objectives import Objective, goes_down, minimised, objectives_of


@pytest.mark.parametrize(
    ("name", "down"),
    [
        ("accuracy", False),
        ("top1", False),
        ("f1", False),
        ("loss", True),
        ("val_loss", True),
        ("Perplexity", True),
        ("top-1 error", True),
        ("terror", False),
    ],
)
def test_the_direction_follows_from_the_words_of_a_name(name: str, down: bool) -> None:
    assert goes_down(name) is down


def test_metrics_come_first_and_costs_always_go_down() -> None:
    assert objectives_of(["accuracy", "loss"], ["params"]) == (
        Objective("accuracy", True),
        Objective("loss", False),
        Objective("params", False),
    )


def test_maximize_overrides_the_names_and_only_chooses_metrics() -> None:
    found = objectives_of(["gain", "loss", "seen"], ["macs"], maximize="loss", only=["loss"])
    assert found == (Objective("loss", True), Objective("macs", False))
    assert objectives_of(["gain"], [], maximize=[]) == (Objective("gain", False),)


def test_names_that_are_no_metrics_or_both_are_refused() -> None:
    with pytest.raises(SettingError, match="did you mean 'accuracy'"):
        objectives_of(["accuracy"], [], maximize="acuracy")
    with pytest.raises(SettingError, match="a cost and a metric"):
        objectives_of(["params"], ["params"])
    with pytest.raises(SettingError, match="nothing to search for"):
        objectives_of(["accuracy"], [], only=[])


def test_what_goes_up_is_negated() -> None:
    objectives = (Objective("accuracy", True), Objective("params", False))
    values = [{"accuracy": 0.9, "params": 3.0, "other": 1.0}]
    assert minimised(objectives, values).tolist() == [[-0.9, 3.0]]
    assert minimised(objectives, []).shape == (0, 2)
