"""Truths about the problems that searches are measured on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import _analytic, _ofa_mbv3
from benchmarks.search import CORNER, RESULT, quartiles, volume, volumes
from supple.files import read_json
from supple.study.indicators import hypervolume


def test_costs_of_two_sizes_by_the_authors_count() -> None:
    # Two rows as recorded by DyNAS-T: depths, kernels, expansions, multiply-accumulates.
    space = _ofa_mbv3.space()
    depths, kernels, widths = _ofa_mbv3.columns()
    row = np.zeros((1, 45), dtype=np.int64)
    row[0, depths] = np.array([2, 3, 2, 4, 3]) - 2
    ks = [5, 7, 5, 5, 3, 3, 3, 7, 5, 5, 3, 7, 7, 3, 3, 3, 5, 5, 5, 5]
    es = [4, 3, 4, 4, 4, 6, 3, 4, 4, 3, 4, 3, 3, 6, 6, 6, 4, 3, 4, 4]
    row[0, kernels.ravel()] = (np.array(ks) - 3) // 2
    row[0, widths.ravel()] = np.searchsorted([3, 4, 6], es)
    assert _ofa_mbv3.macs(space.canonical_many(row)).tolist() == [255502624]


def test_what_belongs_to_an_absent_block_costs_nothing() -> None:
    space = _ofa_mbv3.space()
    drawn = np.random.default_rng(0).integers(3, size=(50, 45))
    canonical = space.canonical_many(drawn)
    assert (drawn != canonical).any()
    assert (_ofa_mbv3.macs(drawn) == _ofa_mbv3.macs(canonical)).all()


def test_the_closed_form_is_the_recorded_column_and_every_config_is_there_once() -> None:
    parts = [_ofa_mbv3.recorded(search) for search in _ofa_mbv3.FILES]
    assert [len(part.rows) for part in parts] == [364, 540, 554]
    assert all((_ofa_mbv3.macs(part.rows) == part.macs).all() for part in parts)
    whole = _ofa_mbv3.together(*_ofa_mbv3.FILES)
    assert len(np.unique(whole.rows, axis=0)) == len(whole.rows) == 1357
    row = parts[2].rows[5]
    same = [part.accuracy[(part.rows == row).all(axis=1)] for part in parts]
    mean = whole.accuracy[(whole.rows == row).all(axis=1)]
    assert mean == pytest.approx([np.concatenate(same).mean()])


def test_the_product_of_matrices_says_what_the_support_vectors_say() -> None:
    known = _ofa_mbv3.together("ga")
    features = _ofa_mbv3.space().one_hot(known.rows)
    model = _ofa_mbv3._regressor("kernel").fit(features, known.accuracy)
    rows = _ofa_mbv3.space().random_many(30, 0)
    expected = model.predict(_ofa_mbv3.space().one_hot(rows))
    np.testing.assert_allclose(_ofa_mbv3._machine(model)(rows), expected, rtol=1e-10)


@pytest.mark.slow
def test_surrogates_are_those_of_the_published_figures() -> None:
    found = read_json(RESULT)["surrogates"]
    assert {name: row["digest"] for name, row in found.items()} == {
        name: _ofa_mbv3.digest(name) for name in _ofa_mbv3.FAMILIES
    }


def test_the_analytic_accuracy_is_the_function_that_was_committed() -> None:
    assert _analytic.digest() == "b64cddc18a06"
    assert _analytic.digest(_analytic.VARIANT) != _analytic.digest()


def test_the_volume_after_each_evaluation_is_that_of_all_so_far() -> None:
    random = np.random.default_rng(0)
    values = random.uniform((20, 1e8), (33, 7e8), size=(60, 2))
    values[7] = values[3]
    found = volumes(values)
    for count in (1, 5, 20, 60):
        expected = hypervolume(values[:count], CORNER)
        assert found[count - 1] == pytest.approx(expected)
        assert volume(values[:count]) == pytest.approx(expected)


def test_what_was_never_reached_counts_as_the_last() -> None:
    assert quartiles([30, np.inf, 10, 20]) == [10, 20, 30]
    assert quartiles([np.inf, np.inf, np.inf, 20, 30]) == [30, np.inf, np.inf]
