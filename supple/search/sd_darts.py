"""SD-DARTS: the mixture learns from what it was before, which smooths its loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.network import Elastic
from supple.search._relaxed import Relaxation, RelaxedRun, RelaxedSearch, Weights
from supple.technique import register
from supple.training.losses import Criterion, Earlier, learnable, logits_of, soft_cross_entropy
from supple.training.step import Pass, Sampler, SizesRun

__all__ = ["SDDARTS"]

_TEACHER = "teacher"


@register(title="SD-DARTS (self-distillation with voting teachers)", paper="arXiv:2302.05629")
@dataclass(frozen=True, kw_only=True)
class SDDARTS(RelaxedSearch):
    r"""Trains a mixture of options as DARTS does, taught by its own earlier states.

    What the mixture loses when all but the best options are cut grows with the sharpness of its
    loss around the architecture parameters. To smooth it, the weights minimise

    $$\text{loss} + \lambda\, T^2\, KL(p_t\, \Vert\, \text{softmax}(z / T)),$$

    where the teachers vote: $p_t$ is the mean over the last `memory` snapshots of
    $\text{softmax}(z_k / T)$ on the same batch, each with the weights and the architecture
    parameters that it had. Until the first snapshot there is no teacher. The step of the
    architecture parameters is that of DARTS.

    Args:
        soft: $\lambda$, at least 0: weight of distillation beside the user's loss.
        temperature: $T$, above 0.
        memory: How many snapshots vote, at least 1. Each costs a copy of the network and a
            forward per step.
        interval: Share of the run between snapshots, above 0 and at most 1; by default one
            epoch of fifty.
        ramp: Share of the run in which $\lambda$ grows linearly from 0, in [0, 1].

    Example:
        ```python
        net = supple.elastic(model, x, axes=[supple.Operator()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.025, momentum=0.9)
        config = SDDARTS().search(net, train, validation, loss, optimizer=optimizer)
        network = net.extract(config)
        ```

    Source:
        Zhu et al. 2023, "Improving Differentiable Architecture Search via Self-Distillation",
        arXiv:2302.05629. The authors' code was not to be had.
    Differs:
        The paper's weight of distillation, number of teachers and time between snapshots were
        not to be had either: here 1, ramped over a fifth of the run, 3 and one epoch of fifty.
        Teachers run in evaluation mode, with the running statistics that they had.
    Checked:
        One step against gradients summed by hand, with one teacher and with two; when
        snapshots are taken and which are kept; the ramp; resuming with the same losses.
    """

    distinguishing: ClassVar[str] = "criterion"

    soft: float = 1.0
    temperature: float = 1.0
    memory: int = 3
    interval: float = 0.02
    ramp: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.soft >= 0 or not self.temperature > 0:
            raise SettingError(
                "soft must be at least 0 and temperature above 0, got "
                f"{self.soft} and {self.temperature}"
            )
        if self.memory < 1 or not 0 < self.interval <= 1 or not 0 <= self.ramp <= 1:
            raise SettingError(
                "memory must be at least 1, interval lie in (0, 1] and ramp in [0, 1], got "
                f"{self.memory}, {self.interval} and {self.ramp}"
            )

    @classmethod
    def examples(cls) -> list[SDDARTS]:
        return [cls(), cls(memory=1, interval=0.5, ramp=0.0, soft=0.5, temperature=2.0)]

    def sampler(self, run: RelaxedRun) -> Sampler:
        if not run.options.steps:
            raise SettingError(
                f"{type(self).__name__} takes snapshots at shares of a run, so it "
                "needs to know the number of steps; pass options=StepOptions(steps=...)"
            )
        return _Snapshots(self, run)

    def teachers(self, run: RelaxedRun) -> Mapping[str, nn.Module]:
        assert isinstance(run.sampler, _Snapshots)
        return {_TEACHER: run.sampler.voting}

    def criterion(self, run: RelaxedRun) -> Criterion:
        return _Distilled(self, run)


class Voting(nn.Module):
    """The mean of what several mixtures predict.

    Args:
        relaxation: How each runs as a mixture.
        temperature: What their logits are divided by.
    """

    def __init__(self, relaxation: Relaxation, temperature: float) -> None:
        super().__init__()
        self.relaxation = relaxation
        self.temperature = temperature
        self.members: list[tuple[Elastic, Weights]] = []  # the latest last

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Gives the logarithm of the mean probabilities; None while there are no members."""
        votes = []
        for net, weights in self.members:
            with self.relaxation.applied(net, weights):
                logits = logits_of(net.module(*args, **kwargs))
            votes.append(torch.softmax(logits / self.temperature, -1))
        if not votes:
            return None
        mean = torch.stack(votes).mean(0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


class _Snapshots(Sampler):
    """Takes snapshots at equal distances, and trains the mixture."""

    def __init__(self, method: SDDARTS, run: RelaxedRun) -> None:
        self.voting = Voting(run.relaxation, method.temperature)
        self._run = run
        self._memory = method.memory
        self._every = max(1, round(method.interval * (run.options.steps or 1)))

    def begin(self, run: SizesRun) -> None:
        """Takes a snapshot where one is due."""
        if run.steps and run.steps % self._every == 0:
            weights = {name: each.detach() for name, each in self._run.mixture().items()}
            self._keep(_tensors(self._run.net), weights)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the one pass."""
        return (Pass(None, "weights"),)

    def state_dict(self) -> dict[str, Any]:
        """Gives the snapshots."""
        return {
            "snapshots": [
                {"network": _tensors(net), "mixture": dict(weights)}
                for net, weights in self.voting.members
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the snapshots that `state_dict` gave."""
        self.voting.members.clear()
        for each in state["snapshots"]:
            self._keep(each["network"], each["mixture"])

    @torch.no_grad()
    def _keep(self, tensors: Mapping[str, Tensor], weights: Weights) -> None:
        members = self.voting.members
        full = len(members) == self._memory
        net = members.pop(0)[0] if full else copy.deepcopy(self._run.net)
        net.module.eval().requires_grad_(False)
        for name, tensor in _tensors(net).items():
            tensor.copy_(tensors[name])
        members.append((net, dict(weights)))


def _tensors(net: Elastic) -> dict[str, Tensor]:
    named = (*net.module.named_parameters(), *net.module.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


@dataclass(frozen=True)
class _Distilled:
    """The user's loss, and the distance to what the teachers say."""

    method: SDDARTS
    run: RelaxedRun
    teachers: frozenset[str] = field(default=frozenset(), init=False)

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        loss = self.run.loss(output, batch)
        votes = earlier[_TEACHER][0]
        strength = self.method.soft * self._grown()
        if votes is None or not strength:
            return loss
        logits = logits_of(output)
        temperature = self.method.temperature
        taught = temperature * votes
        crosses = [
            soft_cross_entropy(
                student, taught, temperature=temperature, where=learnable(batch, logits)
            )
            for student in (logits, taught)
        ]
        return loss + strength * (crosses[0] - crosses[1])

    def _grown(self) -> float:
        length = self.method.ramp * (self.run.options.steps or 1)
        return min(1.0, self.run.weights.steps / length) if length else 1.0
