import dataclasses

import numpy as np

from supple.report.plots import _front, _smoothed, curves_figure, front_figure, sizes_figure
from tests.report.fake import fake_summary


def test_smoothing_is_the_mean_of_the_last_values():
    values = np.array([3.0, 5.0, 7.0, 11.0, 13.0])
    expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(5)]
    np.testing.assert_allclose(_smoothed(values, 3), expected)
    np.testing.assert_array_equal(_smoothed(values, 1), values)


def test_the_front_keeps_what_no_cheaper_one_equals():
    rows = [(1, 0.5), (2, 0.4), (3, 0.7), (3, 0.8), (5, 0.8), (7, 0.9)]
    assert _front(rows, maximize=True) == [(1, 0.5), (3, 0.8), (7, 0.9)]
    assert _front(rows, maximize=False) == [(1, 0.5), (2, 0.4)]


def test_every_network_is_inside_the_picture_of_the_front():
    summary = fake_summary()
    [axes] = front_figure(summary).axes
    low, high = axes.get_ylim()
    marked = [
        line for line in axes.lines if line.get_marker() in "o^v" and len(line.get_xdata())
    ]
    assert len(marked) == sum(len(network.outcomes) for network in summary.networks)
    assert all(low < y < high for line in marked for y in line.get_ydata())
    assert {text.get_text() for text in axes.texts} >= {"full", "large", "medium", "small"}


def test_a_cut_far_below_the_front_is_drawn_at_the_edge_with_its_value():
    [axes] = front_figure(fake_summary()).axes
    assert axes.get_ylim()[0] > 0.8
    assert "48.4 %" in {text.get_text() for text in axes.texts}


def test_the_axis_follows_the_cost_asked_for():
    summary = fake_summary()
    [axes] = front_figure(summary, "macs").axes
    assert axes.get_xlabel() == "macs"
    marked = {float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    assert 66_000.0 in marked


def test_sizes_are_drawn_early_and_late_with_their_agreement():
    watched = fake_summary().watched
    left, middle, right = sizes_figure(watched).axes
    early, late = left.lines
    third = len(watched) // 3
    assert list(early.get_ydata()) == [s["loss"] for r in watched[:third] for s in r["sizes"]]
    assert list(late.get_xdata()) == [s["cost"] for r in watched[-third:] for s in r["sizes"]]
    assert list(middle.lines[1].get_ydata())[:1] == [watched[-third]["sizes"][0]["norm"]]
    means = right.lines[1].get_ydata()
    np.testing.assert_allclose(means[0], np.mean([c for *_, c in watched[0]["cosines"]]))


def test_a_run_without_a_search_and_without_curves_can_be_drawn():
    summary = dataclasses.replace(fake_summary(), points=(), losses={}, validation={})
    assert front_figure(summary).axes
    assert curves_figure({}, title="nothing", label="loss").axes
