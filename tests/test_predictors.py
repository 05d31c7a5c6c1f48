"""Truths about predictors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, DotProduct
from sklearn.linear_model import BayesianRidge
from sklearn.linear_model import Ridge as RidgeRegressor
from sklearn.svm import SVR

from supple.errors import SettingError
from supple.predictors import (
    MLP,
    PREDICTORS,
    Fitted,
    GaussianProcess,
    GradientBoosting,
    Predictor,
    PretrainedMLP,
    Ridge,
    RidgeSVR,
    SupportVectors,
    _Networks,
    _parts,
    _Pretrained,
    out_of_fold,
    predictor,
    rank_correlation,
)
from supple.space import Site, Space

BLOCKS = 4
SPACE = Space(
    [
        site
        for i in range(BLOCKS)
        for site in (
            Site(f"{i}.depth", "depth", (0, 1), 1),
            Site(f"{i}.width", "width", (1, 2, 3), 3, ((f"{i}.depth", frozenset({1})),)),
        )
    ]
)
FAST = [
    Ridge(),
    SupportVectors(),
    RidgeSVR(),
    GradientBoosting(trees=20),
    MLP(members=2),
    PretrainedMLP(members=2),
    GaussianProcess(),
]
names = [type(one).__name__ for one in FAST]


def additive(rows: np.ndarray) -> np.ndarray:
    """A number per choice, added; a width that does not exist gives nothing."""
    worth = np.random.default_rng(3).normal(size=len(SPACE.one_hot(SPACE.every()[:1])[0]))
    found: np.ndarray = 50 + SPACE.one_hot(rows) @ worth
    return found


def waves(rows: np.ndarray) -> np.ndarray:
    """No sum of numbers: whether the widths add up to something odd."""
    widths = (SPACE.choices_of(rows) * SPACE.present(rows))[:, 1::2].sum(axis=1)
    found: np.ndarray = 30 + 5.0 * np.cos(np.pi * widths / 3)
    return found


def pairs(rows: np.ndarray) -> np.ndarray:
    """No sum of numbers either, but smooth: how much widths of neighbours agree."""
    widths = (SPACE.choices_of(rows) * SPACE.present(rows))[:, 1::2] - 1.5
    found: np.ndarray = 30 + (widths[:, 1:] * widths[:, :-1]).sum(axis=1)
    return found


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.unique(SPACE.random_many(count, seed), axis=0)


def test_a_ridge_as_a_look_up_predicts_what_the_regressor_predicts() -> None:
    rows, others = drawn(40), drawn(60, 1)
    values = waves(rows)
    plain = RidgeRegressor(alpha=0.5).fit(SPACE.one_hot(rows), values)
    fitted = Ridge(alphas=(0.5,)).fit(SPACE, rows, values)
    np.testing.assert_allclose(
        fitted.predict(others), plain.predict(SPACE.one_hot(others)), rtol=1e-10
    )


def test_support_vectors_as_a_product_predict_what_the_machine_predicts() -> None:
    rows, others = drawn(40), drawn(60, 1)
    values = waves(rows)  # between 25 and 35: the scale is one
    plain = SVR(kernel="rbf", gamma="auto", epsilon=0.0, C=5.0)
    plain.fit(SPACE.one_hot(rows), values)
    fitted = SupportVectors(costs=(5.0,)).fit(SPACE, rows, values)
    np.testing.assert_allclose(
        fitted.predict(others), plain.predict(SPACE.one_hot(others)), rtol=1e-9
    )


def test_what_the_values_are_measured_in_does_not_matter_to_support_vectors() -> None:
    rows, others = drawn(40), drawn(60, 1)
    large = SupportVectors().fit(SPACE, rows, 1e6 * waves(rows)).predict(others)
    small = SupportVectors().fit(SPACE, rows, waves(rows)).predict(others)
    np.testing.assert_allclose(large, 1e6 * small, rtol=1e-6)


@pytest.mark.parametrize("method", FAST, ids=names)
def test_configs_are_ordered_that_were_never_seen(method: Predictor) -> None:
    rows, others = drawn(80), drawn(200, 1)
    fitted = method.fit(SPACE, rows, additive(rows))
    assert kendalltau(fitted.predict(others), additive(others)).statistic > 0.6


@pytest.mark.parametrize("method", FAST, ids=names)
def test_the_same_configs_give_the_same_predictions_as_configs_or_rows(
    method: Predictor,
) -> None:
    rows, others = drawn(30), drawn(20, 1)
    values = waves(rows)
    first = method.fit(SPACE, rows, values).predict(others)
    again = method.fit(SPACE, SPACE.decode_many(rows), values.tolist())
    np.testing.assert_array_equal(first, again.predict(SPACE.decode_many(others)))
    assert again.predict(others[:0]).shape == (0,)


def test_a_site_that_does_not_exist_has_no_part_in_a_prediction() -> None:
    rows = drawn(40)
    skipped = SPACE.encode_many([{f"{i}.depth": 0 for i in range(BLOCKS)}])
    other = skipped.copy()
    other[:, 1::2] = 0  # widths of blocks that are skipped
    for method in FAST:
        fitted = method.fit(SPACE, rows, waves(rows))
        assert fitted.predict(skipped) == fitted.predict(other)


def test_the_better_of_ridge_and_support_vectors_is_taken() -> None:
    rows, others = drawn(120), drawn(100, 1)
    for truth, method in ((additive, Ridge()), (pairs, SupportVectors())):
        both = RidgeSVR().fit(SPACE, rows, truth(rows)).predict(others)
        one = method.fit(SPACE, rows, truth(rows)).predict(others)
        np.testing.assert_array_equal(both, one)


def test_the_strength_with_the_least_percentage_error_is_taken() -> None:
    # Additive without noise: the weakest punishment; noise alone: the strongest.
    rows = drawn(60)
    noise = 50 + np.random.default_rng(1).normal(size=len(rows))
    for values, best in ((additive(rows), 1e-6), (noise, 1e3)):
        chosen = Ridge(alphas=(1e3, 1e-6)).fit(SPACE, rows, values).predict(rows)
        alone = Ridge(alphas=(best,)).fit(SPACE, rows, values).predict(rows)
        np.testing.assert_array_equal(chosen, alone)


def test_the_uncertainty_of_a_ridge_is_that_of_the_bayesian_linear_model() -> None:
    rows, others = drawn(60), drawn(40, 1)
    values = additive(rows) + np.random.default_rng(2).normal(size=len(rows))
    features = SPACE.one_hot(rows)
    model = BayesianRidge(tol=1e-10, max_iter=2000).fit(features, values)
    # Its strength is the ratio of the two precisions; its mean has no uncertainty there.
    strength = model.lambda_ / model.alpha_
    fitted = Ridge(alphas=(strength,)).fit(SPACE, rows, values)
    _, expected = model.predict(SPACE.one_hot(others), return_std=True)
    got = fitted.uncertainty(others)
    assert got is not None
    np.testing.assert_allclose(got, expected, rtol=0.05)


def test_a_gaussian_process_predicts_what_scikit_learns_does() -> None:
    rows = SPACE.every()[::3]
    values = pairs(rows)
    one = GaussianProcess(widths=(0.6,), weights=(0.5,), noises=(0.1,))
    fitted = one.fit(SPACE, rows, values)
    features = SPACE.one_hot(rows) / np.sqrt(len(SPACE.sites))
    centre = features.mean(axis=0)
    # Scikit-learn's linear kernel is not centred; the Gaussian does not mind a shift.
    kernel = 3.0 * DotProduct(1e-9) + 0.5 * RBF(0.6 * np.sqrt(2.0))
    other = GaussianProcessRegressor(kernel, alpha=0.1, optimizer=None)
    other.fit(features - centre, values - values.mean())
    asked = SPACE.every()
    unseen = SPACE.one_hot(asked) / np.sqrt(len(SPACE.sites)) - centre
    mean, spread = other.predict(unseen, return_std=True)
    np.testing.assert_allclose(fitted.predict(asked), mean + values.mean(), rtol=1e-8)
    told = fitted.uncertainty(asked)
    assert told is not None
    known = values - values.mean()
    scale = np.sqrt(known @ other.alpha_ / len(values))
    np.testing.assert_allclose(told, scale * spread, rtol=1e-6)


def test_the_likeliest_width_of_the_gaussian_is_taken() -> None:
    rows = SPACE.every()[::2]
    rough, smooth = GaussianProcess(), GaussianProcess(widths=(1.0,), weights=(0.02,))
    unseen = SPACE.every()[1::2]
    off = [
        np.abs(one.fit(SPACE, rows, pairs(rows)).predict(unseen) - pairs(unseen)).mean()
        for one in (rough, smooth)
    ]
    assert off[0] < 0.5 * off[1]


def test_nets_disagree_more_about_what_is_far_from_what_they_saw() -> None:
    near = drawn(400)
    near = near[near[:, 0] == 0]  # the first block is always skipped
    fitted = MLP(members=4).fit(SPACE, near, additive(near))
    far = near.copy()
    far[:, 0] = 1
    spread, more = fitted.uncertainty(near), fitted.uncertainty(SPACE.canonical_many(far))
    assert spread is not None
    assert more is not None
    assert more.mean() > 2 * spread.mean()


def test_a_regressor_without_uncertainty_gives_none() -> None:
    rows = drawn(30)
    for method in (SupportVectors(), GradientBoosting(trees=3), MLP(members=1)):
        assert method.fit(SPACE, rows, waves(rows)).uncertainty(rows) is None


def test_held_out_configs_are_predicted_by_a_fit_that_has_not_seen_them() -> None:
    rows = drawn(23)
    values = waves(rows)
    predicted = out_of_fold(Ridge(), SPACE, rows, values)
    held = np.arange(len(rows)) % 5 == 2
    alone = Ridge().fit(SPACE, rows[~held], values[~held]).predict(rows[held])
    np.testing.assert_array_equal(predicted[held], alone)


def test_rank_correlation_of_an_order_of_noise_and_of_few_configs() -> None:
    rows = drawn(60)
    assert rank_correlation(Ridge(), SPACE, rows, additive(rows)) > 0.8
    noise = np.random.default_rng(0).normal(size=len(rows))
    assert abs(rank_correlation(Ridge(), SPACE, rows, noise)) < 0.3
    assert -1 <= rank_correlation(Ridge(), SPACE, rows[:3], additive(rows[:3])) <= 1


def test_rank_correlation_is_kendalls_tau_b_also_with_ties() -> None:
    rows = drawn(60)
    values = np.round(waves(rows))
    predicted = out_of_fold(Ridge(), SPACE, rows, values)
    expected = kendalltau(predicted, values).statistic
    assert rank_correlation(Ridge(), SPACE, rows, values) == pytest.approx(expected)
    assert np.isnan(rank_correlation(Ridge(), SPACE, rows, np.ones(len(rows))))


def test_values_that_are_all_alike_or_zero_are_predicted_as_they_are() -> None:
    rows = drawn(12)
    for value in (0.0, -3.0):
        for method in FAST:
            fitted = method.fit(SPACE, rows, np.full(len(rows), value))
            np.testing.assert_allclose(fitted.predict(rows), value, atol=1e-3)


def test_what_a_predictor_cannot_learn_from_is_refused() -> None:
    rows = drawn(10)
    with pytest.raises(SettingError, match="at least two"):
        Ridge().fit(SPACE, rows[:1], [1.0])
    with pytest.raises(SettingError, match=r"shape \(3,\)"):
        Ridge().fit(SPACE, rows, [1.0, 2.0, 3.0])
    with pytest.raises(SettingError, match="not finite"):
        Ridge().fit(SPACE, rows, [np.nan] * len(rows))
    with pytest.raises(SettingError, match="at least 3"):
        rank_correlation(Ridge(), SPACE, rows[:2], [1.0, 2.0])


def test_predictors_have_names() -> None:
    assert predictor("ridge-svr") == RidgeSVR()
    assert all(predictor(name) is one for name, one in PREDICTORS.items())
    with pytest.raises(SettingError, match="did you mean 'ridge-svr'"):
        predictor("ridge-svm")


# ------------------------------------------------------------------ what a net knew before

NETWORK = [Site(f"s{i}", "width", (1, 2, 3, 4), 4) for i in range(5)]
RECIPES = Space([*NETWORK, Site("lr", "recipe", (1, 10, 100), 10)])
WORTH = np.array([1.0, 2.0, 4.0, 8.0, 16.0])


def macs(rows: np.ndarray) -> np.ndarray:
    """What a network costs; its recipe costs nothing."""
    found: np.ndarray = (1 + rows[:, :5]) @ WORTH
    return found


def score(rows: np.ndarray) -> np.ndarray:
    """Falls off with the size, and with the distance of the recipe from the middle."""
    found: np.ndarray = np.sqrt(macs(rows)) - 2 * np.abs(rows[:, 5] - 1)
    return found


def tau_of(fitted: Fitted, rows: np.ndarray) -> float:
    return float(kendalltau(fitted.predict(rows), score(rows)).statistic)


def test_an_encoder_that_learned_costs_needs_fewer_values() -> None:
    method = PretrainedMLP(members=1, steps=100)
    free, known, others = (RECIPES.random_many(n, n) for n in (150, 12, 200))
    pretrained = method.pretrain(RECIPES, free, macs(free)[:, None])
    with_it = tau_of(pretrained.fit(RECIPES, known, score(known)), others)
    without = tau_of(method.fit(RECIPES, known, score(known)), others)
    assert with_it > without + 0.1


def test_a_recipe_goes_round_the_encoder() -> None:
    method = PretrainedMLP(members=1, frozen=3, joint=0)
    rows = RECIPES.random_many(20, 0)
    fitted = method.fit(RECIPES, rows, score(rows))
    assert isinstance(fitted, _Networks)
    first, head = fitted._weights[0], fitted._weights[4]
    assert first.shape == (1, 20, method.hidden)  # five sites of four choices
    assert head.shape == (1, method.embedding + 3, method.hidden)
    network, recipe = _parts(RECIPES, RECIPES.one_hot(rows))
    assert recipe.argmax(1).tolist() == rows[:, 5].tolist()
    assert network.shape == (20, 20)


def test_the_encoder_is_frozen_first_and_stays_near_where_it_was() -> None:
    free, rows = RECIPES.random_many(100, 1), RECIPES.random_many(20, 0)

    method = PretrainedMLP(members=1, steps=20, frozen=5, joint=0)
    pretrained = method.pretrain(RECIPES, free, macs(free)[:, None])
    assert isinstance(pretrained, _Pretrained)

    def way(**settings: float) -> float:
        learns = _Pretrained(replace(method, **settings), RECIPES, pretrained._encoder)
        fitted = learns.fit(RECIPES, rows, score(rows))
        assert isinstance(fitted, _Networks)
        pairs = zip(fitted._weights[:4], pretrained._encoder, strict=True)
        return sum(float((now - then).square().sum()) for now, then in pairs)

    assert way() == 0
    assert way(joint=20) > 0.1
    assert way(joint=20, penalty=30.0) < 1e-6  # drawn to where it was, not to zero


def test_huber_s_loss_does_not_follow_an_outlier() -> None:
    method = PretrainedMLP(members=1)
    found, targets = (
        torch.zeros(1, 4, 1).double(),
        torch.tensor([[0.5], [1], [2], [5]]).double(),
    )
    # Half the square up to 1, then the distance less a half.
    expected = (0.125 + 0.5 + 1.5 + 4.5) / 4
    weights = [torch.full((1, 2, 2), 3.0).double()]
    loss = method._loss(found, targets, weights).item()
    assert loss == pytest.approx(expected + method.penalty * 36 / 8)


def test_what_an_encoder_cannot_learn_from_is_refused() -> None:
    rows = RECIPES.random_many(5, 0)
    method = PretrainedMLP()
    with pytest.raises(SettingError, match=r"5 configs and statistics of shape \(5,\)"):
        method.pretrain(RECIPES, rows, macs(rows))
    with pytest.raises(SettingError, match="must be finite, and one at least must differ"):
        method.pretrain(RECIPES, rows, np.ones((5, 2)))
    pretrained = PretrainedMLP(steps=1).pretrain(RECIPES, rows, macs(rows)[:, None])
    with pytest.raises(SettingError, match="was pretrained for"):
        pretrained.fit(SPACE, drawn(5), np.ones(len(drawn(5))))
    for wrong in ({"hidden": 0}, {"members": 0}, {"joint": -1}, {"penalty": -1.0}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            PretrainedMLP(**wrong)  # type: ignore[arg-type]
