"""NEAS: ensembles with a shared trunk, in a space that is shrunk by what operators add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.axes.operator import Operator
from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.network import Elastic, elastic
from supple.search._ensembles import best_of, ensembles, members_of
from supple.space import Config, Space
from supple.technique import Rule, register
from supple.training import processes
from supple.training.batches import Forward, Loss
from supple.training.losses import Labels, logits_of
from supple.training.seeds import kept
from supple.training.step import Network, Pass, Sampler, Seen, SizesRun, StepOptions

__all__ = ["NEAS", "EnsembleSampler", "SharedTrunk", "distance", "ensembles", "members_of"]

FloatArray = NDArray[np.float64]


@register(title="NEAS", paper="arXiv:2104.00597")
@dataclass(frozen=True, kw_only=True)
class NEAS(Rule):
    r"""Trains ensembles of sub-networks that begin alike, and drops operators as it goes on.

    An ensemble is `members` sub-networks that share their first layers, up to a split that is
    drawn, too; behind it each takes operators of its own. A step trains one random ensemble on
    the sum of its members' losses, and a weight that several members use gets the mean of
    their gradients. At each of `events` times, evenly spread over the first `until` of the
    steps, the operators of a layer with the lowest scores are dropped for good, until `keep`
    are left. The score of an operator is
    $-z(\mathbb{E}[\ell_k - \bar\ell]) + \alpha\, z(\mathbb{E}[D(p_k, p_l)])$
    over the members $k$ that used it in ensembles whose members differ in this layer: how much
    lower the member's loss was than the mean of its ensemble, and how far its predictions were
    from those of the members $l$ with another operator there. $D$ is the symmetric KL
    divergence, and $z$ standardises over the operators of the layer that are left.

    Begin with `start`, as in the example (`supple.train` keeps the run to itself): `run.left`
    holds the sub-networks that are left, any search finds ensembles in `ensembles(run.left)`,
    `members_of` takes one apart, and `SharedTrunk` is the network of one.

    Args:
        members: Sub-networks in an ensemble, at least 2.
        alpha: Weight of diversity beside the loss, at least 0.
        events: How many times operators are dropped, at least 1.
        until: Share of the steps after which nothing is dropped, in (0, 1].
        keep: Operators of a layer that stay, at least 1.

    Example:
        ```python
        net = supple.elastic(model, (x,), axes=[Operator()])
        optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
        options = StepOptions(steps=len(batches))
        run = NEAS(keep=2).start(net, optimizer, loss=loss, options=options)
        for batch in batches:
            run.step(batch)
        search = RegularizedEvolution().start(ensembles(run.left), ["error"], 0)
        ```

    Source:
        Chen et al. 2021, "One-Shot Neural Ensemble Architecture Search by Diversity-Guided
        Search Space Shrinking", CVPR, arXiv:2104.00597; researchmm/NEAS has the final networks
        and their training (the sum of losses, gradients of the trunk divided by the number of
        members), not the search.
    Differs:
        The paper's distance and the weight of the two terms could not be checked; here it is
        the symmetric KL divergence of predictions, seen in training at no extra cost, not of
        features. Equally many operators are dropped in each layer. Members share the
        supernet's head and the weights of an operator that both take; a network that is built
        of an ensemble has heads of its own, as the authors' have.
    Checked:
        Scores and what is dropped against hand-computed cases; gradients of a step against
        passes by hand; a useless operator is dropped.
    """

    distinguishing: ClassVar[str] = "start"

    members: int = 2
    alpha: float = 1.0
    events: int = 3
    until: float = 0.7
    keep: int = 2

    def __post_init__(self) -> None:
        for name, least in (("members", 2), ("events", 1), ("keep", 1), ("alpha", 0)):
            if not getattr(self, name) >= least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 < self.until <= 1:
            raise SettingError(f"until must lie in (0, 1], got {self.until}")

    @classmethod
    def examples(cls) -> list[NEAS]:
        return [cls(keep=1), cls(members=3, alpha=0.0, events=1)]

    @classmethod
    def toy(cls) -> Any:
        def options() -> list[nn.Module]:
            return [nn.Sequential(nn.Linear(7, 7), act()) for act in (nn.Tanh, nn.ReLU, nn.ELU)]

        with kept(0):
            layers = [nn.Linear(5, 7), *(Choice(*options()) for _ in range(2)), nn.Linear(7, 3)]
        net = nn.Sequential(*layers).train()
        return elastic(net, (torch.zeros(2, 5),), axes=[Operator()], verify=False)

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *_: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> EnsembleRun:
        """Begins training.

        Args:
            net: What `supple.elastic` gives, with sites that don't depend on one another, in
                the order of its layers.
            optimizer: Over the parameters of `net.module`.
            loss: `loss(output, batch) -> scalar`.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
            generator: For sampling ensembles, equal on all ranks; by default seeded with 0.
            options: Clipping, precision, schedule, average; `steps` must be known.

        Returns:
            A run with `step(batch) -> losses by member`; its `left` is what was not dropped.

        Raises:
            SettingError: `net` is a plain module, or its sites depend on one another.
        """
        if not isinstance(net, Elastic):
            raise SettingError(
                f"{type(self).__name__} trains an elastic network, got {type(net).__name__}; "
                "make one with supple.elastic(model, example_inputs, axes=[supple.Operator()])"
            )
        source = torch.Generator().manual_seed(0) if generator is None else generator
        return EnsembleRun(
            net,
            optimizer,
            EnsembleSampler(self, net.space, source),
            Labels(loss),
            forward=forward,
            aggregate="masked_mean",
            generator=source,
            options=options,
        )


class EnsembleRun(SizesRun):
    """Training of ensembles in progress."""

    sampler: EnsembleSampler

    @property
    def left(self) -> Space:
        """The sub-networks that are left."""
        return self.sampler.space


class EnsembleSampler(Sampler):
    """Trains random ensembles, scores operators by them, and drops the worst at times.

    Args:
        method: The settings.
        space: The sub-networks there are.
        generator: Source of randomness.

    Attributes:
        space: The sub-networks that are left.
    """

    def __init__(self, method: NEAS, space: Space, generator: torch.Generator) -> None:
        self.method = method
        self.whole = space
        self.generator = generator
        self._seen: list[tuple[Config, Tensor, Tensor]] = []
        self._restrict(space)

    def begin(self, run: SizesRun) -> None:
        """Drops operators where it is time."""
        steps = run.options.steps
        if steps is None:
            raise SettingError("shrinking needs the number of steps; pass steps=")
        method = self.method
        for event in range(1, method.events + 1):
            # an event at the very end would come after the last step
            if min(round(method.until * steps * event / method.events), steps - 1) == run.steps:
                self._shrink(event)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the members of an ensemble in roles `member-0`, `member-1` and so on."""
        self._seen = []
        drawn = members_of(self.space, self._ensembles.random(self.generator))
        return [Pass(config, f"member-{k}") for k, config in enumerate(drawn)]

    def observe(self, seen: Seen) -> None:
        """Scores the operators once all members of the ensemble have run."""
        assert seen.entry.config is not None
        log_probs = logits_of(seen.output).detach().float().log_softmax(-1)
        self._seen.append((seen.entry.config, seen.loss.float(), log_probs))
        if len(self._seen) == self.method.members:
            configs, losses, outputs = zip(*self._seen, strict=True)
            apart = torch.stack(
                [torch.stack([distance(a, b) for b in outputs]) for a in outputs]
            )
            found = [torch.stack(losses).double(), apart.double()]
            processes.average(found)  # all ranks must drop the same
            self._count(configs, *(each.cpu().numpy() for each in found))
            self._seen = []

    def scores(self) -> dict[str, FloatArray]:
        """Gives the score of each operator that is left, by site, from what was seen so far."""
        found = {}
        for i, site in enumerate(self.space.sites):
            loss, apart = (
                _standardised(*sums[i, : len(site.choices)].T) for sums in self._sums
            )
            found[site.name] = self.method.alpha * apart - loss
        return found

    def state_dict(self) -> dict[str, Any]:
        """Gives what is left and what was seen of it."""
        left = {site.name: list(site.choices) for site in self.space.sites}
        return {"left": left, "sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._restrict(self.whole.subspace(state["left"]))
        self._sums = np.array(state["sums"])

    def _restrict(self, space: Space) -> None:
        """Goes on with fewer operators, of which nothing was seen so far."""
        self.space = space
        self._ensembles = ensembles(space, self.method.members)
        # By kind (loss, distance), site and choice: a sum, and of how many.
        self._sums = np.zeros((2, len(space.sites), int(space.counts.max()), 2))

    def _count(self, configs: Sequence[Config], losses: FloatArray, apart: FloatArray) -> None:
        rows = self.space.encode_many(configs)
        relative = losses - losses.mean()
        for site in range(rows.shape[1]):
            differ = rows[:, None, site] != rows[None, :, site]
            for k, choice in enumerate(rows[:, site]):
                if differ[k].any():
                    self._sums[0, site, choice] += (relative[k], 1)
                    self._sums[1, site, choice] += (apart[k, differ[k]].sum(), differ[k].sum())

    def _shrink(self, event: int) -> None:
        keep = {}
        for site, now in zip(self.whole.sites, self.space.sites, strict=True):
            most, least = len(site.choices), min(self.method.keep, len(site.choices))
            stay = most - round((most - least) * event / self.method.events)
            keep[site.name] = min(stay, len(now.choices))
        self._restrict(best_of(self.space, self.scores(), keep))


def distance(a: Tensor, b: Tensor) -> Tensor:
    r"""Gives how far two predictions are apart, on average over a batch.

    The symmetric KL divergence $\sum_c (p_c - q_c)(\log p_c - \log q_c)$, in nats.

    Args:
        a: Logarithms of probabilities, classes last.
        b: The same, of the same shape.

    Returns:
        A scalar.

    Example:
        >>> a, b = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(distance(a, b).item(), 4)  # 0.25 * log(2) + 0.25 * log(1.5)
        0.2747
    """
    return ((a.exp() - b.exp()) * (a - b)).sum(-1).mean()


def _standardised(sums: FloatArray, counts: FloatArray) -> FloatArray:
    """Turns sums into means with the mean 0 and deviation 1; 0 for what was not seen."""
    seen = counts > 0
    values = np.zeros(len(sums))
    values[seen] = sums[seen] / counts[seen]
    values[seen] -= values[seen].mean() if seen.any() else 0.0
    spread = values[seen].std() if seen.any() else 0.0
    standardised: FloatArray = values / (spread if spread > 0 else 1.0)
    return standardised


class SharedTrunk(nn.Module):
    """Several networks with the same beginning, which runs once.

    The beginning gets the mean of the branches' gradients if their losses are summed.

    Args:
        trunk: What all share.
        branches: What follows in each network, up to its outputs.

    Raises:
        SettingError: There is no branch.

    Example:
        >>> net = SharedTrunk(nn.Linear(4, 5), [nn.Linear(5, 3), nn.Linear(5, 3)])
        >>> [tuple(out.shape) for out in net(torch.zeros(2, 4))]
        [(2, 3), (2, 3)]
    """

    def __init__(self, trunk: nn.Module, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        if not branches:
            raise SettingError("an ensemble needs at least one branch, got none")
        self.trunk = trunk
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Gives the output of each branch."""
        shared = self.trunk(x)
        if shared.requires_grad:
            shared = _Divided.apply(shared, len(self.branches))
        return [branch(shared) for branch in self.branches]


class _Divided(torch.autograd.Function):
    """Leaves values as they are, and divides the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: int) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.by, None
