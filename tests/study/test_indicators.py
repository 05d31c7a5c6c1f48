"""Truths about non-dominated points and the hypervolume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.errors import SettingError
from supple.study.indicators import hypervolume, non_dominated


def reference_volume(points: np.ndarray, corner: np.ndarray) -> float:
    """Inclusion and exclusion over all subsets: slow and obvious."""
    total = 0.0
    for k in range(1, len(points) + 1):
        for some in itertools.combinations(points, k):
            box = np.prod(np.maximum(corner - np.max(some, axis=0), 0.0))
            total += (-1) ** (k + 1) * float(box)
    return total


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_hypervolume_is_exact_in_any_number_of_objectives(
    n: int, objectives: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    points = random.integers(0, 8, size=(n, objectives)).astype(float)
    corner = np.full(objectives, 7.0)
    expected = reference_volume(points, corner)
    assert hypervolume(points, corner) == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_two_objectives_by_hand() -> None:
    points = np.array([[1.0, 3.0], [2.0, 1.0], [2.5, 2.5]])
    assert hypervolume(points, [4.0, 4.0]) == 3 * 1 + 2 * 3 - 2 * 1


def test_points_beyond_the_reference_add_nothing() -> None:
    points = np.array([[1.0, 1.0], [0.0, 9.0], [9.0, 0.0]])
    assert hypervolume(points, [2.0, 2.0]) == 1.0
    assert hypervolume(points[1:], [2.0, 2.0]) == 0.0
    assert hypervolume(np.zeros((0, 3)), [1.0, 1.0, 1.0]) == 0.0


def test_large_offsets_cost_no_digits() -> None:
    offset = np.array([1e12, -1e12])
    points = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert hypervolume(points + offset, np.array([2.0, 2.0]) + offset) == 3.0


def test_a_reference_of_another_length_or_no_number_is_refused() -> None:
    with pytest.raises(SettingError, match="one value per objective"):
        hypervolume(np.zeros((2, 2)), [1.0])
    with pytest.raises(SettingError, match="finite"):
        hypervolume(np.array([[np.nan, 1.0]]), [1.0, 1.0])


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_non_dominated_points_by_the_definition(n: int, objectives: int, seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 4, size=(n, objectives)).astype(float)
    dominated = [
        any((other <= point).all() and (other < point).any() for other in points)
        for point in points
    ]
    assert non_dominated(points).tolist() == [i for i, d in enumerate(dominated) if not d]


def test_nothing_is_not_dominated_in_nothing() -> None:
    assert non_dominated(np.zeros((0, 2))).tolist() == []
