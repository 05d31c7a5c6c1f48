"""LightHuBERT: sizes predict what a teacher makes of inputs that are hidden from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.axes.base import selected
from supple.axes.beside import Beside
from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Space
from supple.supernet.base import Phase, PhasedSampler, RandomSampler, SupernetRule
from supple.technique import register
from supple.training.batches import Forward, Loss, mapped, run_model
from supple.training.features import Features, WithFeatures
from supple.training.losses import Criterion, Earlier
from supple.training.seeds import kept
from supple.training.step import Network, Pass, Sampler, SizesRun, StepOptions, WholeOnly

__all__ = ["LightHuBERT", "MaskedPrediction", "MaskedRegression", "spans", "target"]

_TEACHER, _HEAD, _MASK = "teacher", "supple_head", "supple_mask"
_LEAST = 1e-5  # as in layer norms


@register(title="LightHuBERT", paper="arXiv:2203.15610")
@dataclass(frozen=True, kw_only=True)
class LightHuBERT(SupernetRule):
    r"""Distils a transformer into all its sizes by masked prediction of hidden states.

    The student sees its inputs with spans replaced by a learned vector $m$, the frozen teacher
    sees all of them. In the hidden places $M$ the student's last hidden state $h$ predicts
    what the teacher makes of them, the average of its upper $k$ layers $t^l$, each normalised
    so that none outweighs the others:

    $$\frac{1}{|M|} \sum_{i \in M} \lVert W_{:, :w} h_i - y_i \rVert, \quad
    y = \frac 1 k \sum_{l > L - k} \text{norm}(t^l),$$

    where $\lVert \cdot \rVert$ is the mean absolute or squared difference and $w$ the width
    of the student: narrower ones use the first columns of the head $W$ and the first elements
    of $m$. Stage 1 trains the largest size alone; stage 2 goes on from there with a random
    size in each step. $W$ and $m$ belong to training: extracted networks don't have them.

    Args:
        tune: Share of the steps that stage 1 has, from 0 (no stage 1) to below 1.
        masked: Path of the module whose output, of shape (N, tokens, width), is masked.
        layers: Pattern (shell style, no deeper than it has dots) for the paths of the layers,
            in the student and in the teacher.
        top: Of how many upper layers of the teacher the target is the average, at least 1.
        coverage: Expected share of tokens in masked spans, in (0, 1]; as spans may overlap,
            fewer are masked.
        span: Tokens in a masked span, at least 1; shorter inputs have shorter spans.
        norm: How the teacher's layers are normalised: `"instance"` each feature over the
            tokens of an input, `"layer"` each token over its features.
        distance: `"l1"` or `"l2"`, the mean absolute or the mean squared difference.
        labels: Weight of the user's loss (on masked inputs) beside the regression, at least 0.
        teacher: Who teaches; None for the full network as it is when training begins.

    Example:
        ```python
        net = supple.elastic(bert, kwargs=batch, axes=[supple.Width((0.5, 1.0))])
        method = LightHuBERT(
            masked="embeddings.word_embeddings", layers="encoder.layer.*", top=4, span=3
        )
        supple.train(net, texts, loss, method=method, optimizer="adamw", lr=5e-4, epochs=10)
        ```

    Source:
        Wang et al. 2022, "LightHuBERT: Lightweight and Configurable Speech Representation
        Learning with Once-for-All Hidden-Unit BERT", arXiv:2203.15610;
        mechanicalsea/lighthubert (the model; the training code is not in it).
    Differs:
        Any transformer. How targets are normalised and compared could not be checked against
        the authors' training: it follows data2vec. $m$ begins as zero and not as uniform random
        numbers, which fit features of one scale only. All inputs of a batch have as many spans,
        at least one (the authors' two), and masks are not thinned to equally many tokens. Sizes
        are drawn site by site.
    Checked:
        Both stages' steps against gradients computed by hand, the head's slice included; masks
        and targets against direct computation; the teacher sees no mask.
    """

    distinguishing: ClassVar[str] = "criterion"

    tune: float = 0.5
    masked: str = "feature_projection"
    layers: str = "encoder.layers.*"
    top: int = 8
    coverage: float = 0.65
    span: int = 10
    norm: str = "instance"
    distance: str = "l2"
    labels: float = 0.0
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tune < 1:
            raise SettingError(f"tune must be from 0 to below 1, got {self.tune}")
        if not 0 < self.coverage <= 1:
            raise SettingError(f"coverage must be in (0, 1], got {self.coverage}")
        for name in ("top", "span"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, offered in (("norm", ("instance", "layer")), ("distance", ("l1", "l2"))):
            got = getattr(self, name)
            if got not in offered:
                raise SettingError(f"{name} must be {' or '.join(offered)}, got {got!r}")
        if not self.labels >= 0:
            raise SettingError(f"labels must be at least 0, got {self.labels}")

    @classmethod
    def examples(cls) -> list[LightHuBERT]:
        # the regression alone would not lower a user's loss, which conformance looks at
        toy = cls(masked="embed", layers="blocks.*", top=2, coverage=0.4, span=2, labels=1.0)
        return [toy, replace(toy, tune=0.0, norm="layer", distance="l1")]

    @classmethod
    def toy(cls) -> nn.Module:
        with kept(0):
            return _Toy()

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        stages = [Phase(1 - self.tune, RandomSampler(space, generator))]
        if self.tune:
            stages.insert(0, Phase(self.tune, WholeOnly(space.largest())))
        if self.teacher is None:
            stages[0] = replace(stages[0], enter=_keep_teacher)
        return PhasedSampler(stages)

    def criterion(self, loss: Loss) -> Criterion:
        return MaskedRegression(loss, self.distance, self.labels)

    def teachers(self, net: Network) -> Mapping[str, nn.Module]:
        return {} if self.teacher is None else {_TEACHER: self.teacher}

    def adapt(self, net: Network) -> None:
        """Gives the network the head and the vector that masks.

        Args:
            net: The network that is going to be trained.

        Raises:
            SettingError: Its sizes share their weights in another way already, or a module
                that the settings name is not there.
        """
        assert isinstance(net, Elastic)
        if isinstance(net.sharing, Beside):
            return
        if net.sharing is not None:
            raise SettingError(
                f"LightHuBERT needs a network whose sizes share all weights, got one with "
                f"{net.sharing!r}; make it anew with supple.elastic"
            )
        own = self._widths(net.module, net)
        theirs = own if self.teacher is None else self._widths(self.teacher, net)
        net.share(Beside(((_HEAD, (theirs[1], own[1])), (_MASK, (own[0],)))))

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *rest: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        source = torch.Generator().manual_seed(0) if generator is None else generator
        student = net if isinstance(net, nn.Module) else net.module
        return super().start(
            net,
            optimizer,
            *rest,
            loss=loss,
            forward=self.prediction(student, source, forward or run_model),
            generator=source,
            options=options,
        )

    def prediction(
        self, student: nn.Module, generator: torch.Generator, forward: Forward = run_model
    ) -> MaskedPrediction:
        """Gives the `forward` of training, which also serves to score sizes on held-out data.

        Args:
            student: The module of a network that was given its head (`adapt`).
            generator: Source of the masks.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
        """
        return MaskedPrediction(self, student, generator, forward)

    def _widths(self, model: nn.Module, net: Elastic) -> tuple[int, int]:
        """Width of what is masked, and of the hidden states, on the example inputs."""
        paths = blocks(model, self.layers)
        if self.masked in dict(model.named_modules()):
            paths = [self.masked, *paths]
        elif model is net.module:
            WithFeatures([self.masked])(model, None)  # tells what there is
        args, kwargs = mapped((net.args, net.kwargs), lambda x: x.to(net.device))
        with torch.no_grad():
            seen = WithFeatures(paths, lambda copied, _: copied(*args, **kwargs))(
                copy.deepcopy(model).eval(), None
            )
        widths = [_hidden(seen.features[path]).shape[-1] for path in paths]
        return widths[0], widths[-1]


def _keep_teacher(run: SizesRun) -> None:
    run.keep_teacher(_TEACHER)


# --------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class MaskedPrediction:
    """A `forward=`: the student predicts from masked inputs, teachers give targets from all.

    For the student, `features` are `prediction`, of shape (N, tokens, teacher's width), and
    `masked`, true in the places that were hidden; for any other model they are `target`.

    Args:
        method: The settings.
        student: The network that trains.
        generator: Source of the masks: one number is drawn for each run of the student.
        forward: `forward(model, batch) -> output`; by default by the batch's type.
    """

    method: LightHuBERT
    student: nn.Module
    generator: torch.Generator
    forward: Forward = run_model

    def __call__(self, model: nn.Module, batch: Any) -> Features:
        """Runs a model on a batch."""
        if model is self.student:
            return self._predicted(model, batch)
        paths = blocks(model, self.method.layers)
        if len(paths) < self.method.top:
            raise SettingError(
                f"top must be at most the teacher's {len(paths)} layers, got {self.method.top}"
            )
        seen = WithFeatures(paths[-self.method.top :], self.forward)(model, batch)
        states = [_hidden(state) for state in seen.features.values()]
        return Features(
            seen.output, {"target": target(states, self.method.norm, _attended(batch))}
        )

    def _predicted(self, model: nn.Module, batch: Any) -> Features:
        drawn: dict[str, Tensor] = {}

        def hide(embedded: Tensor) -> Tensor:
            if not isinstance(embedded, Tensor) or embedded.dim() != 3:
                raise SettingError(
                    f"masked names '{self.method.masked}', whose output is not of shape "
                    "(N, tokens, width)"
                )
            count, tokens, width = embedded.shape
            places = spans(
                count, tokens, self.method.coverage, self.method.span, self.generator
            ).to(embedded.device)
            where = _attended(batch)
            drawn["masked"] = places if where is None else places & where.bool()
            vector = model.get_parameter(_MASK)[:width].to(embedded.dtype)
            return torch.where(drawn["masked"][..., None], vector, embedded)

        paths = blocks(model, self.method.layers)
        seen = WithFeatures(paths, self.forward, {self.method.masked: hide})(model, batch)
        if not seen.features:
            raise SettingError("the smallest size has no layer; leave at least one in Depth")
        hidden = _hidden(list(seen.features.values())[-1])
        head = model.get_parameter(_HEAD)[:, : hidden.shape[-1]]
        return Features(seen.output, {"prediction": F.linear(hidden, head), **drawn})


@dataclass(frozen=True)
class MaskedRegression:
    """The distance of the student's predictions to the teacher's targets, in masked places.

    Args:
        loss: `loss(output, batch) -> scalar`, of the model's output.
        distance: `"l1"` or `"l2"`.
        labels: Weight of `loss`.
    """

    loss: Loss
    distance: str = "l2"
    labels: float = 0.0
    teachers: frozenset[str] = field(default=frozenset({_TEACHER}))

    def __call__(self, entry: Pass, output: Features, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the scalar to minimise."""
        (taught,) = earlier[_TEACHER]
        total = self.regression(output, taught)
        if self.labels:
            total = total + self.labels * self.loss(output.output, batch)
        return total

    def regression(self, student: Features, teacher: Features) -> Tensor:
        """Gives the distance alone, which also ranks sizes on held-out data.

        Args:
            student: What `MaskedPrediction` gave of the student.
            teacher: The same of the teacher, on the same batch.
        """
        away = student.features["prediction"] - teacher.features["target"].detach()
        each = (away.abs() if self.distance == "l1" else away**2).mean(-1)
        masked = student.features["masked"]
        return (each * masked).sum() / masked.sum().clamp(min=1)


def spans(
    count: int, tokens: int, coverage: float, span: int, generator: torch.Generator
) -> Tensor:
    """Draws which tokens of each input are masked, in spans that may overlap.

    Args:
        count: How many inputs.
        tokens: How many tokens each has.
        coverage: Expected share of tokens in spans.
        span: Tokens in a span, at most `tokens` are.
        generator: Source of randomness; one number is drawn from it, whatever the shape.

    Returns:
        True where masked, shape (count, tokens); each input has at least one span, and all
        have as many.

    Example:
        >>> spans(2, 6, 0.5, 3, torch.Generator().manual_seed(0)).sum(1).tolist()
        [3, 3]
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    source = torch.Generator().manual_seed(seed)
    span = min(span, tokens)
    places = tokens - span + 1
    # rounded at random, so that the expected number is what was asked for
    wanted = int(coverage * tokens / span + torch.rand((), generator=source).item())
    starts = torch.rand(count, places, generator=source).argsort(1)[:, : max(1, wanted)]
    inside = (starts[..., None] + torch.arange(span)).flatten(1)
    return torch.zeros(count, tokens, dtype=torch.bool).scatter_(1, inside, True)


def target(states: Sequence[Tensor], norm: str, where: Tensor | None = None) -> Tensor:
    """Averages a teacher's layers, each normalised.

    Args:
        states: The layers' outputs, each of shape (N, tokens, width).
        norm: `"instance"` or `"layer"`, as in `LightHuBERT`.
        where: Which tokens count, shape (N, tokens); the others are padding.

    Returns:
        Shape (N, tokens, width), in float32 at least.

    Example:
        >>> target([torch.tensor([[[1.0], [3.0]]])], "instance").flatten().round().tolist()
        [-1.0, 1.0]
    """
    wide = [x.float() if x.dtype.itemsize < 4 else x for x in states]
    if norm == "layer":
        return torch.stack([F.layer_norm(x, x.shape[-1:]) for x in wide]).mean(0)
    every = torch.ones_like(wide[0][..., :1])
    counts = every if where is None else where[..., None].to(every)
    return torch.stack([_over_tokens(x, counts) for x in wide]).mean(0)


def _over_tokens(x: Tensor, counts: Tensor) -> Tensor:
    number = counts.sum(1, keepdim=True).clamp(min=1)
    centred = x - (x * counts).sum(1, keepdim=True) / number
    variance = (centred**2 * counts).sum(1, keepdim=True) / number
    normed: Tensor = centred / (variance + _LEAST).sqrt()
    return normed


def blocks(model: nn.Module, pattern: str) -> list[str]:
    """Lists the paths of a model's layers in the order in which the model holds them.

    Args:
        model: The model.
        pattern: Shell-style; paths with more dots don't match.

    Raises:
        SettingError: No module matches.

    Example:
        >>> blocks(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())), "*")
        ['0', '1']
    """
    dots = pattern.count(".")
    paths = [path for path, _ in model.named_modules() if path and path.count(".") == dots]
    found = [path for path in paths if selected(path, pattern)]
    if not found:
        raise SettingError(
            f"layers is {pattern!r}, which matches no module of {type(model).__name__}; it has "
            f"{', '.join(paths[:5]) or 'none that deep'}"
        )
    return found


def _hidden(output: Any) -> Tensor:
    """A layer's hidden states, also where it returns more beside them."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _attended(batch: Any) -> Tensor | None:
    """Which tokens are no padding, where a batch tells."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class _Toy(nn.Module):
    """Three residual layers over five tokens of one number each, (N, 5) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.place = nn.Parameter(torch.randn(5, 8))
        self.blocks = nn.Sequential(*[_Block() for _ in range(3)])
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.blocks(self.embed(x[..., None]) * self.place)
        logits: Tensor = self.read(states.mean(1))
        return logits


class _Block(nn.Module):
    """Looks at a token and at the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.down(self.up(x + x.mean(1, keepdim=True)).tanh())
        return x + changed
