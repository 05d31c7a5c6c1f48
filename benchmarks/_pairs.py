"""Times what competes in turn, so that a drift of the machine reaches all alike.

A cycle runs the contenders forwards and then backwards (A B C C B A), which gives two pairs of
every two contenders. A ratio is that of a pair; of all pairs the median and quartiles are kept.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["against", "alternate"]

Times = dict[str, list[tuple[float, float]]]


def alternate(contenders: Mapping[str, Callable[[], Any]], pairs: int) -> Times:
    """Runs the contenders in turn.

    Args:
        contenders: What to run, by name.
        pairs: How many pairs of any two there will be, even.

    Returns:
        For every contender its seconds in each pair: by the clock, and of this thread's CPU.
    """
    order = [*contenders, *reversed(contenders)]
    times: Times = {name: [] for name in contenders}
    for _ in range(3):
        for run in contenders.values():
            run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(pairs // 2):
            for name in order:
                wall, cpu = time.perf_counter(), time.thread_time()
                contenders[name]()
                times[name].append((time.perf_counter() - wall, time.thread_time() - cpu))
    finally:
        gc.enable()
    return times


def against(times: Times, first: str, second: str) -> dict[str, float]:
    """Gives how long one contender takes over another: median ratio of the pairs, quartiles.

    Args:
        times: From `alternate`.
        first: The one above the line.
        second: The one below it.

    Returns:
        `ratio` with `low` and `high` (quartiles), `cpu_ratio` of CPU seconds, both medians in
        milliseconds, and the number of pairs.
    """
    both = list(zip(times[first], times[second], strict=True))
    ratios = [a[0] / b[0] for a, b in both]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "cpu_ratio": statistics.median(a[1] / b[1] for a, b in both),
        "first_ms": 1e3 * statistics.median(a[0] for a, _ in both),
        "second_ms": 1e3 * statistics.median(b[0] for _, b in both),
        "pairs": len(both),
    }
