"""Training with rounded weights and inputs: what such rules have in common, and the baselines.

A rule says how a weight and an input are rounded while the network is trained. `wrap` puts
layers that do so in the places of linear layers and convolutions, and `finished` puts layers
there that hold packed codes:

    rule = baseline("lsq", bits=3, activations=3)
    net = rule.wrap(model, args)
    supple.train(net, data, loss, method=rule, steps=300)
    small = rule.finished(net)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.calibrate import statistics
from supple.errors import SettingError, UnsupportedModelError, nearest
from supple.formats import Granularity, Int, QuantSpec
from supple.layers.fake_quantize import Estimator, FakeQuantize, FakeQuantized
from supple.network import Elastic, elastic
from supple.quantize._fold import folds
from supple.quantize.base import MOST_BITS, Input, Weights, rounded_input
from supple.rebuild import note_transform, replace
from supple.training.batches import Forward, Loss
from supple.training.companion import Companion, CompanionRule
from supple.training.step import Network, module_of
from supple.transforms import check_finite
from supple.weights import matrices

__all__ = ["BASELINES", "QAT", "Rounding", "RoundingRule", "baseline", "toy", "wrapped"]

_SAMPLES = 4096
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class RoundingRule(CompanionRule):
    """Trains a network whose weights and layer inputs are rounded in every forward pass.

    Args:
        bits: Of weights; at 16 they are not rounded.
        activations: Bits of the layers' inputs; at 16, or None, they are not rounded.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers and 2-d convolutions hold codes in place of weights in the
            end.
    """

    least_bits: ClassVar[int] = 2
    """The fewest that make sense."""

    bits: int = 4
    activations: int | None = 4
    layers: str = "*"
    packed: bool = True

    def __post_init__(self) -> None:
        for name in ("bits", "activations"):
            got = getattr(self, name)
            if got is not None and not self.least_bits <= got <= MOST_BITS:
                raise SettingError(
                    f"{name} must be from {self.least_bits} to {MOST_BITS}, got {got}"
                )

    # -- what a rule says

    @abstractmethod
    def of_weight(self, module: nn.Module, matrix: Tensor) -> nn.Module | None:
        """Gives what rounds a weight.

        Args:
            module: The layer.
            matrix: Its weight, (out, columns).

        Returns:
            A `FakeQuantize`, or another map of matrices; None to leave this weight as it is.
        """

    @abstractmethod
    def of_input(self, module: nn.Module, values: Tensor) -> nn.Module | None:
        """Gives what rounds the input of a layer.

        Args:
            module: The layer.
            values: Some of the values that it was given, least and most among them, shape (n,);
                a zero where inputs are not rounded.

        Returns:
            A `FakeQuantize`, or another map; None to leave this input as it is.
        """

    def norms(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> Mapping[str, str]:
        """Gives batch norms that layers take in: name of the weight to the norm's path.

        Args:
            model: The network.
            args: Positional example inputs.
            kwargs: Keyword example inputs.
        """
        return {}

    # -- how it is done

    @property
    def rounds_weights(self) -> bool:
        """Whether weights get fewer bits at all."""
        return self.bits < MOST_BITS

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of layers get fewer bits at all."""
        return self.activations is not None and self.activations < MOST_BITS

    def wrap(
        self,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Gives a copy whose layers round their weights and inputs.

        Args:
            model: The network.
            args: Positional example inputs, like those to come: ranges begin where theirs are.
            kwargs: Keyword example inputs.

        Returns:
            The copy; the model itself where nothing is rounded.

        Raises:
            SettingError: No layer matches, or a weight is not finite.
            UnsupportedModelError: Layers share a weight.
        """
        if not self.rounds_weights and not self.rounds_inputs:
            return model
        check_finite(model)
        model = copy.deepcopy(model)
        layers = matrices(model, self.layers)
        _check_own(model, layers)
        seen = _inputs(model, self.layers, args, kwargs) if self.rounds_inputs else {}
        norms = self.norms(model, args, kwargs)
        made: dict[str, nn.Module] = {}
        for name, module in layers.items():
            norm = model.get_submodule(norms[name]) if name in norms else None
            if norm is not None:
                made[norms[name]] = nn.Identity()
            path = name.rpartition(".")[0]
            made[path] = self._wrapped(module, seen.get(name), norm).train(module.training)
        return replace(model, made)

    def _wrapped(
        self, module: nn.Module, seen: Tensor | None, norm: nn.Module | None
    ) -> FakeQuantized:
        layer = FakeQuantized(module, norm=norm)
        matrix = layer.matrix().detach()
        layer.of_weight = self.of_weight(module, matrix)
        if isinstance(layer.of_weight, FakeQuantize):
            layer.of_weight.begin(matrix)
        # A layer that the example did not reach has seen nothing.
        values = torch.zeros(1) if seen is None else seen
        layer.of_input = self.of_input(module, values)
        if isinstance(layer.of_input, FakeQuantize) and layer.of_input.held:
            layer.of_input.begin(values)
        return layer.to(module.weight.device)  # type: ignore[arg-type]

    def attach(
        self,
        net: Network | nn.Module,
        optimizer: Optimizer,
        *,
        steps: int,
        generator: torch.Generator | None = None,
        loss: Loss | None = None,
        forward: Forward | None = None,
    ) -> Rounding:
        """Hooks the rounding to an optimizer.

        Raises:
            SettingError: The network is not what `wrap` gave, or the optimizer does not hold
                what is learned.
        """
        layers = wrapped(module_of(net))
        if not layers and (self.rounds_weights or self.rounds_inputs):
            raise SettingError(
                f"{type(self).__name__} trains a network that rounds: give what wrap(model, "
                "args, kwargs) returns"
            )
        _check_held(layers, optimizer)
        source = torch.Generator().manual_seed(0) if generator is None else generator
        return self.companion(layers, optimizer, steps, source)

    def companion(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> Rounding:
        """Gives what goes along with training.

        Args:
            layers: The layers that round, by path.
            optimizer: Over their parameters.
            steps: How many steps there will be.
            generator: Source of all randomness.
        """
        return Rounding(layers, optimizer, steps, generator)

    @torch.no_grad()
    def finished(self, net: Any) -> nn.Module:
        """Gives the network with codes in place of weights.

        Args:
            net: What `wrap` gave, trained; it stays as it is.

        Returns:
            A plain module, which computes the same.
        """
        model = copy.deepcopy(module_of(net))
        layers = wrapped(model)
        if not layers:
            return model
        made = {path: self._packed(layer) for path, layer in layers.items()}
        model = replace(model, made)
        return note_transform(model, model, self)

    def _packed(self, layer: FakeQuantized) -> nn.Module:
        plain, rounding = _folded(layer), layer.of_input
        given = _as_input(rounding) if isinstance(rounding, FakeQuantize) else None
        made: nn.Module | None = None
        if isinstance(layer.of_weight, FakeQuantize):
            found = layer.of_weight.quantized(layer.matrix())
            if self.packed:
                made = Weights().pack(plain, found, given)
        plain.weight.copy_(layer.rounded())
        if made is None:
            # What a file can't tell how to make stays within a layer that does nothing more.
            made = plain if type(plain) in _PLAIN else FakeQuantized(plain)
            made = made if given is None else rounded_input(made, given)
        if rounding is not None and given is None:
            made = FakeQuantized(made, of_input=rounding)
        return made.train(layer.training)


class Rounding(Companion):
    """What goes along with training: seeds of noise, and when norms are frozen.

    Args:
        layers: The layers that round, by path.
        optimizer: Over their parameters.
        steps: How many steps there will be.
        generator: Draws the first seed.
        until: Share of the steps after which norms are frozen.

    Attributes:
        layers: The layers.
    """

    def __init__(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
        *,
        until: float = 1.0,
    ) -> None:
        super().__init__(optimizer, steps)
        self.layers, self._until = dict(layers), until
        self._first = int(torch.randint(2**40, (), generator=generator))
        self._set(0)

    def after(self) -> None:
        """Gives each layer another seed, and freezes norms when it is time."""
        self._set(self.step + 1)

    def _set(self, step: int) -> None:
        for place, layer in enumerate(self.layers.values()):
            layer.frozen = step >= self._until * self.steps
            for rounding in (layer.of_weight, layer.of_input):
                if isinstance(rounding, FakeQuantize):
                    rounding.seed = self._first + step * len(self.layers) + place

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later."""
        return super().state_dict() | {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        super().load_state_dict(state)
        self._first = int(state["first"])
        self._set(self.step)


def wrapped(model: nn.Module) -> dict[str, FakeQuantized]:
    """Finds the layers that round, by path.

    Args:
        model: The network.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, FakeQuantized)
    }


def toy(rule: RoundingRule) -> Elastic:
    """Gives a small network for conformance, from 5 numbers to 3, always with the same weights.

    Args:
        rule: It has to leave a layer out, so that there is something whose size can vary.
    """
    source = torch.Generator().manual_seed(11)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(
            nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 3)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4, generator=source)
    x = torch.linspace(-1, 1, 10).reshape(2, 5)
    return elastic(rule.wrap(model, (x,)), (x,), verify=False)


def _check_own(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Checks that no other module has a layer's weight."""
    owners = Counter(
        id(one) for module in model.modules() for one in module._parameters.values()
    )
    for name, module in layers.items():
        if owners[id(module.weight)] > 1:
            raise UnsupportedModelError(
                f"several modules share '{name}', and only one of them would round it; leave "
                "the layer out by layers="
            )


def _check_held(layers: Mapping[str, FakeQuantized], optimizer: Optimizer) -> None:
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            learned = not name.startswith(("layer.", "norm."))
            if learned and parameter.requires_grad and id(parameter) not in held:
                raise SettingError(
                    f"the optimizer does not hold '{path}.{name}', which is learned; make it "
                    "of the parameters of what wrap gave"
                )


class _Sample:
    """Keeps some of the values that a layer is given, the outermost ones among them."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def see(self, rows: Tensor) -> None:
        """Takes more values, of any shape."""
        flat = rows.detach().flatten().float()
        some = flat[:: -(-len(flat) // _SAMPLES)]
        self._kept += [some, flat.amin().reshape(1), flat.amax().reshape(1)]

    def result(self) -> Tensor:
        """Gives the values, (n,)."""
        return torch.cat(self._kept)


def _inputs(
    model: nn.Module, layers: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """Gives some values of each layer's input."""
    found = statistics(
        model,
        [()],
        ["sample"],
        layers,
        forward=lambda module, _: module(*args, **(kwargs or {})),
        observers={"sample": _Sample},
    )
    return {name: one["sample"] for name, one in found.items()}


def _folded(layer: FakeQuantized) -> Any:
    """Gives the layer within, or a copy of it that needs its norm no more."""
    if layer.norm is None:
        return layer.layer
    plain: Any = copy.deepcopy(layer.layer)
    bias = layer.folded_bias()
    assert bias is not None
    plain.bias = nn.Parameter(bias.detach().clone(), plain.weight.requires_grad)
    return plain


def _as_input(rounding: FakeQuantize) -> Input | None:
    """Gives the rounding of an input as packed layers do it, None where they can't."""
    if rounding.shift or rounding.rotation is not None:
        return None
    if rounding.held:
        scale, zero = rounding.scales(torch.zeros(1))
        return rounding.spec, (scale.detach(), zero)
    return (rounding.spec, None) if rounding.observer == "minmax" else None


# ------------------------------------------------------------------------------- baselines


@dataclass(frozen=True, kw_only=True)
class QAT(RoundingRule):
    """Trains with rounding by one of the published ways: see `baseline`.

    Args:
        observer: Where the ranges of weights come from; see `FakeQuantize`.
        estimator: What stands for the gradient of rounding weights.
        input_observer: Where the ranges of inputs come from.
        input_estimator: What stands for the gradient of rounding inputs.
        granularity: Who shares a weight's scale: `"channel"` or `"tensor"`.
        narrow: Whether the lowest number of weights is left out, so that the range is
            symmetric.
        scale_format: How scales of weights are held.
        decay: Of running averages of inputs' ranges.
        fold: Whether batch norms are folded into the layers before them.
        until: Share of the steps after which the statistics of folded norms stay, in [0, 1].
    """

    observer: str = "learned"
    estimator: Estimator = "lsq"
    input_observer: str = "learned"
    input_estimator: Estimator = "lsq"
    granularity: Granularity = "channel"
    narrow: bool = False
    scale_format: str = "fp32"
    decay: float = 0.99
    fold: bool = False
    until: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("channel", "tensor"):
            raise SettingError(
                f"granularity must be channel or tensor, got {self.granularity!r}"
            )
        if not 0 <= self.until <= 1:
            raise SettingError(f"until must be in [0, 1], got {self.until}")
        FakeQuantize(self._spec(), observer=self.observer, estimator=self.estimator)
        self.of_input(nn.Identity(), torch.zeros(1))

    def _spec(self) -> QuantSpec:
        return QuantSpec(
            Int(self.bits, narrow=self.narrow),
            self.granularity,
            scale_format=self.scale_format,  # type: ignore[arg-type]
        )

    def of_weight(self, module: nn.Module, matrix: Tensor) -> FakeQuantize | None:
        """Gives what rounds a weight."""
        if not self.rounds_weights:
            return None
        spec = self._spec()
        return FakeQuantize(
            spec,
            observer=self.observer,
            estimator=self.estimator,
            scales=spec.scale_shape(matrix.shape),
        )

    def of_input(self, module: nn.Module, values: Tensor) -> FakeQuantize | None:
        """Gives what rounds the input: without negative numbers where none were seen."""
        if self.activations is None or not self.rounds_inputs:
            return None
        whole = Int(self.activations, symmetric=False)
        spec = QuantSpec(whole, "tensor", symmetric=False)
        if self.input_observer == "learned" and bool((values < 0).any()):
            narrow = self.input_estimator == "pact"
            spec = QuantSpec(Int(self.activations, narrow=narrow), "tensor")
        return FakeQuantize(
            spec,
            observer=self.input_observer,
            estimator=self.input_estimator,
            decay=self.decay,
        )

    def norms(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> Mapping[str, str]:
        """Gives the norms that can be folded into the layer before them."""
        if not self.fold:
            return {}
        chosen = matrices(model, self.layers)
        found = folds(model, args, kwargs)
        return {one.weight: one.norm for one in found if one.weight in chosen}

    def companion(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> Rounding:
        """Gives what freezes norms in time."""
        return Rounding(layers, optimizer, steps, generator, until=self.until)


BASELINES: Mapping[str, Mapping[str, Any]] = {
    "lsq": {"granularity": "tensor"},
    "lsq-channel": {},
    "pact": {
        "observer": "minmax",
        "estimator": "clipped",
        "narrow": True,
        "input_estimator": "pact",
    },
    "max": {
        "observer": "minmax",
        "estimator": "ste",
        "narrow": True,
        "input_observer": "minmax",
        "input_estimator": "ste",
    },
    "int8": {
        "bits": 8,
        "activations": 8,
        "observer": "minmax",
        "estimator": "clipped",
        "narrow": True,
        "input_observer": "ema",
        "input_estimator": "clipped",
        "fold": True,
    },
}
"""Settings of `QAT` by the name of a published way to train.

- `lsq`, `lsq-channel`: Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153.
- `pact`: Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural
  Networks", arXiv:1805.06085; for inputs, with weights by channel and their largest magnitude.
- `max`: scales from the largest magnitude, the gradient of the identity.
- `int8`: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
  inference: A whitepaper", arXiv:1806.08342, section 3.2: running averages of ranges, norms
  folded and frozen late.
"""


def baseline(name: str, **settings: Any) -> QAT:
    """Gives a published way to train with rounding that is no technique of its own here.

    Args:
        name: One of `BASELINES`.
        **settings: Of `QAT`: `bits`, `activations`, `layers`, or one of the baseline's own that
            is to differ.

    Returns:
        The rule.

    Raises:
        SettingError: There is no such baseline, or a setting can't be used.

    Example:
        >>> rule = baseline("lsq", bits=3, activations=None)
        >>> net = rule.wrap(nn.Sequential(nn.Linear(2, 1)), (torch.ones(1, 2),))
        >>> net[0].of_weight.spec.format.name, rule.finished(net)[0].spec.bits
        ('int3', 3)
    """
    if name not in BASELINES:
        raise SettingError(
            f"there is no baseline '{name}'{nearest(name, BASELINES)} "
            f"(baselines: {', '.join(BASELINES)})"
        )
    return QAT(**{**BASELINES[name], **settings})
