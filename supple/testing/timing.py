"""A pytest plugin that keeps groups of tests within a budget of CPU time.

Mark tests with `@pytest.mark.cpu_budget(group, seconds)`. The CPU time of all calls of a group
is added up, over all workers of pytest-xdist too, and the run fails where a group takes more
than its budget. Time to import and to collect does not count. Conformance gives each
technique one second.

A second is that of a machine which does a small piece of reference work in a millisecond: the
work is timed before and after each call, and where it takes longer the call is charged less.
Otherwise a busy neighbour would fail a run that is fine. Nor is a call charged for the garbage
collector, which walks whatever all tests before have left: over half a second, at any moment.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_PROPERTY = "cpu_budget"
_REFERENCE_SECONDS = 1e-3


def charged(used: float, before: float, after: float) -> float:
    """Gives the seconds that a call is charged for.

    Args:
        used: Seconds of CPU time that it took, garbage collections apart.
        before: Seconds that the reference work took just before it.
        after: Seconds that it took just after it.

    Returns:
        Seconds of a machine that does the reference work in a millisecond; never more than
        were used.
    """
    return used / max(1.0, (before + after) / 2 / _REFERENCE_SECONDS)


def _reference() -> float:
    """Times a small piece of work, in seconds of CPU time."""
    started = time.process_time()
    total = 0
    for i in range(20_000):
        total += i * i
    return time.process_time() - started


@contextmanager
def collections() -> Iterator[list[float]]:
    """Gives a list that gains the seconds of CPU time of each garbage collection within."""
    seconds: list[float] = []
    started = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.process_time()
        else:
            seconds.append(time.process_time() - started)

    gc.callbacks.append(note)
    try:
        yield seconds
    finally:
        gc.callbacks.remove(note)


class CPUBudgets:
    """Adds up the CPU time that groups of tests take.

    Args:
        decides: Whether this process sees all reports, so that it may fail the run.
    """

    def __init__(self, decides: bool) -> None:
        self.decides = decides
        self.used: defaultdict[str, float] = defaultdict(float)
        self.allowed: dict[str, float] = {}

    def over(self) -> list[str]:
        """Gives one line for each group that took more than it may."""
        return [
            f"{group}: {used:.2f} s of CPU, at most {self.allowed[group]:g} s allowed"
            for group, used in sorted(self.used.items())
            if used > self.allowed[group]
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        marker = item.get_closest_marker("cpu_budget")
        if marker is None:
            return (yield)
        before = _reference()
        started = time.process_time()
        with collections() as collecting:
            try:
                return (yield)
            finally:
                used = time.process_time() - started - sum(collecting)
                group, seconds = marker.args
                used = charged(used, before, _reference())
                item.user_properties.append((_PROPERTY, [group, seconds, used]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == _PROPERTY and isinstance(value, list):
                group, seconds, used = value
                self.used[group] += used
                self.allowed[group] = seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.decides and self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.decides and self.over():
            terminalreporter.section("over the budget of CPU time", red=True)
            for line in self.over():
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker and the plugin's state for one run."""
    config.addinivalue_line(
        "markers", "cpu_budget(group, seconds): CPU time that the group's calls may take"
    )
    config.pluginmanager.register(CPUBudgets(not hasattr(config, "workerinput")))
