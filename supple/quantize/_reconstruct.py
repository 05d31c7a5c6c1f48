"""Learns parameters of a block such that it gives what it is to give, on given calls of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from supple.calibrate import BlockPass
from supple.plan import Shadows
from supple.training.batches import mapped
from supple.training.losses import Labels
from supple.training.schedule import Cosine
from supple.training.step import SizesRun, StepOptions, WholeOnly
from supple.transforms import evaluating

__all__ = ["Example", "examples_of", "reconstruct", "relative_error", "run_example"]


@dataclass(frozen=True, eq=False)
class Example:
    """A call of a block.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        target: What the block is to give: its first tensor.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor


Loss = Callable[[Tensor, Example], Tensor]


def examples_of(block: BlockPass, targets: Iterable[Tensor] | None = None) -> list[Example]:
    """Gives the calls that a network makes of one of its blocks, one for each batch.

    Args:
        block: The block, of `supple.calibrate.block_by_block`.
        targets: What it is to give; by default what it gives now.

    Returns:
        The calls, which hold copies of all tensors.

    Example:
        >>> from supple.calibrate import block_by_block
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> for block in block_by_block(model, [torch.ones(5, 2)]):
        ...     print(examples_of(block)[0].target.shape)
        torch.Size([5, 3])
        torch.Size([5, 3])
    """
    kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module, undo = block.module, Shadows()
    forward = module.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        kept.append(copy.deepcopy((args, kwargs)))
        return forward(*args, **kwargs)

    undo.put(vars(module), "forward", noting)
    try:
        given = [output.detach().clone() for output in block.outputs()]
    finally:
        undo.end()
    aims = given if targets is None else targets
    return [Example(*call, aim) for call, aim in zip(kept, aims, strict=True)]


def run_example(module: nn.Module, example: Example) -> Tensor:
    """Runs a block on a call of it.

    Args:
        module: The block.
        example: The call; it is left as it is.

    Returns:
        The first tensor that it gives.
    """
    args, kwargs = copy.deepcopy((example.args, example.kwargs))  # it may change them
    found: list[Tensor] = []
    mapped(module(*args, **kwargs), found.append)
    return found[0]


def relative_error(output: Tensor, example: Example) -> Tensor:
    """Gives the squared error as a share of the square of what is to be given.

    Args:
        output: What the block gives.
        example: The call.
    """
    aim = example.target.float()
    whole = aim.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (output.float() - aim).square().sum() / whole


def reconstruct(
    module: nn.Module,
    examples: Sequence[Example],
    parameters: Sequence[nn.Parameter] | Sequence[Mapping[str, Any]],
    *,
    lr: float,
    steps: int,
    loss: Loss = relative_error,
    generator: torch.Generator | None = None,
    before: Callable[[int], None] | None = None,
    floor: float = 0.0,
    weight_decay: float = 0.0,
) -> list[float]:
    """Learns parameters of a module by AdamW, one call a step.

    Args:
        module: A block, or what stands for one; in evaluation mode meanwhile.
        examples: Calls of it; all of them are gone through before one comes again.
        parameters: Parameters of the module, or groups of them as optimizers take them. All
            others stay as they are.
        lr: Learning rate, which falls with a cosine.
        steps: Updates, 0 or more.
        loss: `loss(output, example) -> scalar`.
        generator: What the order of the calls is drawn by; as they come where there is none.
        before: Is told the number of each step, from 0, before it.
        floor: Where the learning rate ends, relative to `lr`.
        weight_decay: Of AdamW.

    Returns:
        The loss of each step.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> example = Example((torch.ones(1, 1),), {}, torch.full((1, 1), 3.0))
        >>> losses = reconstruct(layer, [example], list(layer.parameters()), lr=0.1, steps=200)
        >>> round(layer.weight.item(), 1)
        3.0
    """
    optimizer = AdamW(parameters, lr=lr, weight_decay=weight_decay)  # type: ignore[arg-type]
    learned = {id(one) for group in optimizer.param_groups for one in group["params"]}
    asked = {one: one.requires_grad for one in module.parameters()}
    for one in asked:
        one.requires_grad_(id(one) in learned)
    try:
        with evaluating(module), torch.enable_grad():
            run = SizesRun(
                module,
                optimizer,
                WholeOnly(),
                Labels(loss),
                forward=run_example,
                options=StepOptions(schedule=Cosine(floor), steps=steps) if steps else None,
            )
            return _steps(run, examples, steps, generator, before)
    finally:
        for one, before_that in asked.items():
            one.requires_grad_(before_that)


def _steps(
    run: SizesRun,
    examples: Sequence[Example],
    steps: int,
    generator: torch.Generator | None,
    before: Callable[[int], None] | None,
) -> list[float]:
    losses, order = list[float](), list[int]()
    for step in range(steps):
        if not order:
            order = list(range(len(examples)))
            if generator is not None:
                order = torch.randperm(len(examples), generator=generator).tolist()
        if before is not None:
            before(step)
        losses += run.step(examples[order.pop(0)]).values()
    return losses
