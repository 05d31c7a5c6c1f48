"""Predicted latency in a recipe: the model that `supple profile RECIPE` wrote, by its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supple.cost.latency import LatencyModel
from supple.cost.measure import device_name
from supple.errors import RecipeError
from supple.files import checksum
from supple.recipe.bench import Bench
from supple.recipe.schema import Recipe
from supple.space import Config

__all__ = ["costs_of", "latency_inputs", "latency_model", "prediction"]


def latency_model(bench: Bench) -> LatencyModel | None:
    """Reads the latency model that a recipe names.

    Args:
        bench: The run's parts.

    Returns:
        The model, or None where the recipe names none.

    Raises:
        CheckpointError: The file is missing or damaged.
        RecipeError: It is of another network, or predicts another cost than is searched.
    """
    path = bench.recipe.search.latency
    if path is None:
        return None
    model = LatencyModel.load(path)
    if model.space.digest != bench.net.space.digest:
        raise RecipeError(
            f"search.latency: {path} is a model of another network ({len(model.space)} sites, "
            f"{model.space.size():,} sizes; this one has {len(bench.net.space)} and "
            f"{bench.net.space.size():,}); write one with `supple profile` and this recipe"
        )
    predicted = [cost for cost in bench.recipe.search.costs if "[predicted" in cost]
    if predicted != [model.name]:
        raise RecipeError(
            f"search.latency: {path} predicts {model.name!r}, search.costs has "
            f"{', '.join(map(repr, predicted)) or 'no predicted latency'}"
        )
    return model


def costs_of(bench: Bench) -> list[Any]:
    """The searched costs, the predicted one as its model."""
    model = latency_model(bench)
    return [
        model if model is not None and cost == model.name else cost
        for cost in bench.recipe.search.costs
    ]


def latency_inputs(recipe: Recipe) -> dict[str, Any]:
    """What a stage that predicts is computed from besides; nothing where none does."""
    path = recipe.search.latency
    return {} if path is None else {"latency": checksum(Path(path).read_bytes())}


def prediction(bench: Bench, config: Config) -> dict[str, Any] | None:
    """What the model predicts for a size that is deployed, to be set beside the measurement.

    Args:
        bench: The run's parts.
        config: The size.

    Returns:
        `seconds` and `error`, or None where there is no model, or it is of another machine,
        batch size or number of threads than deployed networks are measured with.
    """
    model = latency_model(bench)
    alike = model is not None and (model.batch or 1, model.threads) == (1, 1)
    if model is None or not alike or model.device != device_name(bench.net.device, 1):
        return None
    return {"seconds": float(model.predict(config)[0]), "error": model.error}
