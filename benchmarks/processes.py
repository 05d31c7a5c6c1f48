"""The demo trained by two processes against the demo trained by one.

`python -m benchmarks.processes` writes `benchmarks/results/processes.json`: for every seed the
accuracy on the test set of the four deployed networks, trained by one process on batches of 64
and by two on batches of 32 each, so that both follow the gradient of 64 examples in as many
steps. Batch normalization sees 64 examples in the former and 32 in the latter. The searches
are independent, so the sizes differ within their budgets. The spread is that over the seeds of
one process. A run that was finished is taken from its folder.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from supple.cost.measure import device_name
from supple.files import read_json, write_json

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "digits.yaml"
RESULT = Path(__file__).parent / "results" / "processes.json"
SEEDS = (0, 1, 2)
BATCH, RECALIBRATION = 64, 8
SIZES = ("full", "large", "medium", "small")
Accuracies = dict[str, float]


def run(seed: int, ranks: int) -> Accuracies:
    """Runs the recipe in so many processes, and gives the accuracy of each network."""
    name = f"digits-{seed}-by-{ranks}"
    words = [
        *("-m", "supple", "run", str(RECIPE), "--quiet", "--output", "runs/processes"),
        *(f"name={name}", f"seed={seed}", f"train.batch_size={BATCH // ranks}"),
        f"search.recalibration_batches={RECALIBRATION * ranks}",
        *("deploy.export=[]", "compare={alone: false, cut: false}"),
    ]
    if ranks > 1:
        words = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *words,
        ]
    threads = {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | threads, check=True)
    folder = ROOT / "runs" / "processes" / name / "deploy"
    return {
        size: read_json(folder / size / "done.json")["result"]["elastic"]["accuracy"]
        for size in SIZES
    }


def compared(found: dict[int, list[Accuracies]], size: str) -> dict[str, float]:
    """Means over the seeds, in percent, and how far they lie apart."""
    one, two = ([100 * each[size] for each in found[ranks]] for ranks in (1, 2))
    return {
        "one_process_mean": statistics.mean(one),
        "one_process_spread": statistics.stdev(one),
        "two_processes_mean": statistics.mean(two),
        "two_processes_spread": statistics.stdev(two),
        "gap_points": statistics.mean(two) - statistics.mean(one),
    }


def main() -> None:
    """Run all seeds and write the figures."""
    found = {ranks: [run(seed, ranks) for seed in SEEDS] for ranks in (1, 2)}
    figures = {size: compared(found, size) for size in SIZES}
    for size, row in figures.items():
        print(
            f"{size:8} one process {row['one_process_mean']:.2f} % "
            f"(spread {row['one_process_spread']:.2f}), two {row['two_processes_mean']:.2f} % "
            f"(spread {row['two_processes_spread']:.2f})"
        )
    write_json(
        RESULT,
        {
            "sizes": figures,
            "seeds": list(SEEDS),
            "accuracy_by_seed": {str(ranks): rows for ranks, rows in found.items()},
            "device": device_name(),
        },
    )
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
