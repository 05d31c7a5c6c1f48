"""Routed: a router mixes each size's weights from several expert tensors."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.base import Learned, Sharing, Transform, selected
from supple.errors import SettingError
from supple.space import Config, Space

__all__ = ["Routed"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUTER = ("hidden", "hidden_bias", "out", "out_bias")


@dataclass(frozen=True)
class Routed(Sharing):
    r"""Weights that are mixed for each size from several expert tensors.

    A layer has experts $E_1 \dots E_m$ and a router with two layers, whose input is the size:
    the choice at each site relative to the largest one, and 0 where the site does not exist.
    Its softmax $r(a)$ gives the weights of size $a$, $W(a) = \sum_j r_j(a) E_j$, for the whole
    layer or for each of its outputs (rows of the weight, elements of the bias) separately.

    The full network $a^*$ keeps the module's own weights $W^*$. What is kept beside them are
    the differences $D_j = E_j - E_1$ of the other experts, so that
    $W(a) = W^* + \sum_{j > 1} (r_j(a) - r_j(a^*)) D_j$. This is the same mixture with
    $E_1 = W^* - \sum_{j > 1} r_j(a^*) D_j$, and as many numbers.

    Args:
        scales: Name, largest choice and full choice of each site of the space; see `of`.
        experts: $m$, at least 2.
        hidden: Width of the router's hidden layer.
        by: Whether a router gives one mixture per `layer`, or one per `neuron`.
        where: Only linear and convolution layers whose path matches this shell-style pattern;
            None for all of them. Transposed convolutions keep their weights.
        noise: Standard deviation of the differences at the start, relative to that of the
            weight, above 0: without a difference a router would get no gradient.

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> import supple
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = supple.elastic(model, torch.ones(2, 4), axes=[supple.Width((0.5, 1.0))])
        >>> net.share(Routed.of(net.space, where="0"))
        >>> list(net.sharing.routing({"0": 4}, model)["0"].shape)   # of two experts
        [2]

    Source:
        Jawahar et al. 2024, "Mixture-of-Supernets: Improving Weight-Sharing Supernet Training
        with Architecture-Routed Mixture-of-Experts", arXiv:2306.04845; UBC-NLP/MoS.
    """

    name: ClassVar[str] = "routed"

    scales: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)
    experts: int = 2
    hidden: int = 64
    by: Literal["layer", "neuron"] = "layer"
    where: str | None = None
    noise: float = 0.1

    def __post_init__(self) -> None:
        scales = tuple((name, int(most), int(full)) for name, most, full in self.scales)
        object.__setattr__(self, "scales", scales)
        if self.experts < 2:
            raise SettingError(f"experts must be at least 2, got {self.experts}")
        if self.hidden < 1:
            raise SettingError(f"hidden must be at least 1, got {self.hidden}")
        if self.by not in ("layer", "neuron"):
            raise SettingError(f"by must be 'layer' or 'neuron', got {self.by!r}")
        if not self.noise > 0:
            raise SettingError(f"noise must be above 0, got {self.noise}")

    @classmethod
    def of(
        cls,
        space: Space,
        *,
        experts: int = 2,
        hidden: int = 64,
        by: Literal["layer", "neuron"] = "layer",
        where: str | None = None,
        noise: float = 0.1,
    ) -> Routed:
        """Gives the mixture for the sizes of a space.

        Args:
            space: The sizes there are.
            experts: As above.
            hidden: As above.
            by: As above.
            where: As above.
            noise: As above.
        """
        scales = tuple((site.name, max(site.choices), site.full) for site in space.sites)
        return cls(scales, experts, hidden, by, where, noise)

    def own(self, model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, layer in self._layers(model):
            found.update(self._router_of(path, layer))
            for name, value in _owned(path, layer):
                scale = layer.get_parameter("weight").detach().std() * self.noise
                for number in range(1, self.experts):
                    key = _beside(name, f"expert_{number}")
                    found[key] = _normal(key, value) * scale
        return found

    def chosen(self, config: Config) -> None:
        return None  # the config is all that decides

    def weights(self, config: Config, model: nn.Module) -> dict[str, Transform]:
        own, full = self._inputs(config)
        if torch.equal(own, full):
            return {}
        sizes = torch.stack([own, full])
        change = partial(_mixed, sizes=sizes, experts=self.experts)
        return {
            name: Learned(
                change,
                (
                    *(_beside(f"{path}.weight", part) for part in _ROUTER),
                    *(_beside(name, f"expert_{n}") for n in range(1, self.experts)),
                ),
            )
            for path, layer in self._layers(model)
            for name, _ in _owned(path, layer)
        }

    def routing(self, config: Mapping[str, int], model: nn.Module) -> dict[str, Tensor]:
        """Gives the routers' mixtures for a size.

        Args:
            config: The size; sites that it does not name don't exist in it.
            model: The network that holds the routers.

        Returns:
            By path of the layer, shape (experts,), or (outputs, experts) where neurons have
            mixtures of their own.
        """
        size = self._inputs(config)[0]
        parameters = dict(model.named_parameters())
        found = {}
        for path, _ in self._layers(model):
            router = [parameters[_beside(f"{path}.weight", part)] for part in _ROUTER]
            found[path] = _route(size[None], router, self.experts)[0].squeeze(0)
        return found

    def _inputs(self, config: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        """What a router reads: the size, and the full one."""
        size = [config.get(name, 0) / max(most, 1) for name, most, _ in self.scales]
        full = [complete / max(most, 1) for _, most, complete in self.scales]
        return torch.tensor(size), torch.tensor(full)

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        owners = {id(p): name for name, p in model.named_parameters()}
        for path, layer in model.named_modules():
            if isinstance(layer, _LAYERS) and selected(path, self.where):
                name = f"{path}.weight" if path else "weight"
                if owners.get(id(layer.weight)) == name:  # a tied one is its first owner's
                    yield path, layer

    def _router_of(self, path: str, layer: nn.Module) -> dict[str, Tensor]:
        inputs, outputs = len(self.scales), self.experts
        if self.by == "neuron":
            outputs *= len(layer.get_parameter("weight"))
        shapes = {
            "hidden": ((self.hidden, inputs), inputs),
            "hidden_bias": ((self.hidden,), inputs),
            "out": ((outputs, self.hidden), self.hidden),
            "out_bias": ((outputs,), self.hidden),
        }
        found = {}
        for part, (shape, fan_in) in shapes.items():
            key = _beside(f"{path}.weight", part)
            bound = max(fan_in, 1) ** -0.5
            found[key] = torch.empty(shape).uniform_(-bound, bound, generator=_source(key))
        return found


def _owned(path: str, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of a layer by full name, as far as it has them."""
    for leaf, value in layer.named_parameters(recurse=False):
        if leaf in ("weight", "bias"):
            yield f"{path}.{leaf}".lstrip("."), value.detach()


def _beside(name: str, part: str) -> str:
    """The full name of an added parameter: `stem.weight`, `out` -> `stem.supple_out_weight`."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.supple_{part}_{leaf}".lstrip(".")


def _source(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def _normal(key: str, like: Tensor) -> Tensor:
    """Noise that depends on the name only; made on the CPU, to be the same everywhere."""
    return torch.randn(like.shape, generator=_source(key)).to(like)


def _route(sizes: Tensor, router: Sequence[Tensor], experts: int) -> Tensor:
    """Mixtures for sizes (n, sites): shape (n, outputs or 1, experts)."""
    hidden, hidden_bias, out, out_bias = router
    inside = F.relu(F.linear(sizes.to(hidden), hidden, hidden_bias))
    scores = F.linear(inside, out, out_bias)
    return scores.reshape(len(sizes), -1, experts).softmax(-1)


def _mixed(own: Tensor, *values: Tensor, sizes: Tensor, experts: int) -> Tensor:
    """A size's weights: the module's own, and differences by how routing differs."""
    size, full = _route(sizes, values[:4], experts)
    for number, difference in enumerate(values[4:], start=1):
        share = (size - full)[:, number].to(own)
        own = own + share.reshape(-1, *[1] * (own.dim() - 1)) * difference
    return own
