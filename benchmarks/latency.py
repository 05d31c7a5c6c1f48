"""Latency models: how far predictions are from measurements of sizes they were not fitted on.

For each network, sizes to fit to and sizes to judge by are timed in turn with each other in one
session, so that a drift of the machine can't be taken for an error. The same fitted sizes give
the baselines: a straight line in MACs, and a look-up table that adds the profile's operators up
(scaled by one number to the fitted sizes, which looking up alone does not even have).

`python -m benchmarks.latency` writes `benchmarks/results/latency.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import supple
from supple.cost import latency
from supple.cost.measure import device_name
from supple.cost.profile import DeviceProfile, profile_device
from supple.files import write_json
from supple.models.base import build
from supple.network import Elastic

RESULT = Path(__file__).parent / "results" / "latency.json"
FITTED, JUDGED, ROUNDS, SECONDS = 40, 60, 7, 0.01
LIMIT = 0.05
PRICED = 1_000_000


def networks() -> dict[str, Callable[[], Elastic]]:
    """The digits network of the demo, a MobileNetV3-like one, and a vision transformer."""
    image = torch.randn(1, 3, 32, 32)
    width = supple.Width((0.5, 0.75, 1.0), divisor=4)
    return {
        "digits-cnn": lambda: supple.elastic(
            build("digits-cnn", widths=(16, 32, 48), blocks=(2, 3, 2)),
            torch.randn(1, 1, 8, 8),
            axes=[width, supple.Depth()],
            verify=False,
        ),
        "mobilenet-v3": lambda: supple.elastic(build("mobilenet-v3"), image, verify=False),
        "vit": lambda: supple.elastic(build("vit"), image, verify=False),
    }


def judged(net: Elastic, profile: DeviceProfile) -> dict[str, Any]:
    """Measures sizes of a network and gives the errors of all ways to predict them."""
    known = latency._sampled(net.space, FITTED, 0)
    drawn = latency._sampled(net.space, FITTED + 2 * JUDGED, 1)
    seen = {tuple(row) for row in known.tolist()}
    fresh = np.array([row for row in drawn.tolist() if tuple(row) not in seen])[:JUDGED]
    rows = np.concatenate([known, fresh])
    configs = net.space.decode_many(rows)
    start = time.perf_counter()
    seconds = latency.measure_sizes(net, configs, rounds=ROUNDS, seconds=SECONDS)
    took = time.perf_counter() - start
    near, truth = seconds[: len(known)], seconds[len(known) :]
    models = {
        "with a device profile": latency.fit_measured(net, known, near, profile),
        "without a profile": latency.fit_measured(net, known, near),
    }
    predictions = {name: model.predict(fresh) for name, model in models.items()}
    predictions |= baselines(net, known, near, fresh, profile)
    return {
        "sizes": {"in the space": float(net.space.size()), "fitted": len(known),
                  "judged": len(fresh)},
        "seconds_to_measure": took,
        "latency_range": [float(truth.min()), float(truth.max())],
        "error": {name: errors(found, truth) for name, found in predictions.items()},
        "error_claimed": {name: model.error for name, model in models.items()},
        "priced_per_second": rate(net, models["with a device profile"]),
    }  # fmt: skip


def baselines(
    net: Elastic,
    known: NDArray[Any],
    near: NDArray[Any],
    fresh: NDArray[Any],
    profile: DeviceProfile,
) -> dict[str, NDArray[Any]]:
    """A line in MACs, fitted to relative errors, and a scaled sum of the operator table."""
    features = latency._Features(net, profile)
    place = list(features._sums).index("seconds")
    columns = {
        "line in MACs": [
            np.stack([np.ones(len(rows)), net.costs(rows)["macs"]], 1)
            for rows in (known, fresh)
        ],
        "operator table": [features(rows)[0][:, [place]] for rows in (known, fresh)],
    }
    found = {}
    for name, (seen, unseen) in columns.items():
        weights, *_ = np.linalg.lstsq(seen / near[:, None], np.ones(len(near)), rcond=None)
        found[name] = unseen @ weights
    return found


def errors(predicted: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """Median and 90th percentile of the absolute relative error."""
    relative = np.abs(predicted / truth - 1)
    return {"median": float(np.median(relative)), "p90": float(np.quantile(relative, 0.9))}


def rate(net: Elastic, model: latency.LatencyModel) -> float:
    """Sizes priced a second."""
    rows = net.space.random_many(PRICED, 0)
    model.predict(rows[:10])
    start = time.perf_counter()
    model.predict(rows)
    return PRICED / (time.perf_counter() - start)


def tell(name: str, found: Mapping[str, Any]) -> None:
    """Prints one network's figures."""
    print(f"{name}: {found['seconds_to_measure']:.0f} s to measure", flush=True)
    for way, error in found["error"].items():
        claimed = found["error_claimed"].get(way)
        own = f", claims {100 * claimed:.2f} %" if claimed is not None else ""
        print(f"  {way:22} {100 * error['median']:6.2f} % ({100 * error['p90']:.2f} %){own}")
    print(f"  {found['priced_per_second']:.3g} sizes priced a second")


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    profile = profile_device(fast=True)
    figures: dict[str, Any] = {
        "device": device_name("cpu", 1),
        "torch": torch.__version__,
        "profile_seconds": time.perf_counter() - start,
        "divisors": {kind: profile.divisor(kind) for kind in profile.divisors},
        "limit": LIMIT,
        "networks": {},
    }
    print(f"device profile (fast): {figures['profile_seconds']:.0f} s", flush=True)
    print("median error on sizes not fitted on (nine of ten within)")
    for name, make in networks().items():
        found = judged(make(), profile)
        figures["networks"][name] = found
        tell(name, found)
    figures["holds"] = all(
        found["error"]["with a device profile"]["median"] <= LIMIT
        for found in figures["networks"].values()
    )
    print(f"at most {100 * LIMIT:g} % everywhere: {'yes' if figures['holds'] else 'no'}")
    write_json(RESULT, figures)


if __name__ == "__main__":
    main()
