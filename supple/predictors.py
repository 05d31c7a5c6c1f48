"""Predictors: regressors that guess a value of a config from the values of others.

A `Predictor` is a value that holds settings; `fit` gives a `Fitted`, which predicts any number
of configs at once. A config is seen as its one-hot encoding: a column for each choice of each
site, zeros throughout at a site that does not exist (`Space.one_hot`). Everything is
deterministic: the same configs in the same order give the same predictions.

`rank_correlation` says how well a predictor orders configs that it has not seen.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn import svm
from sklearn.base import clone
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge as RidgeRegressor
from sklearn.neural_network import MLPRegressor
from torch import Tensor
from torch.nn import functional as F

from supple.errors import SettingError, nearest
from supple.space import Config, Space

__all__ = [
    "MLP",
    "PREDICTORS",
    "Fitted",
    "GaussianProcess",
    "GradientBoosting",
    "Predictor",
    "PretrainedMLP",
    "Ridge",
    "RidgeSVR",
    "SupportVectors",
    "out_of_fold",
    "predictor",
    "rank_correlation",
]

FloatArray = NDArray[np.float64]
Rows = NDArray[Any] | Sequence[Config]

_ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_COSTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_FOLDS = 5
_CHUNK = 4096
_LEAST_SHARE = 1e-3
_RECIPE = "recipe"
"""Axis of the sites that say how a config is trained, not what network it is."""


class Predictor(ABC):
    """Learns to predict one number from a config."""

    def fit(self, space: Space, rows: Rows, values: Sequence[float] | FloatArray) -> Fitted:
        """Learns from configs whose values are known.

        Args:
            space: The space of the configs.
            rows: Configs, or encoded configs of shape (configs, sites), at least two.
            values: One finite number each, shape (configs,).

        Returns:
            What predicts the value of any config of the space.

        Raises:
            SettingError: The numbers of configs and values differ, there are fewer than two,
                or a value is not finite.
        """
        encoded = _encoded(space, rows)
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.shape != (len(encoded),) or len(encoded) < 2:
            raise SettingError(
                f"a predictor learns from at least two configs with one value each, got "
                f"{len(encoded)} configs and values of shape {numbers.shape}"
            )
        if not np.isfinite(numbers).all():
            raise SettingError("a predictor can't learn from values that are not finite")
        return self._fitted(space, space.one_hot(encoded), numbers)

    @abstractmethod
    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        """Learns from one-hot features, shape (configs, choices of all sites)."""


class Fitted(ABC):
    """A predictor that has learned.

    Args:
        space: The space of the configs it predicts.
    """

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def predict(self, rows: Rows) -> FloatArray:
        """Predicts values.

        Args:
            rows: Configs, or encoded configs of shape (configs, sites).

        Returns:
            Shape (configs,).

        Raises:
            SettingError: A config is not of the space.
        """

    def uncertainty(self, rows: Rows) -> FloatArray | None:
        """Says how far off each prediction may be.

        Args:
            rows: Configs, or encoded configs of shape (configs, sites).

        Returns:
            Standard deviations, shape (configs,), in the unit of the values: of a ridge those
            of the Bayesian linear model whose mean it is, of a Gaussian process its own
            without the noise, of an MLP the spread between nets that started from other
            weights. None where the regressor gives none.
        """
        return None


# ------------------------------------------------------------------- ridge, support vectors


@dataclass(frozen=True, kw_only=True)
class Ridge(Predictor):
    """A number per choice, added up; what is large is punished.

    Args:
        alphas: Strengths of the punishment to choose from, above 0.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site(name, "width", (1, 2, 3), 3) for name in "ab"])
        >>> known = space.every()[[0, 1, 2, 3, 6]]
        >>> fitted = Ridge(alphas=(1e-6,)).fit(space, known, 10.0 + known @ [3, 1])
        >>> fitted.predict([space.config(a=3, b=3)]).round(3).tolist()
        [18.0]
    """

    alphas: tuple[float, ...] = _ALPHAS

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        return _best(space, [RidgeRegressor(alpha=a) for a in self.alphas], features, values)


@dataclass(frozen=True, kw_only=True)
class SupportVectors(Predictor):
    """Support vector regression with a Gaussian kernel, its width one over the features.

    Args:
        costs: Weights of the errors to choose from, above 0, at values between 10 and 100.
    """

    costs: tuple[float, ...] = _COSTS

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        return _best(space, [_machine(cost) for cost in self.costs], features, values)


@dataclass(frozen=True, kw_only=True)
class RidgeSVR(Predictor):
    """Ridge or support vectors, whichever has the smaller error on configs it has not seen.

    Error is the mean absolute percentage error in cross-validation over every fifth config;
    a value below a thousandth of the largest counts as that much in the denominator.

    Args:
        alphas: Strengths of the ridge to choose from, above 0.
        costs: Weights of the errors of support vectors to choose from, above 0.

    Source:
        The predictor of LINAS: Sarah et al. 2022, arXiv:2202.12954, and the authors' code
        IntelLabs/DyNAS-T, `dynast/predictors/dynamic_predictor.py`.
    Differs:
        Seven strengths each between the authors' bounds, where they try 100 in even steps;
        folds are every fifth config and not blocks, which in a search are of one generation.
    """

    alphas: tuple[float, ...] = _ALPHAS
    costs: tuple[float, ...] = _COSTS

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        ridges = [RidgeRegressor(alpha=alpha) for alpha in self.alphas]
        machines = [_machine(cost) for cost in self.costs]
        return _best(space, [*ridges, *machines], features, values)


def _machine(cost: float) -> Any:
    # The bound on iterations is the authors'; without errors to ignore, ends can be far off.
    return svm.SVR(kernel="rbf", gamma="auto", epsilon=0.0, C=cost, max_iter=1_000_000)


def _best(
    space: Space, regressors: Sequence[Any], features: FloatArray, values: FloatArray
) -> Fitted:
    """Fits the regressor with the smallest percentage error in cross-validation."""
    scale = _scale(values)
    scaled = values / scale
    chosen = regressors[0]
    if len(regressors) > 1:
        # The values were checked; checking them again would take longer than the small fits.
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            errors = [_percentage_error(one, features, scaled) for one in regressors]
        chosen = regressors[int(np.argmin(errors))]
    chosen.fit(features, scaled)
    if isinstance(chosen, RidgeRegressor):
        return _Tables(space, chosen, features, scaled, scale)
    return _Kernels(space, chosen, scale)


def _scale(values: FloatArray) -> float:
    """Gives the power of ten that brings the largest value between 10 and 100.

    The costs of support vectors are weights of errors of that size.
    """
    largest = float(np.abs(values).max())
    return 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0


def _percentage_error(regressor: Any, features: FloatArray, values: FloatArray) -> float:
    sizes = np.abs(values)
    off = np.zeros(len(values))
    for held in _folds(len(values)):
        fitted = clone(regressor).fit(features[~held], values[~held])
        off[held] = np.abs(fitted.predict(features[held]) - values[held])
    least = _LEAST_SHARE * float(sizes.max()) or 1.0
    return float((off / np.maximum(sizes, least)).mean())


class _Tables(Fitted):
    """A ridge as a look-up: one number per choice, added over the sites that exist."""

    def __init__(
        self,
        space: Space,
        ridge: Any,
        features: FloatArray,
        values: FloatArray,
        scale: float,
    ) -> None:
        super().__init__(space)
        self._numbers: FloatArray = ridge.coef_ * scale
        self._constant = float(ridge.intercept_) * scale
        self._mean: FloatArray = features.mean(axis=0)
        self._centred = features - self._mean
        self._alpha = float(ridge.alpha)
        self._residuals: FloatArray = (values - ridge.predict(features)) * scale
        ends = np.cumsum(space.counts)
        self._offsets = ends - space.counts

    def predict(self, rows: Rows) -> FloatArray:
        encoded = _encoded(self.space, rows)
        parts = [
            self._predict(encoded[start : start + _CHUNK])
            for start in range(0, len(encoded), _CHUNK)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _predict(self, encoded: NDArray[Any]) -> FloatArray:
        here = self.space.present(encoded)
        total: FloatArray = np.where(here, self._numbers[encoded + self._offsets], 0.0).sum(1)
        return total + self._constant

    def uncertainty(self, rows: Rows) -> FloatArray:
        covariance, variance = self._posterior
        centred = self.space.one_hot(_encoded(self.space, rows)) - self._mean
        leverage = np.einsum("ij,jk,ik->i", centred, covariance, centred, optimize=True)
        spread: FloatArray = np.sqrt(variance * (1 + 1 / len(self._residuals) + leverage))
        return spread

    @cached_property
    def _posterior(self) -> tuple[FloatArray, float]:
        """The covariance of the numbers, over the noise's variance, and that variance."""
        gram = self._centred.T @ self._centred
        covariance = np.linalg.inv(gram + self._alpha * np.eye(len(gram)))
        free = len(self._residuals) - 1 - float((gram * covariance).sum())
        return covariance, float(self._residuals @ self._residuals) / max(free, 1.0)


class _Kernels(Fitted):
    """Support vectors, evaluated with matrix products (libsvm goes one by one)."""

    def __init__(self, space: Space, machine: Any, scale: float) -> None:
        super().__init__(space)
        self._vectors: FloatArray = machine.support_vectors_
        self._squares = (self._vectors**2).sum(axis=1)
        self._weights: FloatArray = machine.dual_coef_[0] * scale
        self._constant = float(machine.intercept_[0]) * scale
        self._gamma = 1.0 / self._vectors.shape[1]

    def predict(self, rows: Rows) -> FloatArray:
        return _in_chunks(self.space, rows, self._predict)

    def _predict(self, features: FloatArray) -> FloatArray:
        squares = (features**2).sum(axis=1)[:, None] + self._squares
        near = np.exp(-self._gamma * (squares - 2 * features @ self._vectors.T))
        predicted: FloatArray = near @ self._weights + self._constant
        return predicted


# --------------------------------------------------------------------------- trees and nets


@dataclass(frozen=True, kw_only=True)
class GradientBoosting(Predictor):
    """Many small trees, each fitted to what those before it left.

    Args:
        trees: How many, at least 1.
        rate: What each adds, in (0, 1].
        depth: Of each tree, at least 1: how many sites it can see at once.
    """

    trees: int = 200
    rate: float = 0.05
    depth: int = 3

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        model = GradientBoostingRegressor(
            n_estimators=self.trees,
            learning_rate=self.rate,
            max_depth=self.depth,
            subsample=0.8,
            random_state=0,
        )
        return _Ensemble(space, [model.fit(features, values)], 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class MLP(Predictor):
    """The mean of several small neural networks that started from other weights.

    Args:
        hidden: Widths of the hidden layers.
        penalty: Weight of the squared weights in the loss, at least 0.
        members: How many networks, at least 1; one gives no uncertainty.
    """

    hidden: tuple[int, ...] = (32, 32)
    penalty: float = 0.1
    members: int = 4

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        mean, scale = float(values.mean()), float(values.std()) or 1.0
        nets = [
            MLPRegressor(
                hidden_layer_sizes=self.hidden,
                solver="lbfgs",
                alpha=self.penalty,
                random_state=seed,
            )
            for seed in range(self.members)
        ]
        with warnings.catch_warnings():
            # The bound on iterations is meant: it regularises.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = [net.fit(features, (values - mean) / scale) for net in nets]
        return _Ensemble(space, fitted, mean, scale)


class _Ensemble(Fitted):
    """The mean of some regressors; their spread is the uncertainty."""

    def __init__(self, space: Space, models: Sequence[Any], mean: float, scale: float) -> None:
        super().__init__(space)
        self._models, self._mean, self._scale = models, mean, scale

    def predict(self, rows: Rows) -> FloatArray:
        return _in_chunks(self.space, rows, lambda found: self._each(found).mean(axis=0))

    def uncertainty(self, rows: Rows) -> FloatArray | None:
        if len(self._models) < 2:
            return None
        return _in_chunks(self.space, rows, lambda found: self._each(found).std(axis=0, ddof=1))

    def _each(self, features: FloatArray) -> FloatArray:
        predicted = np.stack([model.predict(features) for model in self._models])
        return self._mean + self._scale * predicted


# ---------------------------------------------------------- a net that knew something before


@dataclass(frozen=True, kw_only=True)
class PretrainedMLP(Predictor):
    """A small neural network whose first half can learn from what costs nothing to know.

    The *encoder* (one hidden layer) makes an embedding of the network that a config stands
    for; the *head* (one hidden layer) predicts from the embedding, and from the sites of the
    axis `"recipe"`: how a network is trained is none of the encoder's business. `pretrain`
    teaches the encoder with costs of configs that nobody evaluated. Fitting begins with the
    encoder frozen; then both learn together, with the encoder drawn to where it was. The loss
    is Huber's, which outliers move less; the optimizer is L-BFGS.

    Args:
        hidden: Width of the hidden layer of the encoder, and of that of the head.
        embedding: Width of the embedding.
        penalty: Weight of the squared weights, and of the squared way of the encoder from
            where it was, in the loss.
        steps: Iterations of pretraining.
        frozen: Iterations in which the head learns alone.
        joint: Iterations in which both learn.
        members: How many networks, whose mean counts; one gives no uncertainty.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site(name, "width", (1, 2, 3), 3) for name in "abcd"])
        >>> rows = space.every()
        >>> macs = (1.0 + rows).prod(axis=1)
        >>> score = np.sqrt(macs)
        >>> method = PretrainedMLP()
        >>> pretrained = method.pretrain(space, rows, macs[:, None])
        >>> for one in (method, pretrained):
        ...     predicted = one.fit(space, rows[::9], score[::9]).predict(rows)
        ...     print(np.corrcoef(predicted, score)[0, 1].round(1))
        0.5
        0.9

    Source:
        Dai et al. 2021, "FBNetV3: Joint Architecture-Recipe Search using Predictor
        Pretraining", CVPR, arXiv:2006.02049; its predictor was not released.
    Differs:
        Every site is one-hot, where the authors scale numbers into [0, 1]. L-BFGS replaces
        stochastic steps, and being drawn back replaces a smaller learning rate. Sizes are ours.
    """

    hidden: int = 32
    embedding: int = 24
    penalty: float = 0.1
    steps: int = 100
    frozen: int = 50
    joint: int = 50
    members: int = 3

    def __post_init__(self) -> None:
        for name in ("hidden", "embedding", "steps", "frozen", "joint", "members"):
            least = 0 if name == "joint" else 1
            if getattr(self, name) < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not self.penalty >= 0:
            raise SettingError(f"penalty must be at least 0, got {self.penalty}")

    def pretrain(self, space: Space, rows: Rows, statistics: FloatArray) -> Predictor:
        """Teaches the encoder what can be computed of configs.

        Args:
            space: The space of the configs.
            rows: Configs, or encoded configs of shape (configs, sites), at least two.
            statistics: What is known of each, such as its costs, shape (configs, statistics).
                Each counts alike, whatever its unit.

        Returns:
            A predictor for this space that begins with this encoder.

        Raises:
            SettingError: The numbers of configs and statistics differ, there are fewer than
                two, none differs between configs, or one is not finite.
        """
        encoded = _encoded(space, rows)
        known = np.asarray(statistics, dtype=np.float64)
        if known.ndim != 2 or len(known) != len(encoded) or len(known) < 2:
            raise SettingError(
                f"an encoder learns from at least two configs with a row of statistics each, "
                f"got {len(encoded)} configs and statistics of shape {known.shape}"
            )
        if not np.isfinite(known).all() or not np.ptp(known, axis=0).any():
            raise SettingError(
                "statistics must be finite, and one at least must differ between configs"
            )
        known = known[:, np.ptp(known, axis=0) > 0]
        targets = torch.from_numpy((known - known.mean(axis=0)) / known.std(axis=0))
        features = torch.from_numpy(space.one_hot(encoded)[:, ~_of_recipe(space)])
        encoder, proxy = self._encoder(space), self._layers(1, self.embedding, known.shape[1])

        def loss(weights: Weights) -> Tensor:
            found = _through(weights[_ENDS:], _embedded(weights[:_ENDS], features))
            return self._loss(found, targets, weights)

        return _Pretrained(self, space, _least(loss, encoder + proxy, self.steps)[:_ENDS])

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        return _Pretrained(self, space, self._encoder(space))._fitted(space, features, values)

    def _encoder(self, space: Space) -> Weights:
        return self._layers(0, int((~_of_recipe(space)).sum()), self.hidden, self.embedding)

    def _layers(self, seed: int, *widths: int) -> Weights:
        """Draws linear layers of all members as He et al. do; biases are zero."""
        random = np.random.default_rng(seed)
        weights = []
        for inputs, outputs in itertools.pairwise(widths):
            drawn = random.normal(size=(self.members, inputs, outputs))
            weights.append(torch.from_numpy(drawn * math.sqrt(2 / max(inputs, 1))))
            weights.append(torch.zeros(self.members, 1, outputs, dtype=torch.float64))
        return weights

    def _loss(self, found: Tensor, targets: Tensor, punished: Weights) -> Tensor:
        """Adds up the losses of the members."""
        off = F.huber_loss(found, targets.expand_as(found))
        squares = torch.stack([(each**2).sum() for each in punished]).sum()
        return self.members * off + self.penalty * squares / (2 * len(targets))


Weights = list[Tensor]
"""Matrices and biases of layers, shapes (members, in, out) and (members, 1, out)."""
_ENDS = 4
"""Where the weights of the encoder, which has two layers, end."""


class _Pretrained(Predictor):
    """A predictor that begins with a given encoder."""

    def __init__(self, method: PretrainedMLP, space: Space, encoder: Weights) -> None:
        self._method, self._space, self._encoder = method, space, encoder

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        if space.digest != self._space.digest:
            raise SettingError(
                f"this predictor was pretrained for {self._space!r}, not for {space!r}"
            )
        mean, scale = float(values.mean()), float(values.std()) or 1.0
        targets = torch.from_numpy((values - mean) / scale)[:, None]
        weights = self._learned(*_parts(space, features), targets)
        return _Networks(space, weights, mean, scale)

    def _learned(self, x: Tensor, genes: Tensor, targets: Tensor) -> Weights:
        """Trains the head under the frozen encoder, then both."""
        method, encoder = self._method, self._encoder
        head = method._layers(2, method.embedding + genes.shape[1], method.hidden, 1)
        embedded = _embedded(encoder, x)

        def alone(weights: Weights) -> Tensor:
            return method._loss(_valued(weights, embedded, genes), targets, weights)

        def together(weights: Weights) -> Tensor:
            found = _valued(weights[_ENDS:], _embedded(weights[:_ENDS], x), genes)
            ways = [now - then for now, then in zip(weights[:_ENDS], encoder, strict=True)]
            return method._loss(found, targets, ways + weights[_ENDS:])

        return _least(together, encoder + _least(alone, head, method.frozen), method.joint)


class _Networks(Fitted):
    """Encoders and heads that have learned."""

    def __init__(self, space: Space, weights: Weights, mean: float, scale: float) -> None:
        super().__init__(space)
        self._weights, self._mean, self._scale = weights, mean, scale

    def predict(self, rows: Rows) -> FloatArray:
        return _in_chunks(self.space, rows, lambda found: self._each(found).mean(axis=0))

    def uncertainty(self, rows: Rows) -> FloatArray | None:
        if len(self._weights[0]) < 2:
            return None
        return _in_chunks(self.space, rows, lambda found: self._each(found).std(axis=0, ddof=1))

    def _each(self, features: FloatArray) -> FloatArray:
        x, genes = _parts(self.space, features)
        found = _valued(self._weights[_ENDS:], _embedded(self._weights[:_ENDS], x), genes)
        values: FloatArray = self._mean + self._scale * found[:, :, 0].numpy()
        return values


def _of_recipe(space: Space) -> NDArray[np.bool_]:
    """Says which columns of the one-hot encoding tell of a recipe."""
    return np.repeat([site.axis == _RECIPE for site in space.sites], space.counts)


def _parts(space: Space, features: FloatArray) -> tuple[Tensor, Tensor]:
    """Takes one-hot features apart: of the network, of its recipe."""
    recipe = _of_recipe(space)
    return torch.from_numpy(features[:, ~recipe]), torch.from_numpy(features[:, recipe])


def _through(weights: Weights, x: Tensor) -> Tensor:
    """Applies linear layers with ReLU between them."""
    for place in range(0, len(weights), 2):
        x = (F.relu(x) if place else x) @ weights[place] + weights[place + 1]
    return x


def _embedded(weights: Weights, x: Tensor) -> Tensor:
    return F.relu(_through(weights, x))


def _valued(head: Weights, embedded: Tensor, genes: Tensor) -> Tensor:
    """Applies the head to embeddings, shape (members, configs, embedding)."""
    each = genes.expand(len(embedded), *genes.shape)
    return _through(head, torch.cat([embedded, each], dim=2))


def _least(loss: Callable[[Weights], Tensor], start: Weights, steps: int) -> Weights:
    """Moves weights towards the least loss, by L-BFGS in double precision."""
    sizes, shapes = [each.numel() for each in start], [each.shape for each in start]

    def unpacked(flat: Tensor) -> Weights:
        return [
            part.view(shape)
            for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)
        ]

    def both(flat: FloatArray) -> tuple[float, FloatArray]:
        leaf = torch.from_numpy(flat).requires_grad_()
        value = loss(unpacked(leaf))
        return value.item(), torch.autograd.grad(value, leaf)[0].numpy()

    flat = torch.cat([each.flatten() for each in start]).numpy()
    if steps:
        flat = minimize(both, flat, jac=True, method="L-BFGS-B", options={"maxiter": steps}).x
    return unpacked(torch.from_numpy(flat))


# ------------------------------------------------------------------------- Gaussian process


@dataclass(frozen=True, kw_only=True)
class GaussianProcess(Predictor):
    """A number per choice, added up, and a smooth function of all sites on top.

    The prior's covariance of two configs is that of a linear model plus a Gaussian of the
    share of sites in which they differ, plus noise. The width of the Gaussian, its weight and
    that of the noise are those that make the known values likeliest. Learning takes time by
    the cube of the number of configs: some milliseconds for 300, half a second for 1,000.

    Args:
        widths: Widths of the Gaussian to choose from, above 0.
        weights: Weights of the Gaussian to choose from, above 0, where the linear model has 3.
        noises: Weights of the noise to choose from, above 0.
    """

    widths: tuple[float, ...] = (0.3, 0.6, 1.0)
    weights: tuple[float, ...] = (0.02, 0.1, 0.5)
    noises: tuple[float, ...] = (1e-3, 1e-2, 1e-1)

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        scaled = (values - values.mean()) / (float(values.std()) or 1.0)
        best: tuple[float, _Covariance, float] | None = None
        for width, weight in itertools.product(self.widths, self.weights):
            covariance = _Covariance(features, len(space.sites), width, weight)
            known = covariance.between(features)
            for noise in self.noises:
                likely = _likelihood(known + noise * np.eye(len(known)), scaled)
                if best is None or likely > best[0]:
                    best = (likely, covariance, noise)
        assert best is not None
        return _Process(space, best[1], best[2], values)


class _Covariance:
    """What the values of configs have to do with those of the known ones."""

    _LINEAR = 3.0

    def __init__(self, known: FloatArray, sites: int, width: float, weight: float) -> None:
        self.known, self._mean = known, known.mean(axis=0)
        self._sites, self._width, self._weight = max(sites, 1), width, weight

    def between(self, features: FloatArray) -> FloatArray:
        """Gives the covariances with the known configs, shape (configs, known)."""
        squares = (features**2).sum(axis=1)[:, None] + (self.known**2).sum(axis=1)
        apart = np.maximum(squares - 2 * features @ self.known.T, 0) / (2 * self._sites)
        near = np.exp(-apart / (2 * self._width**2))
        linear = (features - self._mean) @ (self.known - self._mean).T / self._sites
        total: FloatArray = self._LINEAR * linear + self._weight * near
        return total

    def alone(self, features: FloatArray) -> FloatArray:
        """Gives the variances of configs, shape (configs,)."""
        linear: FloatArray = ((features - self._mean) ** 2).sum(axis=1) / self._sites
        return self._LINEAR * linear + self._weight


def _likelihood(covariance: FloatArray, values: FloatArray) -> float:
    """Gives the logarithm of the likelihood at the likeliest scale, up to a constant."""
    lower = np.linalg.cholesky(covariance)
    half = np.linalg.solve(lower, values)
    squares = float(half @ half) or 1e-300
    return -0.5 * len(values) * math.log(squares) - float(np.log(np.diag(lower)).sum())


class _Process(Fitted):
    """A Gaussian process that knows some values."""

    def __init__(
        self, space: Space, covariance: _Covariance, noise: float, values: FloatArray
    ) -> None:
        super().__init__(space)
        self._covariance = covariance
        self._mean = float(values.mean())
        known = covariance.between(covariance.known) + noise * np.eye(len(values))
        self._inverse: FloatArray = np.linalg.inv(np.linalg.cholesky(known))
        half = self._inverse @ (values - self._mean)
        self._weights: FloatArray = half @ self._inverse
        self._variance = float(half @ half) / len(values)

    def predict(self, rows: Rows) -> FloatArray:
        return _in_chunks(
            self.space, rows, lambda f: self._mean + self._covariance.between(f) @ self._weights
        )

    def uncertainty(self, rows: Rows) -> FloatArray:
        return _in_chunks(self.space, rows, self._spread)

    def _spread(self, features: FloatArray) -> FloatArray:
        half = self._inverse @ self._covariance.between(features).T
        left = self._covariance.alone(features) - (half**2).sum(axis=0)
        spread: FloatArray = np.sqrt(self._variance * np.maximum(left, 0.0))
        return spread


# -------------------------------------------------------------------------- by name, judged

PREDICTORS: Mapping[str, Predictor] = {
    "ridge-svr": RidgeSVR(),
    "ridge": Ridge(),
    "svr": SupportVectors(),
    "gradient-boosting": GradientBoosting(),
    "mlp": MLP(),
    "gaussian-process": GaussianProcess(),
}
"""The predictors that settings can name."""


def predictor(name: str) -> Predictor:
    """Gives a predictor with its default settings.

    Args:
        name: One of `PREDICTORS`.

    Raises:
        SettingError: There is no such predictor; the message names the nearest.
    """
    if name not in PREDICTORS:
        raise SettingError(
            f"there is no predictor {name!r}{nearest(name, list(PREDICTORS))} "
            f"(there are: {', '.join(PREDICTORS)})"
        )
    return PREDICTORS[name]


def out_of_fold(
    method: Predictor, space: Space, rows: Rows, values: Sequence[float] | FloatArray
) -> FloatArray:
    """Predicts each config from others: five times, four fifths learn and one is predicted.

    Args:
        method: The predictor.
        space: The space of the configs.
        rows: Configs, or encoded configs of shape (configs, sites), at least three. Every
            fifth is predicted together, so that an order in time does not matter.
        values: One finite number each.

    Returns:
        Predictions, shape (configs,).

    Raises:
        SettingError: There are fewer than three configs, or values don't fit.
    """
    encoded = _encoded(space, rows)
    numbers = np.asarray(values, dtype=np.float64)
    if len(encoded) < 3:
        raise SettingError(f"cross-validation needs at least 3 configs, got {len(encoded)}")
    predicted = np.zeros(len(encoded))
    for held in _folds(len(encoded)):
        fitted = method.fit(space, encoded[~held], numbers[~held])
        predicted[held] = fitted.predict(encoded[held])
    return predicted


def rank_correlation(
    method: Predictor, space: Space, rows: Rows, values: Sequence[float] | FloatArray
) -> float:
    """Tells how well a predictor orders configs that it has not seen: Kendall's tau-b.

    Args:
        method: The predictor.
        space: The space of the configs.
        rows: Configs, or encoded configs of shape (configs, sites), at least three.
        values: One finite number each.

    Returns:
        1 for the order of the values, -1 for the reverse, over the predictions of
        `out_of_fold`; not a number where all values are equal.

    Raises:
        SettingError: There are fewer than three configs, or values don't fit.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site(name, "width", (1, 2, 3), 3) for name in "abc"])
        >>> rows = space.every()
        >>> rank_correlation(Ridge(), space, rows, rows @ [9, 3, 1]) > 0.9
        True
    """
    return _tau(out_of_fold(method, space, rows, values), np.asarray(values, np.float64))


def _tau(first: FloatArray, second: FloatArray) -> float:
    """Gives Kendall's tau-b, a row of pairs at a time."""
    agree = ordered = reordered = 0.0
    for a, b in zip(first, second, strict=True):
        signs, others = np.sign(first - a), np.sign(second - b)
        agree += float(signs @ others)
        ordered += float(signs @ signs)
        reordered += float(others @ others)
    return agree / math.sqrt(ordered * reordered) if ordered and reordered else math.nan


def _folds(count: int) -> list[NDArray[np.bool_]]:
    """Gives masks of what is held out; of few configs each is a fold of its own."""
    folds = min(_FOLDS, count)
    return [np.arange(count) % folds == fold for fold in range(folds)]


def _encoded(space: Space, rows: Rows) -> NDArray[Any]:
    return rows if isinstance(rows, np.ndarray) else space.encode_many(rows)


def _in_chunks(space: Space, rows: Rows, function: Any) -> FloatArray:
    """Applies a function of features to a few thousand configs at a time."""
    encoded = _encoded(space, rows)
    parts = [
        function(space.one_hot(encoded[start : start + _CHUNK]))
        for start in range(0, len(encoded), _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
