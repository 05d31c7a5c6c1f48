"""Truths about the problems that searches are measured on."""

from __future__ import annotations

import numpy as np

from benchmarks import _analytic, _ofa_mbv3


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


def test_the_analytic_accuracy_is_the_function_that_was_committed() -> None:
    assert _analytic.digest() == "b64cddc18a06"
    assert _analytic.digest(_analytic.VARIANT) != _analytic.digest()
