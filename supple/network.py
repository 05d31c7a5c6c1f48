"""`Elastic`: a network that runs at any size, and gives any size as a network of its own.

The supernet is the user's own module. Inside `at` the attributes through which its modules see
their parameters are shadowed by slices of these parameters, integers that the code computes
with get the values of the chosen size, and containers are shortened; on exit everything is as
before. `extract` applies the same changes to a copy.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from supple.axes.base import Axis, Patch, Sharing, added, merge
from supple.axes.depth import Depth
from supple.axes.experts import Experts
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.counts import Counts, counts_of
from supple.errors import ConcurrencyError, SettingError, SuppleWarning, UnsupportedModelError
from supple.graph.blocks import residual_gains
from supple.graph.couple import Graph, Group, analyse
from supple.graph.dims import Atom
from supple.graph.equivalents import Equivalent
from supple.graph.order import expand_order, l1, permute, read_l1
from supple.plan import Layout, Plan, Shadows
from supple.recompute import recomputing
from supple.sharded import refuse_sharded
from supple.space import Config, Fixed, Site, Space

if TYPE_CHECKING:
    from supple.cost.profile import DeviceProfile
    from supple.graph.verify import Report

__all__ = ["Elastic", "elastic"]

#: How many sizes are remembered, worked out.
PLANS = 256


def elastic(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    axes: Sequence[Axis] | None = None,
    verify: bool = True,
    profile: DeviceProfile | None = None,
    equivalents: Sequence[Equivalent] = (),
) -> Elastic:
    """Make a model elastic: find what can vary, prove it, and check it on the model itself.

    Args:
        model: Any `nn.Module`; it is neither copied nor rewritten.
        args: Positional example inputs with which the model runs; a single tensor may be
            given as it is.
        kwargs: Keyword example inputs.
        axes: What may vary; None gives `Width()`, `Heads()`, `Experts()` and
            `Depth()`.
        verify: Also run the checks of `Elastic.verify` (on a copy, in float64) and report a
            site that fails as fixed. Models on the meta device cannot be run: their sites are
            proved, not verified.
        profile: Of the device that sizes are for: fractions are rounded to the channel counts
            that it found to pay, at axes that leave their `divisor` open.
        equivalents: Where the model cannot be recorded (a kernel that takes real numbers
            only, say), other ways in which it computes the same: functions of the model that
            give a context. Ways that a model declares itself are tried after these.

    Returns:
        The elastic network; `net.module is model`.

    Raises:
        UnsupportedModelError: The forward fails on the example inputs, nothing can vary
            (the message lists the reasons), or parameters are sharded.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        ... )
        >>> net = elastic(model, torch.ones(2, 6))
        >>> net.space.smallest()
        Config({'0': 4})
    """
    inputs = (args,) if isinstance(args, Tensor) else tuple(args)
    chosen = (Width(), Heads(), Experts(), Depth()) if axes is None else tuple(axes)
    if not chosen:
        raise SettingError("axes must name at least one axis, e.g. [supple.Width()]")
    if profile is not None:
        divisors = {kind: profile.divisor(kind) for kind in profile.divisors}
        chosen = tuple(axis.on_device(divisors) for axis in chosen)
    refuse_sharded(model, "elastic")
    start = time.perf_counter()
    variants = [variant for axis in chosen for variant in axis.variants(model)]
    graph = analyse(model, inputs, kwargs, variants, equivalents)
    net = Elastic(graph, inputs, dict(kwargs or {}), chosen)
    net.seconds["prove"] = time.perf_counter() - start
    if verify and not any(p.is_meta for p in model.parameters()):
        from supple.graph.verify import drop_failing_sites

        start = time.perf_counter()
        drop_failing_sites(net)
        net.verified = True
        net.seconds["verify"] = time.perf_counter() - start
    if not net.space.sites:
        raise UnsupportedModelError(_nothing_varies(model, net.space.fixed))
    return net


def _nothing_varies(model: nn.Module, fixed: Sequence[Fixed]) -> str:
    lines = [f"  {f.name}: {f.reason}" for f in fixed[:20]]
    more = [f"  ... and {len(fixed) - 20} more"] if len(fixed) > 20 else []
    listed = "\n".join([*lines, *more]) or "  the model has no parameter dimension to shrink"
    return f"no site of {type(model).__name__} can vary along the given axes:\n{listed}"


def _sent(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: tuple[Axis, ...],
    space: Space,
    statistics: Mapping[Config, dict[str, Tensor]],
    verified: bool,
) -> Elastic:
    """The network that `Elastic.__reduce__` was told of, in another process."""
    net = elastic(module, args, kwargs, axes, verify=False)
    why = {fixed.name: fixed.reason for fixed in space.fixed}
    left = set(space.names)
    net.remove_sites(
        {s.name: why.get(s.name, "") for s in net.space.sites if s.name not in left}
    )
    if net.space.digest != space.digest:
        raise UnsupportedModelError(
            f"a copy of this {type(module).__name__} for another process has other sites than "
            "the network itself, whose model or axes were changed since it was made"
        )
    net.space = Space(net.space.sites, space.fixed)
    for config, values in statistics.items():
        net.statistics[config] = values
    net.verified = verified
    return net


class Elastic:
    """A network that runs at any size; made by `elastic`.

    Attributes:
        module: The user's own module.
        space: The sites, their choices, and what is fixed and why.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        graph: What is known of the model.
        axes: The axes in use.
        verified: Whether the sites were checked on the model itself.
        seconds: Time spent proving and verifying.
    """

    def __init__(
        self,
        graph: Graph,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        axes: tuple[Axis, ...],
    ) -> None:
        self.module = graph.model
        self.graph = graph
        self.args = args
        self.kwargs = kwargs
        self.axes = axes
        self._statistics = _Statistics(self.module)
        self.verified = False
        self.seconds: dict[str, float] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._layout: Layout | None = None
        self._costs: Any = None
        self._counted: Counts | None = None
        self._lock = threading.Lock()
        self._active: Config | None = None
        self._shadows: Shadows | None = None
        self._thread = 0
        found = _unshared([(axis, site) for axis in axes for site in axis.sites(graph)])
        self._axis_of = {site.name: axis for axis, site in found}
        reasons = dict(graph.fixed)
        for axis in axes:
            reasons.update(axis.fixed(graph))
        fixed = [Fixed(name, reason) for name, reason in reasons.items() if reason]
        self.space = Space(self._conditioned([site for _, site in found]), fixed)
        self._add_parameters()

    def _add_parameters(self) -> None:
        """Give the module the parameters that transforms need, where it lacks them."""
        needed = [self._axis_of[site.name].parameters(site) for site in self.space.sites]
        if self.sharing is not None:
            needed.append(self.sharing.own(self.module))
        for name, value in (item for each in needed for item in each.items()):
            path, _, leaf = name.rpartition(".")
            module = self.module.get_submodule(path)
            if leaf not in module._parameters:
                module.register_parameter(leaf, self._added(module, value))
                self._plans.clear()
                self._layout = None

    def _added(self, module: nn.Module, value: Tensor) -> nn.Parameter:
        """A parameter of its own; what is a copy of another is frozen where that one is."""
        if isinstance(value, nn.Parameter):
            return nn.Parameter(value.detach().clone(), value.requires_grad)
        like = next(module.parameters(), next(self.module.parameters()))
        learns = any(p.requires_grad for p in self.module.parameters())
        return nn.Parameter(value.to(like, copy=True), learns)

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets it be sent to other processes, which work out anew what is known of it."""
        if self._active is not None:
            raise ConcurrencyError(
                "a size of this network is active, so it can't be sent; leave that block first"
            )
        made = (self.module, self.args, self.kwargs, self.axes)
        # The sites as data: those of the axes hold on to what is known of the model.
        space = Space.from_json(self.space.to_json())
        return _sent, (*made, space, dict(self.statistics), self.verified)

    # --- using it -------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, at the active size."""
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Elastic({type(self.module).__name__}, {len(self.space.sites)} sites)"

    @property
    def sharing(self) -> Sharing | None:
        """Which weights each size has; None where all slice the same ones."""
        return next((axis for axis in self.axes if isinstance(axis, Sharing)), None)

    def share(self, sharing: Sharing) -> None:
        """Let sizes share fewer weights, in place of how they shared them so far.

        The full network keeps the module's own weights, if the sharing says so; what the
        sharing needs beside them is added to the module. Weights of the present sharing that
        the new one has, too, stay as they are. A size that is active keeps what it has until
        it is left.

        Args:
            sharing: Which weights each size has, such as `Copies`.
        """
        with self.sharing_all():
            others = self.axes
        self.axes = (*others, sharing)
        with self._suspended():
            self._add_parameters()
        self.drop_statistics()

    @contextmanager
    def sharing_all(self) -> Iterator[None]:
        """Lets all sizes slice the module's own weights, for the duration of the block."""
        axes = self.axes
        self.axes = tuple(axis for axis in axes if not isinstance(axis, Sharing))
        try:
            yield
        finally:
            self.axes = axes

    @property
    def active(self) -> Config | None:
        """The size that is active, inside the block of `at`; None outside."""
        return self._active

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self.module.training

    def train(self, mode: bool = True) -> Elastic:
        """Set training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Elastic:
        """Set evaluation mode."""
        return self.train(False)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.module.parameters()).device

    @contextmanager
    def at(self, config: Config | Mapping[str, int]) -> Iterator[Elastic]:
        """Run at a size for the duration of the block; nothing of it stays.

        Inside, `parameters()` and `state_dict()` still give the full owners, and gradients
        reach them. Backward may run after the block.

        Args:
            config: The size; sites it does not name are full.

        Raises:
            SettingError: A site or choice does not exist (the message names the nearest).
            ConcurrencyError: Another size of this network is active.
        """
        chosen = self._canonical(config)
        self._claim(chosen)
        try:
            with self._applied(chosen):
                yield self
        finally:
            with self._lock:
                self._active = None

    def _canonical(self, config: Config | Mapping[str, int]) -> Config:
        if isinstance(config, Config) and self._weighed(config) in self._plans:
            return config  # plans are kept by canonical config
        return self.space.config(config)

    def _claim(self, config: Config) -> None:
        with self._lock:
            if self._active is not None:
                who = "this" if self._thread == threading.get_ident() else "another"
                raise ConcurrencyError(
                    f"a size of this network is already active in {who} thread; "
                    "leave that block first, or serve extracted networks side by side"
                )
            self._active = config
            self._thread = threading.get_ident()

    @contextmanager
    def _applied(self, config: Config) -> Iterator[None]:
        """Apply a size in place of the active one; recomputation asks for that in backward."""
        outer = self._shadows
        plan = self.plan(config)
        with ExitStack() as stack:
            stack.enter_context(self._suspended())
            self._shadows = stack.enter_context(plan.applied(self.statistics.get(config)))
            stack.enter_context(recomputing(lambda: self._applied(config)))
            try:
                yield
            finally:
                self._shadows = outer

    def _suspended(self) -> AbstractContextManager[None]:
        """The full network, for the duration of the block, whatever size is active."""
        return self._shadows.lifted() if self._shadows is not None else nullcontext()

    def extract(self, config: Config | Mapping[str, int]) -> nn.Module:
        """A standalone network of the given size: the same classes with smaller tensors.

        Args:
            config: The size; sites it does not name are full.

        Returns:
            A copy that shares nothing with this network. Recalibrated statistics of the size
            are used where there are any.

        Raises:
            SettingError: A site or choice does not exist.
        """
        chosen = self.space.config(config)
        if self._lacks_statistics(chosen):
            warnings.warn(
                "the running statistics of this size were not recalibrated, so its accuracy "
                "may be far off; call supple.recalibrate(net, config, data) first",
                SuppleWarning,
                stacklevel=2,
            )
        from supple.storage import noted

        with self._suspended():
            extracted = self.plan(chosen).extracted(self.statistics.get(chosen))
        return noted(self, chosen, extracted)

    def _lacks_statistics(self, config: Config) -> bool:
        partial = config != self.space.largest()
        return partial and config not in self.statistics and self.has_running_statistics()

    @property
    def statistics(self) -> dict[Config, dict[str, Tensor]]:
        """Recalibrated running statistics by canonical config: buffer name to tensor.

        Tensors have the sub-network's shape. All are dropped when a parameter has changed since
        they were put here, by whatever means.
        """
        if self._statistics and self._statistics.outdated():
            self._statistics.clear()
        return self._statistics

    def has_running_statistics(self) -> bool:
        """Whether the module has normalization layers with running statistics."""
        return any(
            isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
            for m in self.module.modules()
        )

    def drop_statistics(self) -> None:
        """Forget recalibrated statistics."""
        self._statistics.clear()

    def verify(self, n: int = 4) -> Report:
        """Compare active, extracted, masked and permuted forwards on random sizes.

        Done in float64 on a copy with re-randomised weights, on the example inputs and on a
        second batch size.

        Args:
            n: Number of random configs besides the smallest and the largest.
        """
        from supple.graph.verify import verify

        return verify(self, n)

    def costs(self, configs: Config | Sequence[Config] | np.ndarray) -> dict[str, np.ndarray]:
        """Closed-form costs of many sizes.

        Args:
            configs: One config, several, or encoded configs of shape (n, sites).

        Returns:
            Arrays of shape (n,): `params` (count), `macs` (of one forward on the example
            inputs), `weight_bytes` and `activation_bytes` (peak). They equal
            `supple.cost.count` on the extracted network; where a width or a number of heads is
            1, PyTorch takes other operators (it leaves out copies, and multiplies where it
            would take products), so `macs` and `activation_bytes` may be off.

        Raises:
            OperatorError: An operator may multiply and has no rule.
        """
        if self._costs is None:
            from supple.cost.closed import ClosedCosts

            self._costs = ClosedCosts(self)
        if isinstance(configs, Config):
            configs = [configs]
        rows = configs if isinstance(configs, np.ndarray) else self.space.encode_many(configs)
        costs: dict[str, np.ndarray] = self._costs(rows)
        return costs

    def save(self, directory: Any) -> None:
        """Save weights, space and statistics; `supple.load` gives the network back."""
        from supple.storage import save

        refuse_sharded(self.module, "save")
        save(self, directory)

    # --- importance -----------------------------------------------------------------------

    @torch.no_grad()
    def sort(
        self,
        importance: Mapping[str, Tensor] | str = "l1",
        beside: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Reorder units so that every prefix holds the most important ones.

        The full network computes the same as before. Optimizers that hold moments of the
        parameters must be made anew, or the moments given as `beside`.

        Args:
            importance: For a site's name, a score per unit (higher stays longer), shape
                (full,); sites without an entry keep their order. A name is that of a rule of
                `importance`.
            beside: Other tensors of the parameters' shapes, by parameter name (moments,
                averages), which are reordered alike.

        Raises:
            SettingError: A site or rule does not exist, or a score has the wrong length.
        """
        refuse_sharded(self.module, "sort")
        if self.sharing is not None:
            raise SettingError(
                "units can't be sorted once sizes have weights of their own; sort first"
            )
        scores = self.importance(importance) if isinstance(importance, str) else importance
        order: dict[Atom, np.ndarray] = {}
        for name, score in scores.items():
            group = getattr(self.space.site(name), "group", None)
            if group is None or tuple(score.shape) != (group.full,):
                raise SettingError(
                    f"the importance of site {name!r} must be a tensor of shape "
                    f"({getattr(group, 'full', 0)},), got {tuple(score.shape)}"
                )
            rank = torch.argsort(score.detach().cpu(), descending=True, stable=True).numpy()
            order.update(expand_order(group, rank))
        permute(self.module, self.graph, order, beside)
        self.drop_statistics()

    def importance(self, rule: str = "l1") -> dict[str, Tensor]:
        """A score for every unit of every site whose units can be reordered.

        Args:
            rule: `"l1"` sums the absolute weights that a unit owns; `"read_l1"` those that the
                following layers read it with.

        Returns:
            Site name to scores of shape (full,).

        Raises:
            SettingError: There is no such rule.
        """
        rules: dict[str, Callable[[Graph, Group], Tensor]] = {"l1": l1, "read_l1": read_l1}
        if rule not in rules:
            raise SettingError(
                f"importance must be a mapping or one of {', '.join(map(repr, rules))}, got "
                f"{rule!r}"
            )
        groups = {site.name: getattr(site, "group", None) for site in self.space.sites}
        return {
            name: rules[rule](self.graph, group)
            for name, group in groups.items()
            if group and group.members
        }

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that axes have added to the module, by name.

        They are trained and saved with this network, and are no part of extracted ones.
        """
        return {name: p for name, p in self.module.named_parameters() if added(name)}

    def residual_gains(self) -> list[nn.Parameter]:
        """The last normalization gain of each residual branch that ends in one.

        With these at 0, every such block computes the identity.
        """
        owned = dict(self.module.named_parameters())
        recording, p = self.graph.recording, self.graph.propagation
        return [owned[name] for name in residual_gains(self.graph.stacks, recording, p)]

    # --- plans ----------------------------------------------------------------------------

    def patch(self, config: Config) -> Patch:
        """Everything that a size changes."""
        patch = merge(self.patch_of(name, choice) for name, choice in config.items())
        if self.sharing is not None:
            weights = self.sharing.weights(config, self.module)
            patch = dataclasses.replace(patch, weights=weights)
        if not patch.dropped:
            return patch
        counts = self.counts().without(patch.dropped)
        return dataclasses.replace(patch, attributes={**counts, **patch.attributes})

    def counts(self) -> Counts:
        """The integers beside the modules that count blocks."""
        if self._counted is None:
            self._counted = counts_of(self.module)
        return self._counted

    def patch_of(self, name: str, choice: int) -> Patch:
        """What one choice at one site changes."""
        return self._patch(self.space.site(name), choice)

    def paths_of(self, name: str) -> tuple[str, ...]:
        """Paths of the modules that a site concerns; an empty tuple is the whole network."""
        return self._axis_of[name].paths(self.space.site(name))

    def _patch(self, site: Site, choice: int) -> Patch:
        return self._axis_of[site.name].patch_of(site, choice)

    def swaps_parameters(self) -> bool:
        """Whether some choice puts a module with parameters of its own in another's place."""
        return any(
            any(True for _ in module.parameters())
            for site in self.space.sites
            for choice in site.choices
            for module in self._patch(site, choice).modules.values()
            if isinstance(module, nn.Module)
        )

    def plan(self, config: Config) -> Plan:
        """The changes that a canonical config makes, worked out once."""
        key = self._weighed(config)
        plan = self._plans.pop(key, None)
        if plan is None:
            if self._layout is None:
                self._layout = Layout(self.graph)
            plan = Plan(self.graph, self.patch(config), self._layout)
        self._plans[key] = plan  # the last one is the one used last
        if len(self._plans) > PLANS:
            self._plans.pop(next(iter(self._plans)), None)
        return plan

    def _weighed(self, config: Config) -> Hashable:
        """What decides about a plan: the config, and which weights it has."""
        return config if self.sharing is None else (config, self.sharing.chosen(config))

    def on(self, model: nn.Module) -> Elastic:
        """The same sites on another module of the same structure (a copy, say)."""
        graph = dataclasses.replace(self.graph, model=model)
        twin = Elastic(graph, self.args, self.kwargs, self.axes)
        twin.space = self.space
        twin.verified = self.verified
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Elastic:
        """A network of its own, with no size active."""
        twin = self.on(copy.deepcopy(self.module, memo))
        for config, values in self.statistics.items():
            twin.statistics[config] = copy.deepcopy(values, memo)
        twin.seconds = dict(self.seconds)
        return twin

    def remove_sites(self, reasons: Mapping[str, str]) -> None:
        """Make sites fixed, with the reason for each."""
        for name in reasons:
            for parameter in self._axis_of[name].parameters(self.space.site(name)):
                path, _, leaf = parameter.rpartition(".")
                self.module.get_submodule(path)._parameters.pop(leaf, None)
        left = [site for site in self.space.sites if site.name not in reasons]
        fixed = [*self.space.fixed, *(Fixed(name, why) for name, why in reasons.items())]
        self.space = Space(self._conditioned(left), fixed)
        self._plans.clear()
        self._layout = None
        self._costs = None

    def _conditioned(self, sites: list[Site]) -> list[Site]:
        """Sites with the conditions under which they exist: their block is not left out."""
        dropping = [(site, {c: self._patch(site, c) for c in site.choices}) for site in sites]
        dropping = [
            (site, by)
            for site, by in dropping
            if any(p.dropped or p.modules for p in by.values())
        ]
        result: list[Site] = []
        for site in sites:
            paths = self._axis_of[site.name].paths(site)
            inside = []
            for depth, by_choice in dropping:
                alive = {
                    choice
                    for choice, patch in by_choice.items()
                    if not paths or any(patch.runs(path) for path in paths)
                }
                if depth.name != site.name and len(alive) < len(by_choice):
                    inside.append((depth.name, frozenset(alive)))
            result.append(dataclasses.replace(site, inside=tuple(inside)))
        return result


class _Statistics(dict[Config, dict[str, Tensor]]):
    """Statistics by config, and of which weights they are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._weights: list[tuple[int, int]] = []

    def __setitem__(self, config: Config, values: dict[str, Tensor]) -> None:
        if not self:
            self._weights = self._now()
        super().__setitem__(config, values)

    def outdated(self) -> bool:
        """Whether a parameter was written to or replaced since the first were put in."""
        return self._weights != self._now()

    def _now(self) -> list[tuple[int, int]]:
        # tensors made in inference mode do not count how often they are written to
        return [
            (id(p), 0 if p.is_inference() else p._version) for p in self._module.parameters()
        ]


def _unshared(found: list[tuple[Axis, Site]]) -> list[tuple[Axis, Site]]:
    """Sites of which no two vary the same dimensions: a general axis gives way to others."""
    special = {id(getattr(site, "group", None)) for axis, site in found if not axis.general} - {
        id(None)
    }
    return [
        (axis, site)
        for axis, site in found
        if not axis.general or id(getattr(site, "group", None)) not in special
    ]
