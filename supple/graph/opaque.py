"""What a recorded run cannot show, and what is held fixed because of it.

* Values that leave PyTorch (`numpy()`) come back as tensors of which nobody knows how they were
  computed: the dimensions of the tensor that left are fixed.
* A module that chooses its way by values, and has submodules on a way that the example inputs
  did not take: whatever these might be given is fixed.
* A module that cannot be recorded at all is run unobserved: what enters and leaves it, and its
  own parameters, are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator

from supple.graph.dims import pin
from supple.graph.record import Recording, Ref
from supple.graph.rules import Propagation

__all__ = ["hold_what_is_not_seen"]


def hold_what_is_not_seen(recording: Recording, p: Propagation) -> None:
    """Fix the dimensions that something out of sight may depend on.

    Args:
        recording: A run.
        p: What the run told; its dimensions are pinned where needed.
    """
    for ref, reason in recording.escapes:
        _pin_tensor(p, ref, reason)
    for path, reason in recording.opaque.items():
        for call in recording.modules:
            if call.path == path:
                for ref in (*call.inputs, *call.outputs):
                    _pin_tensor(p, ref, reason)
        _pin_parameters(p, path, reason)
    for path, where in recording.decisions.items():
        for unseen in _not_taken(recording, path):
            reason = (
                f"values decide at {where} whether '{unseen}' runs, and with the example "
                "inputs it does not"
            )
            for ref in _in_sight(recording, path):
                _pin_tensor(p, ref, reason)
            _pin_parameters(p, unseen, reason)


def _pin_tensor(p: Propagation, ref: Ref, reason: str) -> None:
    for dim in p.of(ref):
        pin(dim, reason)


def _pin_parameters(p: Propagation, path: str, reason: str) -> None:
    for name, dims in p.owned.items():
        if not path or name.startswith(path + "."):
            for dim in dims:
                pin(dim, reason)


def _not_taken(recording: Recording, path: str) -> Iterator[str]:
    """Submodules of a module whose parameters no operator took."""
    used = {ref.id for call in recording.calls for ref in call.inputs}
    for child, names in recording.children[path].items():
        owners = {recording.aliases[name] for name in names}
        if owners and not any(recording.tensors[owner].id in used for owner in owners):
            yield child


def _in_sight(recording: Recording, path: str) -> Iterator[Ref]:
    """Tensors that a module's own code handles: what it and its children take and give."""
    for call in recording.modules:
        if call.path == path or _parent(recording, call.path, path):
            yield from call.inputs
            yield from call.outputs
    for operator in recording.calls:
        if operator.module == path:
            yield from operator.outputs


def _parent(recording: Recording, inner: str, path: str) -> bool:
    """Whether a module is a child of another, containers between them left aside."""
    lead = f"{path}." if path else ""
    if not inner.startswith(lead) or inner == path:
        return False
    between = inner[len(lead) :].split(".")[:-1]
    seen = {call.path for call in recording.modules}
    return not any(lead + ".".join(between[: i + 1]) in seen for i in range(len(between)))
