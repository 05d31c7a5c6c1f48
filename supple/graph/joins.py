"""Residual blocks whose outputs are put side by side: a network without some is narrower there.

What reads the joined outputs has a part for each block. A block can be left out together with
its parts, where the network's code goes through the container and joins whatever it got.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from supple.graph.blocks import JOINED, Stack
from supple.graph.couple import Graph
from supple.graph.dims import find, same
from supple.graph.record import Call
from supple.graph.rules import argument

__all__ = ["Join", "find_joins", "shortened"]


@dataclass(frozen=True)
class Join:
    """Blocks of one container, each of whose outputs is one of equal parts of a dimension.

    Attributes:
        stack: The blocks.
        parts: For each part of the joined dimension the block that makes it; empty for what
            another place of the network makes.
        readers: Parameters and buffers that have the joined dimension, with its number.
    """

    stack: Stack
    parts: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]


def find_joins(graph: Graph) -> list[Join]:
    """Finds what residual blocks are joined, where the parts can be told apart.

    Args:
        graph: What is known of the model.

    Returns:
        One entry for each container whose blocks are joined once, with each other or with
        other tensors of their shape.
    """
    joined: dict[str, list[str]] = defaultdict(list)
    for path, reason in graph.fixed.items():
        if reason == JOINED:
            joined[path.rpartition(".")[0]].append(path)
    found = (_join(graph, container, blocks) for container, blocks in joined.items())
    return [join for join in found if join is not None]


def shortened(graph: Graph) -> list[Stack]:
    """Gives all runs of blocks that sizes may shorten: residual ones, joined or not."""
    return [*graph.stacks, *(join.stack for join in find_joins(graph))]


def _join(graph: Graph, container: str, blocks: list[str]) -> Join | None:
    made = {c.outputs[0].id: c.path for c in graph.recording.modules if c.path in blocks}
    calls = list(_joining(graph, made))
    if len(calls) != 1:
        return None  # of several, each would lose its own parts
    call = calls[0]
    dim = int(argument(call, "dim", 0)) % len(call.outputs[0].shape)
    p = graph.propagation
    parts = [p.of(ref)[dim] for ref in call.inputs]
    whole = find(p.of(call.outputs[0])[dim])
    readers = tuple(
        (name, number)
        for name, dims in graph.tensors.items()
        for number, own in enumerate(dims)
        if find(own) is whole
    )
    if not readers or not all(same(part, parts[0]) for part in parts):
        return None
    places = tuple(sorted(int(path.rpartition(".")[2]) for path in blocks))
    length = len(graph.model.get_submodule(container))  # type: ignore[arg-type]
    sources = tuple(made.get(ref.id, "") for ref in call.inputs)
    return Join(Stack(container, length, places, 1), sources, readers)


def _joining(graph: Graph, made: dict[int, str]) -> Iterator[Call]:
    for call in graph.recording.calls:
        if call.name == "aten::cat" and sum(ref.id in made for ref in call.inputs) > 1:
            yield call
