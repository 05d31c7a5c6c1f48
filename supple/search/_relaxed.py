"""Differentiable search: a network that runs as a mixture of its choices, and learns which.

Three parts, each a value that a technique picks:

- a `Relaxation` (`supple.search._mixtures`) makes an elastic network run as a mixture, given
  weights for the choices of its sites;
- a `Weighing` (`supple.search._alphas`) turns architecture parameters into these weights;
- a `RelaxedRun` trains network and architecture parameters in turns, on two halves of the
  data, as in DARTS.

A technique derives from `RelaxedSearch` and overrides `relaxation`, `weighing`, `criterion`,
`teachers`, `sampler`, `rests`, `penalty` or `derive`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from supple.axes.operator import Operator
from supple.errors import CheckpointError, SettingError
from supple.layers.choice import Choice
from supple.network import Elastic, elastic
from supple.search._alphas import Alphas, Softmax, Weighing
from supple.search._halves import Halves, halves, paired
from supple.search._mixtures import OutputMixture, Relaxation, Weights
from supple.space import Config
from supple.technique import Rule
from supple.training.batches import Forward, Loss, batch_size, run_model
from supple.training.ema import Average
from supple.training.losses import Criterion, Labels, learnable, logits_of
from supple.training.norms import without_dropout
from supple.training.seeds import kept
from supple.training.session import modes_kept
from supple.training.step import Sampler, SizesRun, StepOptions, WholeOnly

__all__ = [
    "Halves",
    "Measured",
    "OutputMixture",
    "Relaxation",
    "RelaxedRun",
    "RelaxedSearch",
    "Weights",
    "buffers_kept",
    "halves",
    "paired",
]

_BETAS = (0.5, 0.999)
_REACH = 1e-2
"""How far the weights are moved, in norm, for a finite difference."""


class Measured(NamedTuple):
    """How well a mixture does.

    Args:
        loss: The mean of the user's loss over the examples.
        accuracy: Share of labels that it gets right; None where labels are no classes.
    """

    loss: float
    accuracy: float | None


class RelaxedRun:
    """Differentiable search in progress: what `RelaxedSearch.start` returns.

    A step trains the architecture parameters on the validation half, and then the network's
    weights on the training half.

    Args:
        method: The technique.
        net: The network.
        optimizer: Over the network's parameters.
        loss: `loss(output, batch) -> scalar`.
        forward: `forward(model, batch) -> output`.
        generator: Source of all randomness.
        options: Of the training of the weights.
        alphas: Those of an earlier run, which are only tuned here, with the weights: these
            then minimise the user's loss alone. None for new ones.

    Attributes:
        net: The network.
        sites: What is searched.
        alphas: The architecture parameters.
        sampler: What is told of each step of the weights.
        weights: The training of the weights.
        architecture: The training of the architecture parameters.
        fixed: Sites that are decided: name to the index of the choice.
    """

    def __init__(
        self,
        method: RelaxedSearch,
        net: Elastic,
        optimizer: Optimizer,
        *,
        loss: Loss,
        forward: Forward,
        generator: torch.Generator,
        options: StepOptions,
        alphas: Alphas | None = None,
    ) -> None:
        self.method = method
        self.net = net
        self.optimizer = optimizer
        self.loss = loss
        self.forward = forward
        self.generator = generator
        self.options = options
        self.relaxation = method.relaxation().drawing_from(generator)
        self.sites = tuple(self.relaxation.sites(net))
        self.fixed: dict[str, int] = {}
        self._weighing = method.weighing()
        self.alphas = Alphas(self.sites, generator, net.device) if alphas is None else alphas
        learning = method if alphas is None else RelaxedSearch()  # tuning is plain training
        self.sampler = learning.sampler(self)
        self.weights = SizesRun(
            net,
            optimizer,
            self.sampler,
            learning.criterion(self),
            forward=self._forward,
            generator=generator,
            teachers=learning.teachers(self),
            options=options,
        )
        adam = Adam(
            self.alphas.parameters(),
            lr=method.lr,
            betas=_BETAS,
            weight_decay=method.weight_decay,
        )
        self.architecture = SizesRun(
            self.alphas,
            adam,
            WholeOnly(None, role="alphas"),
            Labels(self._architecture_loss),
            forward=lambda _, batch: batch,  # the loss runs the network
            options=StepOptions(precision=options.precision),
        )

    # What `supple.train` asks of a run.

    @property
    def lr(self) -> float:
        """The learning rate of the weights in the last step."""
        return self.weights.lr

    @property
    def passes(self) -> int:
        """How many forwards and backwards there were."""
        return self.weights.passes + self.architecture.passes

    @property
    def average(self) -> Average | None:
        """The running average of the weights, if there is one."""
        return self.weights.average

    @property
    def watched(self) -> dict[str, Any] | None:
        """What the last watched step was like."""
        return self.weights.watched

    def step(self, batch: Any) -> dict[str, float]:
        """Trains the architecture parameters, then the weights.

        Args:
            batch: Two batches, or one that is split in the middle (`halves`).

        Returns:
            The loss of `alphas`, on the validation half, unless they are frozen, and that of
            `weights`, on the training half.

        Raises:
            SuppleError: A loss is not finite.
            SettingError: The batch can't be split.
        """
        both = halves(batch)
        losses: dict[str, float] = {}
        if not self.method.rests(self) and len(self.fixed) < len(self.sites):
            losses |= self.architecture.step(both)
        return losses | self.weights.step(both.train)

    def mixture(self, *, draw: bool = False) -> dict[str, Tensor]:
        """Gives the weights of all choices, with gradients to the architecture parameters.

        Args:
            draw: Whether they are drawn, as for a step, or the expected ones.

        Returns:
            Site name to weights, shape (choices,); sites that are decided have one weight 1.
        """
        weights = {}
        for name, alpha in self.alphas.items():
            if name in self.fixed:
                weights[name] = torch.zeros_like(alpha)
                weights[name][self.fixed[name]] = 1.0
            elif draw:
                weights[name] = self._weighing.drawn(alpha, self.generator)
            else:
                weights[name] = self._weighing.expected(alpha)
        return weights

    @contextlib.contextmanager
    def relaxed(self, weights: Weights | None = None) -> Iterator[None]:
        """Makes the network run as a mixture inside the block.

        Args:
            weights: By site; None for the expected ones, as constants.
        """
        if weights is None:
            weights = {name: each.detach() for name, each in self.mixture().items()}
        with self.relaxation.applied(self.net, weights):
            yield

    def fix(self, name: str, choice: int) -> None:
        """Decides a site: from here on it runs one choice alone.

        Args:
            name: A site that is searched.
            choice: One of its choices.

        Raises:
            SettingError: There is no such site or choice.
        """
        choices = {site.name: site.choices for site in self.sites}
        if choice not in choices.get(name, ()):
            raise SettingError(
                f"site {name!r} must be one of {', '.join(choices)} and its choice one of its "
                f"own, got {choice!r}"
            )
        self.fixed[name] = choices[name].index(choice)

    def derive(self) -> Config:
        """Gives the config of decided sites and largest architecture parameters.

        Sites that are not searched are full.
        """
        best = {name: int(alpha.argmax()) for name, alpha in self.alphas.items()} | self.fixed
        return self.net.space.config(
            {site.name: site.choices[best[site.name]] for site in self.sites}
        )

    def renewed(self, *, rate: float) -> RelaxedRun:
        """Begins another run with what this one has learned, at a constant learning rate.

        The network, the architecture parameters with their optimizer, and what is decided stay;
        the optimizer of the weights forgets its moments. The weights minimise the user's loss
        alone, whatever else the technique has them learn from.

        Args:
            rate: Learning rate of the weights, relative to the one this run began with.

        Returns:
            The other run; this one must not go on.
        """
        self.weights.restart()
        base = self.weights.state_dict()["base_lr"]
        for group, lr in zip(self.optimizer.param_groups, base, strict=True):
            group["lr"] = rate * lr
        again = RelaxedRun(
            self.method,
            self.net,
            self.optimizer,
            loss=self.loss,
            forward=self.forward,
            generator=self.generator,
            options=StepOptions(clip=self.options.clip, precision=self.options.precision),
            alphas=self.alphas,
        )
        again.architecture = self.architecture
        again.fixed = self.fixed
        return again

    @torch.no_grad()
    def measure(self, data: Iterable[Any], weights: Weights | None = None) -> Measured:
        """Measures the network as a mixture, on batches.

        Dropout is off. Normalization uses the statistics of each batch where the network is in
        training mode, as it must where weights are others than it was trained with; running
        statistics stay as they are.

        Args:
            data: Batches, at least one.
            weights: By site; None for the expected ones.

        Raises:
            SettingError: There is no batch.
        """
        right = counted = examples = 0
        total = 0.0
        module = self.net.module
        with without_dropout(module), buffers_kept(module), self.relaxed(weights):
            for batch in data:
                output = self.forward(module, batch)
                size = batch_size(batch)
                examples += size
                total += size * float(self.loss(output, batch))
                hits = _hits(output, batch)
                right, counted = right + int(hits.sum()), counted + hits.numel()
        if not examples:
            raise SettingError("there is no batch to measure on")
        return Measured(total / examples, right / counted if counted else None)

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later but the weights and their optimizer."""
        adam = self.architecture.optimizer
        return {
            "weights": self.weights.state_dict(),
            "architecture": self.architecture.state_dict(),
            "alphas": {name: alpha.detach().clone() for name, alpha in self.alphas.items()},
            "moments": {
                name: {kind: value.clone() for kind, value in adam.state[alpha].items()}
                for name, alpha in self.alphas.items()
            },
            "fixed": dict(self.fixed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            CheckpointError: It is of a search over other sites.
        """
        if list(state["alphas"]) != list(self.alphas):
            raise CheckpointError(
                f"this state is of a search over {list(state['alphas'])}, the network's sites "
                f"are {list(self.alphas)}"
            )
        self.fixed = dict(state["fixed"])
        adam = self.architecture.optimizer
        with torch.no_grad():
            for name, alpha in self.alphas.items():
                alpha.copy_(state["alphas"][name])
                moments = state["moments"][name]
                adam.state[alpha] = {kind: value.clone() for kind, value in moments.items()}
        self.architecture.load_state_dict(state["architecture"])
        self.weights.load_state_dict(state["weights"])

    # ------------------------------------------------------------------------- internals

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        if model is not self.net.module:  # a teacher knows its own mixture
            return self.forward(model, batch)
        with torch.no_grad():
            weights = self.mixture(draw=True)
        with self.relaxation.applied(self.net, weights):
            return self.forward(model, batch)

    def _architecture_loss(self, _: Any, batch: Halves) -> Tensor:
        """Gives the loss of the validation half, with its gradient by the parameters.

        The gradient is taken by the mixture's weights; the term added to the loss is 0 and
        hands it on to the architecture parameters.
        """
        mixture = self.mixture(draw=True)
        weights = {
            name: each.detach().requires_grad_(name not in self.fixed)
            for name, each in mixture.items()
        }
        with buffers_kept(self.net.module):
            if self.method.order == "first":
                loss = self._mixed_loss(weights, batch.validation)
                gradients = _gradients(loss, _free(weights))
            else:
                loss, gradients = self._unrolled(weights, batch)
        moves = [
            mixture[name] - mixture[name].detach() for name in mixture if name not in self.fixed
        ]
        total = loss.detach()
        for gradient, move in zip(gradients, moves, strict=True):
            total = total + (gradient * move).sum()
        penalty = self.method.penalty(self, mixture)
        return total if penalty is None else total + penalty

    def _mixed_loss(self, weights: Weights, batch: Any) -> Tensor:
        with self.relaxation.applied(self.net, weights):
            return self.loss(self.forward(self.net.module, batch), batch)

    def _unrolled(self, weights: Weights, batch: Halves) -> tuple[Tensor, list[Tensor]]:
        r"""Gives the loss after one step of the weights, and its gradient by the mixture's.

        Liu et al. 2019, eq. 7 and 8: with $w' = w - \xi \nabla_w L_{train}(w, a)$ it is
        $\nabla_a L_{val}(w', a) - \xi (\nabla_a L_{train}(w^+, a) - \nabla_a
        L_{train}(w^-, a)) / 2 \epsilon$, where $w^\pm = w \pm \epsilon \nabla_{w'}
        L_{val}(w', a)$ and $\epsilon = 0.01 / \lVert \nabla_{w'} L_{val}(w', a) \rVert$.
        """
        rate, owners, mixed = self.weights.lr, self._parameters(), _free(weights)
        trained = self._mixed_loss(weights, batch.train)
        step = self._sgd_step(owners, _gradients(trained, owners))
        with _moved(owners, step, -rate):
            loss = self._mixed_loss(weights, batch.validation)
            both = _gradients(loss, [*mixed, *owners])
        direct, direction = both[: len(mixed)], both[len(mixed) :]
        norm = torch.stack([each.norm() for each in direction]).norm()
        if not norm:
            return loss, direct
        reach = float(_REACH / norm)
        sides = []
        for sign in (1.0, -1.0):
            with _moved(owners, direction, sign * reach):
                sides.append(_gradients(self._mixed_loss(weights, batch.train), mixed))
        return loss, [
            one - rate * (plus - minus) / (2 * reach)
            for one, plus, minus in zip(direct, *sides, strict=True)
        ]

    def _sgd_step(self, owners: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """What SGD would subtract, times the learning rate: momentum and decay included."""
        held = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        steps = []
        for owner, gradient in zip(owners, gradients, strict=True):
            group = held.get(id(owner), {})
            step = gradient + group.get("weight_decay", 0.0) * owner.detach()
            buffer = self.optimizer.state.get(owner, {}).get("momentum_buffer")
            steps.append(step if buffer is None else step + group["momentum"] * buffer)
        return steps

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.net.module.parameters() if p.requires_grad]


def _free(weights: Weights) -> list[Tensor]:
    """The weights that are learned: those of sites that are not decided."""
    return [each for each in weights.values() if each.requires_grad]


def _hits(output: Any, batch: Any) -> Tensor:
    """Whether each label was the most likely class; none where labels are no classes."""
    try:
        logits = logits_of(output)
    except SettingError:
        return torch.zeros(0)
    where = learnable(batch, logits)
    if where is None:
        return torch.zeros(0)
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return (logits.argmax(-1) == labels)[where]


def _gradients(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, of, strict=True)]


@contextlib.contextmanager
def _moved(owners: Sequence[Tensor], directions: Sequence[Tensor], by: float) -> Iterator[None]:
    """Moves parameters inside the block, and puts back exactly what they were."""
    before = [owner.detach().clone() for owner in owners]
    try:
        with torch.no_grad():
            for owner, direction in zip(owners, directions, strict=True):
                owner.add_(direction, alpha=by)
        yield
    finally:
        with torch.no_grad():
            for owner, value in zip(owners, before, strict=True):
                owner.copy_(value)


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leaves a module's buffers, running statistics among them, as they are.

    Args:
        module: Any network.

    Yields:
        Nothing; what the block wrote to buffers is undone.
    """
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


# ------------------------------------------------------------------------------- techniques


@dataclass(frozen=True, kw_only=True)
class RelaxedSearch(Rule):
    """Base of searches by gradients: the bilevel training of DARTS.

    Args:
        lr: Learning rate of the architecture parameters, above 0, by Adam with betas 0.5 and
            0.999. That of the weights is their optimizer's.
        weight_decay: Of the architecture parameters, at least 0.
        order: `first` takes the weights as they are; `second` takes the gradient through one
            step of the weights, by finite differences, at three more passes per step.
        frozen: Whether the architecture parameters stay where they start, so that the network
            is trained as a nearly even mixture.
    """

    lr: float = 3e-4
    weight_decay: float = 1e-3
    order: Literal["first", "second"] = "first"
    frozen: bool = False

    def __post_init__(self) -> None:
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise SettingError(
                "lr must be above 0 and weight_decay at least 0, got "
                f"{self.lr} and {self.weight_decay}"
            )
        if self.order not in get_args(Literal["first", "second"]):
            raise SettingError(f"order must be 'first' or 'second', got {self.order!r}")

    @classmethod
    def toy(cls) -> Any:
        """Gives a small network with two places at which an option is to be chosen."""
        with kept(0):
            layers = nn.Sequential(
                nn.Linear(5, 7),
                Choice(nn.Identity(), nn.Linear(7, 7)),
                nn.ReLU(),
                Choice(nn.Linear(7, 7), nn.Sequential(nn.ReLU(), nn.Linear(7, 7))),
                nn.Linear(7, 3),
            )
        return elastic(layers.train(), (torch.zeros(2, 5),), axes=[Operator()], verify=False)

    def relaxation(self) -> Relaxation:
        """Says how the network runs as a mixture."""
        return OutputMixture()

    def weighing(self) -> Weighing:
        """Says how architecture parameters become weights."""
        return Softmax()

    def criterion(self, run: RelaxedRun) -> Criterion:
        """Says what the weights minimise; by default the user's loss.

        Args:
            run: The run that begins; its `weights` are not there yet.
        """
        return Labels(run.loss)

    def teachers(self, run: RelaxedRun) -> Mapping[str, nn.Module]:
        """Gives networks whose outputs the criterion looks at, by role; by default none.

        Args:
            run: The run that begins; its `sampler` is there, its `weights` are not yet.
        """
        return {}

    def sampler(self, run: RelaxedRun) -> Sampler:
        """Gives what is told of each step of the weights; its one pass has role `weights`.

        Args:
            run: The run that begins; its `weights` are not there yet.
        """
        return WholeOnly(None, role="weights")

    def rests(self, run: RelaxedRun) -> bool:
        """Says whether the next step leaves the architecture parameters alone.

        Args:
            run: The run.
        """
        return self.frozen

    def penalty(self, run: RelaxedRun, weights: Weights) -> Tensor | None:
        """Gives what the architecture parameters minimise beside the loss; by default nothing.

        Args:
            run: The run.
            weights: The mixture of this step, by site.
        """
        return None

    def start(
        self,
        net: Elastic,
        optimizer: Optimizer,
        *_: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> RelaxedRun:
        """Begins to train a network and its architecture parameters.

        Args:
            net: An elastic network.
            optimizer: Over the parameters of `net.module`.
            loss: `loss(output, batch) -> scalar`.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
            generator: Source of all randomness; None for one with seed 0.
            options: Of the training of the weights: clipping, precision, schedule, ...

        Returns:
            A run with `step(batch) -> losses by role`, `derive() -> Config`, `state_dict` and
            `load_state_dict`. A batch is a pair of two, or is split in the middle.

        Raises:
            SettingError: `net` is a plain module, or has no site that can be mixed.
        """
        if isinstance(net, nn.Module):
            raise SettingError(
                f"{type(self).__name__} searches an elastic network, got a plain "
                f"{type(net).__name__}; make one with supple.elastic(model, example_inputs)"
            )
        if not self.relaxation().sites(net):
            axes = sorted({site.axis for site in net.space.sites})
            raise SettingError(
                f"{type(self).__name__} finds nothing to mix: the network's sites are of axes "
                f"{', '.join(axes)}; it needs supple.layers.Choice and axes=[supple.Operator()]"
            )
        return RelaxedRun(
            self,
            net,
            optimizer,
            loss=loss,
            forward=forward or run_model,
            generator=torch.Generator().manual_seed(0) if generator is None else generator,
            options=options or StepOptions(),
        )

    def derive(
        self, run: RelaxedRun, train: Iterable[Any], validation: Iterable[Any]
    ) -> Config:
        """Decides all sites when training is over; by default by the largest parameters.

        Args:
            run: A run that was trained.
            train: Batches of the training half, to be read again.
            validation: Batches of the validation half, to be read again.

        Returns:
            A config of the network's space.
        """
        return run.derive()

    def search(
        self,
        net: Elastic,
        train: Any,
        validation: Any,
        loss: Loss,
        *,
        optimizer: Optimizer,
        epochs: int = 50,
        forward: Forward | None = None,
        seed: int = 0,
        options: StepOptions | None = None,
    ) -> Config:
        """Trains and decides: the whole search in one call.

        Args:
            net: An elastic network; its weights change.
            train: Batches that the weights learn from, to be read once per epoch.
            validation: Batches that the architecture parameters learn from, of a set of its
                own; read again where it has fewer.
            loss: `loss(output, batch) -> scalar`.
            optimizer: Over the parameters of `net.module`.
            epochs: Passes through the training half, at least 1.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
            seed: Of everything random but what the network draws.
            options: Of the training of the weights; None for none but the number of steps.

        Returns:
            A config, which `net.extract` takes.

        Raises:
            SettingError: A value can't be used, or there is nothing to mix.
        """
        if epochs < 1:
            raise SettingError(f"epochs must be at least 1, got {epochs}")
        if options is None:
            options = StepOptions(
                steps=epochs * len(train) if isinstance(train, Sized) else None
            )
        source = torch.Generator().manual_seed(seed)
        with modes_kept(net.module):
            net.train()
            run = self.start(
                net, optimizer, loss=loss, forward=forward, generator=source, options=options
            )
            for epoch in range(epochs):
                for batch in paired(train, validation, epoch=epoch, seed=seed):
                    run.step(batch)
            return self.derive(run, train, validation)
