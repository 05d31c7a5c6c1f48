"""Truths about learning what a block is to give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.calibrate import block_by_block
from supple.quantize._reconstruct import (
    Example,
    examples_of,
    reconstruct,
    relative_error,
    run_example,
)
from supple.testing.toys import generator


class Doubled(nn.Module):
    """Takes a keyword and changes it in place, and gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, *, times):
        times.mul_(2)
        return self.layer(x) * times, None


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Doubled(), Doubled()])

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x, times=torch.tensor(1.0))
        return x


def test_calls_are_noted_as_the_network_makes_them() -> None:
    model, batches = Chain(), [torch.randn(2, 3, generator=generator()) for _ in range(2)]
    blocks = list(block_by_block(model, batches))
    assert len(blocks) == 2
    for block in block_by_block(model, batches):
        examples = examples_of(block)
        assert len(examples) == 2
        for example, entered in zip(examples, block.inputs(), strict=True):
            assert torch.equal(example.args[0], entered)
            assert float(example.kwargs["times"]) == 1.0
            assert torch.equal(run_example(block.module, example), example.target)
            assert float(example.kwargs["times"]) == 1.0
        with pytest.raises(ValueError, match="shorter"):
            examples_of(block, [torch.zeros(2, 3)])


def test_only_what_is_named_learns() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.Linear(2, 1))
    module[2].bias.requires_grad_(False)
    state = {name: one.clone() for name, one in module.state_dict().items()}
    x = torch.randn(8, 2, generator=generator())
    aim = x.sum(1, keepdim=True)
    examples = [Example((x,), {}, aim)]
    losses = reconstruct(module, examples, [module[0].weight], lr=0.1, steps=30)
    assert losses[-1] < 0.3 * losses[0]
    changed = {n for n, one in module.state_dict().items() if not torch.equal(one, state[n])}
    assert changed == {"0.weight"}
    assert [one.requires_grad for one in module.parameters()] == [True, True, True, False]
    assert module.training
    assert reconstruct(module, examples, [module[0].weight], lr=0.1, steps=0) == []


def test_all_calls_are_seen_before_one_comes_again() -> None:
    module = nn.Linear(1, 1)
    examples = [Example((torch.ones(1, 1),), {}, torch.full((1, 1), n + 1.0)) for n in range(3)]
    seen: list[float] = []
    steps: list[int] = []

    def loss(output: torch.Tensor, example: Example) -> torch.Tensor:
        seen.append(float(example.target))
        return relative_error(output, example)

    reconstruct(
        module,
        examples,
        [{"params": [module.weight], "lr": 0.0}],
        lr=1.0,
        steps=6,
        loss=loss,
        generator=generator(),
        before=steps.append,
    )
    assert sorted(seen[:3]) == sorted(seen[3:]) == [1.0, 2.0, 3.0]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_errors_are_relative() -> None:
    example = Example((), {}, torch.tensor([3.0, 4.0]))
    assert float(relative_error(torch.tensor([3.0, 9.0]), example)) == 1.0
    assert float(relative_error(torch.zeros(2), Example((), {}, torch.zeros(2)))) == 0.0
