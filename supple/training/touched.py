"""Which elements of the shared weights a step has used.

Only two settings need to know: `freeze_inactive`, and the aggregation `masked_mean`. A pass
uses a parameter if its backward reaches it, and of a parameter that the active sub-network
slices it uses the elements inside the slice, whether their gradient happens to be zero or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.axes.base import added
from supple.training.seeds import generator

__all__ = ["Touched", "frozen"]


class Touched:
    """Counts, for the elements of the owners, how many passes of a step used them.

    Args:
        parameters: The owners.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._counts: dict[nn.Parameter, Tensor] = {}

    @contextlib.contextmanager
    def counting(self, module: nn.Module) -> Iterator[None]:
        """Counts one pass; goes around its forward and backward, inside `at`.

        Args:
            module: The network, with the pass's size active.
        """
        masks = _masks(module)
        reached: set[nn.Parameter] = set()
        handles = [
            parameter.register_post_accumulate_grad_hook(reached.add)  # type: ignore[no-untyped-call]
            for parameter in self._parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for parameter in reached:
            mask = masks.get(parameter)
            whole = (
                torch.ones_like(parameter, dtype=torch.int32) if mask is None else mask.int()
            )
            counts = self._counts.get(parameter)
            self._counts[parameter] = whole if counts is None else counts + whole

    @torch.no_grad()
    def divide(self) -> None:
        """Divides each element's gradient by the number of passes that used it."""
        for parameter, counts in self._counts.items():
            if parameter.grad is not None:
                parameter.grad.div_(counts.clamp(min=1))

    def unused(self, parameter: nn.Parameter) -> Tensor | None:
        """Gives the mask of the elements of a parameter that no pass used.

        Args:
            parameter: An owner that has a gradient.

        Returns:
            A boolean tensor of its shape, or None if all were used.
        """
        counts = self._counts.get(parameter)
        if counts is None:  # another rank used it: this one can't tell which elements
            return None
        mask = counts == 0
        return mask if bool(mask.any()) else None


@contextlib.contextmanager
def frozen(optimizer: Optimizer, touched: Touched) -> Iterator[None]:
    """Keeps an optimizer step from moving elements that no pass used, and their moments.

    A moment is any state tensor of the parameter's shape. Counters and factored statistics
    belong to the whole parameter and go on. Parameters without a gradient are skipped by the
    optimizers themselves.

    Args:
        optimizer: Whose step runs inside.
        touched: What the step has used.
    """
    kept: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
    for parameter in _owners(optimizer):
        unused = None if parameter.grad is None else touched.unused(parameter)
        if unused is not None:
            before = {name: value.clone() for name, value in _moments(optimizer, parameter)}
            kept.append((parameter, unused, parameter.detach().clone(), before))
    yield
    for parameter, unused, value, before in kept:
        parameter.detach().copy_(torch.where(unused, value, parameter.detach()))
        for name, moment in _moments(optimizer, parameter):
            # A moment that this step created starts at zero, whatever decay put in.
            held = before.get(name, torch.zeros_like(moment))
            moment.copy_(torch.where(unused, held, moment))


def _owners(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
    state = optimizer.state.get(parameter, {})
    return [
        (name, value)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.dim()
    ]


def _masks(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Finds which elements of the owners the active tensors read; owners read whole are absent.

    An active tensor hides its owner under the same name in the module. How it was cut out does
    not matter: what it reads is where its gradient goes.
    """
    active: list[Tensor] = []
    owners: dict[nn.Parameter, None] = {}
    whole: set[nn.Parameter] = set()
    for part in module.modules():
        for name, owner in part._parameters.items():
            if owner is None or not owner.requires_grad:
                continue
            owners[owner] = None
            value = part.__dict__.get(name)
            if isinstance(value, Tensor) and value.requires_grad and value is not owner:
                active.append(value)
            elif not added(name):  # what axes added is read by active tensors only
                whole.add(owner)
    cut = [owner for owner in owners if owner not in whole]
    if not active or not cut:
        return {}
    draws = generator(0, "touched")
    # Random positive weights, so that an active tensor that mixes elements can't cancel.
    weights = [
        (torch.rand(t.shape, generator=draws) + 0.5).to(t.device, t.dtype) for t in active
    ]
    reads = torch.autograd.grad(active, cut, weights, retain_graph=True, allow_unused=True)
    return {
        owner: read != 0 for owner, read in zip(cut, reads, strict=True) if read is not None
    }
