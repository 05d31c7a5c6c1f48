"""How a family of the zoo is built, registered and described."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from supple.space import Space

Entry = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Expected:
    """What somebody who knows the architecture expects to be elastic, and what not.

    In patterns `*` stands for anything; brackets are themselves (`*.weight[2, 3]`).

    Attributes:
        sites: "axis name-pattern" -> how many sites match; together the patterns match every
            site exactly once.
        fixed: name pattern -> a part of the reason; together they match everything fixed.
    """

    sites: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)

    def differences(self, space: Space) -> list[str]:
        """What of it does not hold in a space, a sentence each; empty if all does."""
        named = {f"{site.axis} {site.name}" for site in space.sites}
        found = [
            f"{count} sites are expected for '{pattern}', these are there: {there}"
            for pattern, count in self.sites.items()
            if len(there := sorted(n for n in named if matches(n, pattern))) != count
        ]
        for name in sorted(named):
            hits = [pattern for pattern in self.sites if matches(name, pattern)]
            if len(hits) != 1:
                found.append(f"the site '{name}' is matched by {hits or 'nothing'}")
        unused = set(self.fixed)
        for entry in space.fixed:
            hits = [
                p for p, r in self.fixed.items() if matches(entry.name, p) and r in entry.reason
            ]
            unused -= set(hits)
            if not hits:
                found.append(f"'{entry.name}' is fixed unexpectedly: {entry.reason}")
        return [*found, *(f"'{pattern}' is not fixed for its reason" for pattern in unused)]


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern in which only `*` is special."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


ZOO: dict[str, Callable[[], Entry]] = {}
EXPECTED: dict[str, Expected] = {}

# Shared sizes of the transformers: 4 heads of 12 make 48.
BATCH, LENGTH, VOCAB, HIDDEN, HEADS, FFN, LAYERS = 2, 11, 97, 48, 4, 80, 3
CLASSES = 7


def family(
    *, sites: Mapping[str, int] | None = None, fixed: Mapping[str, str] | None = None
) -> Callable[[Callable[[], Entry]], Callable[[], Entry]]:
    """Registers a builder under its own name, seeded by that name, with what is expected."""

    def register(build: Callable[[], Entry]) -> Callable[[], Entry]:
        @functools.wraps(build)
        def seeded() -> Entry:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(build.__name__.encode()))
                module, args, kwargs = build()
            return module.eval(), args, kwargs

        ZOO[build.__name__] = seeded
        if sites is not None:
            EXPECTED[build.__name__] = Expected(sites, fixed or {})
        return seeded

    return register


def tokens(length: int = LENGTH, vocab: int = VOCAB) -> Tensor:
    """Random token ids that avoid the special ids 0 to 4, shape (batch, length)."""
    return torch.randint(5, vocab, (BATCH, length))


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(BATCH, channels, size, size)
