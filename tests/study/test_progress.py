"""Truths about the figure that a search shows while it runs."""

from __future__ import annotations

import numpy as np
import pytest

from supple.study.progress import scaled_hypervolume


def test_the_box_is_spanned_by_the_first_two_evaluations() -> None:
    values = np.array([[-0.9, 100.0], [-0.4, 20.0], [-0.9, 60.0]])
    # Scaled by 0.5 and 80: (0, 1), (1, 0) and (0, 0.5), under the corner (1.1, 1.1).
    assert scaled_hypervolume(values) == pytest.approx(1.1 * 0.6 + 0.1 * 0.5)


def test_units_do_not_matter() -> None:
    values = np.random.default_rng(0).random((9, 3))
    again = scaled_hypervolume(values * [1e-3, 1e6, 7.0] + [5e-3, 2e6, 1.0])
    assert again == pytest.approx(scaled_hypervolume(values))


def test_there_is_no_figure_before_two_finite_evaluations() -> None:
    assert scaled_hypervolume(np.array([[1.0, 2.0], [np.inf, 1.0]])) is None


def test_two_equal_evaluations_still_span_a_box() -> None:
    assert scaled_hypervolume(np.zeros((2, 2))) == pytest.approx(1.1**2)
