"""What a search measured, computed: how far off is it, and a latency model learned for nothing.

A search by a measured cost leaves measurements of many sizes. A latency model is fitted to them
and written beside the front, for the next search to predict with; memory has a closed form,
which is set beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supple.cost.latency import LEAST_SAMPLES, at_batch, fit_measured
from supple.cost.measure import parse_cost
from supple.recipe.bench import Bench
from supple.study.front import Front

__all__ = ["LEARNED", "cost_models", "model_lines"]

LEARNED = "latency.json"
_THREADS = 1


def cost_models(bench: Bench, front: Front, folder: Path) -> dict[str, dict[str, Any]]:
    """Says how far off the costs are that a search measured, when they are computed.

    Args:
        bench: The run's parts.
        front: What the search found, on this machine.
        folder: Where the latency model that is learned is written, as `latency.json`.

    Returns:
        For each measured cost that can be computed: `by` (what computes it), `error` (median,
        relative), `samples` (sizes), and `file` where a model was written. A latency model
        takes at least twelve sizes; there is none of fewer.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in bench.recipe.search.costs:
        if "[predicted" in name or name.partition("[")[0] not in ("latency", "memory"):
            continue
        figure, settings = parse_cost(name)
        rows, values = _measured(bench, front, name)
        batch, threads = settings.get("batch"), settings.get("threads", _THREADS)
        if figure == "latency" and len(rows) >= LEAST_SAMPLES:
            model = fit_measured(bench.net, rows, values, batch=batch, threads=threads)
            learned = {"by": "a model learned from them", "error": model.error}
            if not any("file" in other for other in found.values()):
                model.save(folder / LEARNED)
                learned["file"] = LEARNED
            found[name] = learned
        elif figure == "memory" and len(rows):
            costs = at_batch(bench.net, batch).costs(rows)
            computed = np.asarray(costs["weight_bytes"]) + np.asarray(costs["activation_bytes"])
            error = float(np.median(np.abs(computed / values - 1)))
            found[name] = {"by": "weight_bytes + activation_bytes", "error": error}
        if name in found:
            found[name]["samples"] = len(rows)
    return found


def model_lines(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Words what `cost_models` found.

    Example:
        >>> model_lines({"memory": {"by": "a formula", "error": 0.0123, "samples": 40}})
        ['memory of 40 sizes by a formula: 1.23 % off in the median']
    """
    return [
        f"{name} of {model['samples']} sizes by {model['by']}: {100 * model['error']:.2f} % "
        "off in the median"
        for name, model in models.items()
    ]


def _measured(bench: Bench, front: Front, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gives the encoded sizes that have a cost, each once, and its values."""
    known = {
        tuple(bench.net.space.encode(point.config).tolist()): point.values[name]
        for point in front.evaluated
        if name in point.values
    }
    return np.array(list(known)), np.array(list(known.values()))
