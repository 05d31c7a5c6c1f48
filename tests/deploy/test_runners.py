"""What runs files, and how outputs are compared."""

from __future__ import annotations

import pytest
import torch

from supple.deploy.runners import relative_error

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([1.0, -4.0], [NAN, -4.0], INF),
        ([NAN, -4.0], [1.0, -4.0], INF),
        ([NAN, -4.0], [NAN, -2.0], 0.5),
        ([INF, NAN], [NAN, INF], 0.0),
        ([1.0, -4.0], [1.0], INF),
        ([], [], 0.0),
        ([0.0], [1.0], 1e12),
    ],
)
def test_differences_are_relative_and_what_is_not_finite_must_be_so_in_both(
    ours: list[float], theirs: list[float], error: float
) -> None:
    assert relative_error(torch.tensor(ours), torch.tensor(theirs)) == pytest.approx(error)
