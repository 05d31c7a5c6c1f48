"""Energy of the processor, by the counters that Linux shows of it (RAPL).

Intel's and AMD's processors count the energy of each package; Linux shows the counters below
`/sys/class/powercap`. They count all that runs on the package, idle power too, so energy means
something only on a machine that does nothing else. Virtual machines mostly have no counters:
there energy is not measurable, and nothing is guessed in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from supple.errors import SettingError

__all__ = ["energy_of", "why_not_measurable"]

ROOT = Path("/sys/class/powercap")
SECONDS = 1.0
"""How long forwards are repeated: a counter moves about once a millisecond."""


def why_not_measurable(device: torch.device | str = "cpu") -> str | None:
    """Says why energy can't be measured here.

    Args:
        device: Where the network computes.

    Returns:
        The reason, or None where it can.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return f"only a processor's energy is counted, the network is on {kind!r}"
    packages = _packages()
    if not packages:
        return (
            f"this machine shows no energy counters (RAPL) below {ROOT}; virtual machines "
            "mostly have none"
        )
    try:
        _read(packages)
    except PermissionError as error:
        return (
            f"the energy counter {error.filename} may not be read; as root, "
            f"`chmod -R a+r {ROOT}/` allows it"
        )
    return None


def energy_of(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Measures what one call takes, as the mean over a second of calls.

    Args:
        run: What is called, over and over.
        device: Where it computes.

    Returns:
        Joules per call, of all packages, with whatever else ran on them meanwhile.

    Raises:
        SettingError: There are no counters here, or they may not be read.
    """
    reason = why_not_measurable(device)
    if reason is not None:
        raise SettingError(f"energy is not measurable here: {reason}")
    packages = _packages()
    ranges = [int((package / "max_energy_range_uj").read_text()) for package in packages]
    run()
    calls = 0
    begin, before = time.perf_counter(), _read(packages)
    while time.perf_counter() - begin < SECONDS:
        run()
        calls += 1
    after = _read(packages)
    # A counter that is full begins at 0 again.
    used = sum(
        (new - old) % (most + 1) for old, new, most in zip(before, after, ranges, strict=True)
    )
    return used / 1e6 / calls


def _packages() -> list[Path]:
    """Gives the folders of the processors' packages, without their parts."""
    found = [folder for folder in sorted(ROOT.glob("intel-rapl:*")) if folder.is_dir()]
    return [
        folder
        for folder in found
        if (folder / "name").is_file() and (folder / "name").read_text().startswith("package")
    ]


def _read(packages: list[Path]) -> list[int]:
    return [int((package / "energy_uj").read_text()) for package in packages]
