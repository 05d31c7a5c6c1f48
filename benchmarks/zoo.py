"""Every family of the zoo: its sites, what is fixed and why, and the seconds it takes to know.

`python -m benchmarks.zoo` writes `benchmarks/results/zoo.json`, from which the page of the docs
is made; names of families choose some, the others keep what was written of them.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from supple.cost.measure import device_name
from supple.errors import UnsupportedModelError
from supple.files import read_json, write_json
from supple.network import elastic
from supple.space import Site, Space
from tests.zoo import ZOO

RESULT = Path(__file__).parent / "results" / "zoo.json"
REPEATS = 3


def numbered(name: str) -> str:
    """A name with a star in place of each number that counts modules."""
    return re.sub(r"(?<![^.])\d+(?=\.|$|\[)", "*", name)


def sites(found: Iterable[Site]) -> dict[str, list[dict[str, Any]]]:
    """The sites by axis; those that differ by a number only, together."""
    result: dict[str, dict[str, list[Site]]] = {}
    for site in found:
        result.setdefault(site.axis, {}).setdefault(numbered(site.name), []).append(site)
    return {
        axis: [
            {
                "name": name if len(alike) > 1 else alike[0].name,
                "count": len(alike),
                "least": min(site.choices[0] for site in alike),
                "full": max(site.full for site in alike),
            }
            for name, alike in by_name.items()
        ]
        for axis, by_name in result.items()
    }


def fixed(space: Space) -> dict[str, list[str]]:
    """What is fixed, by reason; names that differ by a number only, once."""
    result: dict[str, list[str]] = {}
    for entry in space.fixed:
        names = result.setdefault(entry.reason, [])
        if numbered(entry.name) not in names:
            names.append(numbered(entry.name))
    return result


def fastest(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the seconds of CPU of its fastest repeat."""
    best, result = float("inf"), None
    for _ in range(REPEATS):
        start = time.process_time()
        result = run()
        best = min(best, time.process_time() - start)
    return result, best


def family(name: str) -> dict[str, Any]:
    """Everything that is written of one family."""
    kind = inspect.getmodule(ZOO[name])
    described = {"kind": (inspect.getdoc(kind) or "").splitlines()[0]}
    model, args, kwargs = ZOO[name]()
    described["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        _, analysis = fastest(lambda: elastic(model, args, kwargs, verify=False))
        net, total = fastest(lambda: elastic(model, args, kwargs))
    except UnsupportedModelError as error:
        return {**described, "refused": str(error).splitlines()[0]}
    return {
        **described,
        "configs": f"{net.space.size():.2g}",
        "sites": sites(net.space.sites),
        "fixed": fixed(net.space),
        "seconds": {"analysis": round(analysis, 3), "with verification": round(total, 3)},
    }


def main(chosen: list[str]) -> None:
    """Analyses the chosen families, or all, and writes the result."""
    before = read_json(RESULT)["families"] if chosen and RESULT.exists() else {}
    fresh = {name: family(name) for name in chosen or ZOO}
    known = {**before, **fresh}
    families = {name: known[name] for name in ZOO if name in known}
    write_json(RESULT, {"device": device_name(), "families": families})
    for name, row in fresh.items():
        print(f"{name}: {row.get('refused') or row['seconds']}")


if __name__ == "__main__":
    main(sys.argv[1:])
