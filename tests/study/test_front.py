"""Truths about fronts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from supple.errors import BudgetError, CheckpointError, SettingError
from supple.space import Config
from supple.study.front import Front, Point
from supple.study.objectives import Objective

ACCURACY, PARAMS = Objective("accuracy", True), Objective("params", False)
LATENCY = Objective("latency[batch=1]", False)


def point(size: int, accuracy: float, params: float, latency: float, **more: float) -> Point:
    values = {"accuracy": accuracy, "params": params, "latency[batch=1]": latency, **more}
    return Point(Config({"width": size}), values)


def five() -> Front:
    """By hand: 3 is dominated by 2, and 5 has the values of 4."""
    return Front(
        (ACCURACY, LATENCY, PARAMS),
        (
            point(4, 0.95, 4e6, 0.004, macs=9.0),
            point(1, 0.70, 1e6, 0.001),
            point(2, 0.90, 2e6, 0.002),
            point(3, 0.85, 3e6, 0.003),
            point(5, 0.95, 4e6, 0.004),
        ),
    )


def test_points_are_the_front_from_the_cheapest_on_each_value_once() -> None:
    front = five()
    assert [p.config["width"] for p in front.points] == [1, 2, 4]
    assert len(front) == 3
    assert str(front).startswith("3 of 5 configs")


def test_an_empty_front_has_no_points() -> None:
    front = Front((ACCURACY, PARAMS), ())
    assert front.points == ()
    assert "0 of 0" in front.table()
    with pytest.raises(BudgetError, match="no config was evaluated"):
        front.best()


def test_best_within_budgets() -> None:
    front = five()
    assert front.best()["width"] == 4
    assert front.best({"params": "<= 2.5 M"})["width"] == 2
    assert front.best({"latency[batch=1]": "< 2 ms"}, maximize="accuracy")["width"] == 1
    assert front.best({"accuracy": ">= 84 %"}, minimize="params")["width"] == 2
    assert front.best(minimize="latency[batch=1]")["width"] == 1


def test_of_equally_good_configs_the_one_that_no_other_dominates_is_best() -> None:
    front = Front(
        (ACCURACY, PARAMS),
        (
            Point(Config({"w": 1}), {"accuracy": 0.9, "params": 3.0}),
            Point(Config({"w": 2}), {"accuracy": 0.9, "params": 2.0}),
        ),
    )
    assert front.best(maximize="accuracy")["w"] == 2


def test_a_value_that_only_some_configs_have_can_still_be_bounded() -> None:
    assert five().best({"macs": "<= 10"})["width"] == 4


def test_a_budget_that_nobody_meets_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"params <= 900 k.*the nearest has params = 1 M"):
        five().best({"params": "<= 900 k"})
    with pytest.raises(BudgetError, match=r"nearest has accuracy = 0\.9, params = 2 M"):
        five().best({"accuracy": ">= 0.95", "params": "<= 2 M"})


def test_wrong_names_units_and_directions_are_refused() -> None:
    front = five()
    with pytest.raises(SettingError, match="did you mean 'accuracy'"):
        front.best(maximize="acuracy")
    with pytest.raises(SettingError, match="did you mean 'params'"):
        front.best({"parms": "<= 1"})
    with pytest.raises(SettingError, match="should be a time"):
        front.best({"latency[batch=1]": "<= 2 MB"})
    with pytest.raises(SettingError, match="not both"):
        front.best(maximize="accuracy", minimize="params")


def test_a_point_without_an_objective_is_refused() -> None:
    with pytest.raises(SettingError, match="without objective 'params'"):
        Front((PARAMS,), (Point(Config({"w": 1}), {"accuracy": 1.0}),))


def test_hypervolume_by_hand_in_the_directions_of_the_objectives() -> None:
    front = Front(
        (ACCURACY, PARAMS),
        (
            Point(Config({"w": 1}), {"accuracy": 0.5, "params": 1.0}),
            Point(Config({"w": 2}), {"accuracy": 1.0, "params": 3.0}),
        ),
    )
    expected = 0.5 * 3 + 0.5 * 1
    assert front.hypervolume({"accuracy": 0.0, "params": 4.0}) == pytest.approx(expected)
    assert front.hypervolume([0.0, 4.0]) == pytest.approx(expected)
    with pytest.raises(SettingError, match="needs a value for 'params'"):
        front.hypervolume({"accuracy": 0.0})


def test_the_table_shows_values_with_units_and_config_digests() -> None:
    front = five()
    text = front.table()
    for part in (
        "latency[batch=1]",
        "0.95",
        "4 ms",
        "4 M",
        "1 ms",
        front.points[0].config.digest,
    ):
        assert part in text
    assert "macs" not in front.table(["accuracy", "params"])
    with pytest.raises(SettingError, match="no value is called"):
        front.table(["nothing"])


@given(
    st.lists(
        st.tuples(st.integers(1, 99), st.floats(0, 1), st.floats(1, 1e12)),
        max_size=8,
        unique_by=lambda t: t[0],
    )
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_json_gives_a_front_back(rows: list[tuple[int, float, float]]) -> None:
    points = tuple(Point(Config({"w": w}), {"accuracy": a, "params": p}) for w, a, p in rows)
    front = Front((ACCURACY, PARAMS), points, "runs/a.db")
    assert Front.from_json(front.to_json()) == front


@pytest.mark.parametrize("text", ["", "[]", '{"objectives": []}', '{"objectives": 3}'])
def test_json_that_is_no_front_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="does not describe a front"):
        Front.from_json(text)


# ------------------------------------------------------------------------------- pictures


def pixels(path: Path, color: str) -> int:
    """Counts the pixels of one colour."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    image = imread(path)[..., :3]
    return int((np.abs(image - wanted).max(axis=-1) < 0.02).sum())


def test_the_plot_shows_front_evaluated_and_marked_points(tmp_path: Path) -> None:
    front = five()
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    front.plot(plain, x="params", y="accuracy")
    front.plot(marked, x="params", y="accuracy", mark={"full": Config({"width": 4})})
    assert pixels(plain, "#2f5fd0") > 50
    assert pixels(plain, "#b9c2cf") > 20
    assert pixels(plain, "#d1495b") == 0 < pixels(marked, "#d1495b")


def test_a_plot_names_what_it_cannot_draw(tmp_path: Path) -> None:
    front = five()
    with pytest.raises(SettingError, match="was not evaluated"):
        front.plot(tmp_path / "a.png", mark={"chosen": Config({"width": 9})})
    with pytest.raises(SettingError, match=r"use one of .*\.png"):
        front.plot(tmp_path / "a.xyz")
    with pytest.raises(SettingError, match="no value is called"):
        front.plot(tmp_path / "a.png", x="size")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        front.plot(tmp_path / "file" / "a.png")
    assert not (tmp_path / "a.png").exists()
