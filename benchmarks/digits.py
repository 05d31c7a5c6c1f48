"""The demo with five seeds: deployed sizes against the same sizes trained alone.

`python -m benchmarks.digits` writes `benchmarks/results/digits.json`: for every seed and size
the accuracy of the deployed size, of the same size trained alone and of the size cut from the
trained full network, and the mean gap with its spread over seeds. A seed that was finished is
taken from its folder, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from supple.cost.measure import device_name
from supple.files import write_json
from supple.recipe.load import load_recipe
from supple.recipe.run import run_recipe
from supple.report.summary import Summary

SEEDS = (0, 1, 2, 3, 4)
RECIPE = Path(__file__).parent.parent / "recipes" / "digits.yaml"
RESULT = Path(__file__).parent / "results" / "digits.json"


def rows(summary: Summary) -> list[dict[str, float | str]]:
    """Accuracy by way, one row per network."""
    return [
        {"name": network.name, "params": network.costs["params"]}
        | {one.way: one.metrics["accuracy"] for one in network.outcomes}
        for network in summary.networks
    ]


def main() -> None:
    """Run all seeds and write the figures."""
    found = {}
    for seed in SEEDS:
        changes = [f"seed={seed}", f"name=digits-{seed}", "output=runs/bench"]
        finished = run_recipe(load_recipe(RECIPE, changes), progress=False)
        found[str(seed)] = rows(finished.summary)
        gaps = [float(r["elastic"]) - float(r["alone"]) for r in found[str(seed)]]
        print(
            f"seed {seed}: mean gap to trained alone {100 * statistics.mean(gaps):+.2f} points"
        )
    by_seed = [
        statistics.mean(100 * (float(r["elastic"]) - float(r["alone"])) for r in table)
        for table in found.values()
    ]
    figures = {
        "gap_points_mean": statistics.mean(by_seed),
        "gap_points_spread": statistics.stdev(by_seed),
        "gap_points_by_seed": by_seed,
        "seeds": found,
        "device": device_name(),
    }
    write_json(RESULT, figures)
    print(f"mean gap {figures['gap_points_mean']:+.2f} points, spread over seeds "
          f"{figures['gap_points_spread']:.2f}; written to {RESULT}")  # fmt: skip


if __name__ == "__main__":
    main()
