"""Truths about quantities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.errors import SettingError
from supple.quantity import Bound, bound, quantity, show, unit_of


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 ms", 0.002),
        ("2ms", 0.002),
        (" 2.5  µs ", 2.5e-6),
        ("3 ns", 3e-9),
        ("1.5 min", 90.0),
        ("1.5 MB", 1.5e6),
        ("2 KiB", 2048.0),
        ("1 GiB", 1024.0**3),
        ("512 B", 512.0),
        ("3 M", 3e6),
        ("3k", 3e3),
        ("1.2 GMACs", 1.2e9),
        ("50 %", 0.5),
        ("1e-3 s", 1e-3),
        ("1e6", 1e6),
        ("0.25", 0.25),
        (".5 J", 0.5),
        ("1 Wh", 3600.0),
        ("-3", -3.0),
        (7, 7.0),
        (0.5, 0.5),
    ],
)
def test_quantities_are_read_into_base_units(text: str | float, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", "ms", "2 ms 3", "2 furlongs", "1 2", "nan", True, None, 1e999]
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        quantity(text)


def test_a_unit_in_the_wrong_case_names_the_right_one() -> None:
    with pytest.raises(SettingError, match="did you mean 'MB'"):
        quantity("3 mb")


def test_a_quantity_of_another_kind_is_refused() -> None:
    with pytest.raises(SettingError, match="should be a time but is bytes"):
        quantity("2 MB", "s")
    with pytest.raises(SettingError, match="should be a plain number but is a time"):
        quantity("2 ms", "")
    assert quantity("0.002", "s") == quantity("2 ms", "s")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00213, "s", "2.13 ms"),
        (999.9e-6, "s", "1 ms"),
        (1.5e6, "B", "1.5 MB"),
        (0.4, "B", "0.4 B"),
        (272474, "", "272 k"),
        (0.9137, "", "0.914"),
        (100.0, "", "100"),
        (1e16, "", "10000 T"),
        (2e-11, "s", "0.02 ns"),
        (0.0, "s", "0 s"),
        (-0.0042, "s", "-4.2 ms"),
    ],
)
def test_values_are_written_with_the_prefix_that_fits(
    value: float, unit: str, text: str
) -> None:
    assert show(value, unit) == text


@given(
    st.floats(1e-9, 1e15).flatmap(lambda v: st.sampled_from([v, -v])),
    st.sampled_from(["s", "B", "J", "W", "Hz", ""]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_written_is_read_back(value: float, unit: str) -> None:
    assert quantity(show(value, unit, digits=6), unit) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("latency[batch=1]", "s"),
        ("memory", "B"),
        ("weight_bytes", "B"),
        ("energy", "J"),
        ("params", ""),
        ("accuracy", ""),
    ],
)
def test_the_unit_follows_from_the_name(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_bounds_by_hand() -> None:
    assert bound("<= 2 ms", "s") == Bound("<=", 0.002)
    assert bound(">0.9").holds(0.91)
    assert not bound("> 0.9").holds(0.9)
    assert bound("<= 2 M").excess(3e6) == 0.5
    assert bound("<= 2 M").excess(2e6) == 0.0
    assert bound("< 2").excess(2.0) > 0.0
    assert bound(">= 0.8").excess(0.6) == pytest.approx(0.25)
    assert not bound("<= 1").holds(math.nan)
    assert bound("<= 1").excess(math.nan) == math.inf


@pytest.mark.parametrize("text", ["2 ms", "= 2 ms", "<= ", "<=> 3", 3])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        bound(text)
