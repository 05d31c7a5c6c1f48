"""Checks on the real model that what was derived is true.

Four forwards are compared, in float64, on a copy whose weights, gains, biases and running
statistics are of order one:

* *active*: slices of the shared tensors,
* *extracted*: the standalone network,
* *masked*: the full tensors with the dropped units zeroed, and left-out blocks passed by (not
  for groups that a normalization or a product of two activations reduces over),
* *permuted*: the full network with the units of every group permuted along the derived indices.

Active must equal extracted and masked; permuted must equal the full network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from supple.graph.couple import Group, final_outputs
from supple.graph.dims import Atom, atoms, positions
from supple.graph.order import expand_order, permute
from supple.graph.record import output_tensors

if TYPE_CHECKING:
    from supple.network import Elastic
    from supple.space import Config

__all__ = ["SCALES", "Report", "drop_failing_sites", "randomise", "verify"]

#: Largest difference that rounding may make, relative to the largest output, by the type in
#: which the comparison runs. Models that compute parts in float32 (norms often do) round far
#: above float64; a kernel that takes no float64 makes the whole comparison run in float32.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}

#: Sizes of the random matrices, tried until the outputs are finite.
SCALES = (1.0, 0.3, 0.1)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Report:
    """What a verification found.

    Attributes:
        tolerance: Largest relative difference that counts as rounding.
        checks: For each comparison, how often it was made and the largest relative difference.
        failures: For each that failed, a sentence: what, at which size, by how much.
    """

    tolerance: float = TOLERANCES[torch.float64]
    checks: dict[str, tuple[int, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every comparison held."""
        return not self.failures

    def note(self, check: str, difference: float, at: str) -> None:
        """Count a comparison, and keep it if it failed."""
        count, worst = self.checks.get(check, (0, 0.0))
        self.checks[check] = (count + 1, max(worst, difference))
        if not difference <= self.tolerance:
            self.failures.append(
                f"{check} differ by {difference:.1e} of the largest output{at}"
            )

    def __str__(self) -> str:
        rows = [f"{c}: {n} comparisons, at most {d:.1e}" for c, (n, d) in self.checks.items()]
        return "\n".join([*rows, *(f"FAILED: {failure}" for failure in self.failures)])


def verify(net: Elastic, n: int = 4, seed: int = 0) -> Report:
    """Compare the four forwards on the smallest and `n` random sizes; see the module."""
    return _Verifier(net, seed).report([s.name for s in net.space.sites], n)


def drop_failing_sites(net: Elastic, n: int = 2, seed: int = 0) -> None:
    """Check all sites jointly; where that fails, find those at fault and make them fixed."""
    verifier = _Verifier(net, seed)
    names = [site.name for site in net.space.sites]
    if not names:
        return
    reasons = verifier.at_fault(names, n)
    if reasons:
        net.remove_sites({name: f"verification failed: {why}" for name, why in reasons.items()})


class _Verifier:
    """A randomised float64 twin of a network, and the comparisons on it."""

    def __init__(self, net: Elastic, seed: int) -> None:
        self._seed = seed
        self._final = final_outputs(net.graph.recording)
        own = next((p.dtype for p in net.module.parameters()), torch.float32)
        try:
            self._prepare(net, own if net.swaps_parameters() else torch.float64)
        except Exception:  # some kernels take no float64; what fails for good fails again
            self._prepare(net, own)

    def _prepare(self, net: Elastic, dtype: torch.dtype) -> None:
        """Make the twin in this type, and its outputs at full size."""
        self._dtype = dtype
        self._twin = net.on(copy.deepcopy(net.module).to(dtype).eval())
        inputs: Inputs = tree_map(self._cast, (tuple(net.args), dict(net.kwargs)))
        for scale in SCALES:
            randomise(self._twin.module, torch.Generator().manual_seed(self._seed), scale)
            self._full = [self._run(self._twin.module, inputs)]
            if all(bool(output.isfinite().all()) for output in self._full[0]):
                break
        self._inputs = [inputs, *self._varied(inputs)]
        self._full += [self._run(self._twin.module, other) for other in self._inputs[1:]]

    def _cast(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if real else value

    # --- comparisons ------------------------------------------------------------------------

    def report(self, names: Sequence[str], n: int) -> Report:
        """All comparisons with only the named sites varying."""
        report = Report(TOLERANCES.get(self._dtype, 0.05))
        space = self._twin.space
        chosen = set(names)
        smallest = {s.name: s.choices[0] for s in space.sites if s.name in chosen}
        generator = np.random.default_rng(self._seed)
        configs = [space.config(smallest)]
        for _ in range(n):
            drawn = space.random(generator)
            configs.append(space.config({k: v for k, v in drawn.items() if k in chosen}))
        for config in dict.fromkeys(configs):
            if config != space.largest():
                self._try(report, "active and extracted", config, self._active_extracted)
                self._try(report, "active and masked", self._maskable(config), self._masked)
        self._permuted(report, chosen)
        return report

    def _try(
        self,
        report: Report,
        check: str,
        config: Config,
        compare: Callable[[Config], Iterator[float]],
    ) -> None:
        at = f" at {config!r}"
        try:
            for difference in compare(config):
                report.note(check, difference, at)
        except Exception as error:  # a forward may raise anything at a size it does not accept
            report.failures.append(
                f"the forward fails{at}: {type(error).__name__}: {str(error)[:200]}"
            )

    def _active_extracted(self, config: Config) -> Iterator[float]:
        extracted = self._twin.plan(config).extracted(None)
        resized = "" in self._twin.patch(config).inputs  # dense outputs follow the image
        for inputs, full in zip(self._inputs, self._full, strict=True):
            whole = [output.shape for output in self._of(full)]
            with self._twin.at(config):
                active = self._run(self._twin.module, inputs)
            yield _difference(active, self._run(extracted, inputs))
            if not resized and [t.shape for t in self._of(active)] != whole:
                raise ValueError("the output has another shape than the full network's")

    def _maskable(self, config: Config) -> Config:
        """The part of a size for which zeroing units is the same as removing them."""
        kept = {}
        for name, choice in config.items():
            site = self._twin.space.site(name)
            group = getattr(site, "group", None)
            patch = self._twin.patch_of(name, choice)
            reduced = group is not None and self._twin.graph.reduces_over(group)
            rounded = patch.rounded or patch.rounded_inputs
            changed = patch.structural or patch.tensors or patch.attributes
            if not (reduced or changed or rounded):
                kept[name] = choice
        return self._twin.space.config(kept)

    def _masked(self, config: Config) -> Iterator[float]:
        if config == self._twin.space.largest():
            return
        patch = self._twin.patch(config)
        masked = copy.deepcopy(self._twin.module)
        _zero_dropped(masked, self._twin.graph.tensors, patch.sizes)
        with _passing_by(masked, patch.dropped):
            for inputs in self._inputs:
                with self._twin.at(config):
                    active = self._run(self._twin.module, inputs)
                yield _difference(self._of(active), self._of(self._run(masked, inputs)))

    def _permuted(self, report: Report, names: set[str]) -> None:
        generator = np.random.default_rng(self._seed)
        order: dict[Atom, np.ndarray] = {}
        for site in self._twin.space.sites:
            group: Group | None = getattr(site, "group", None)
            if site.name in names and group is not None:
                order.update(expand_order(group, generator.permutation(group.full)))
        if not order:
            return
        moved = copy.deepcopy(self._twin.module)
        permute(moved, self._twin.graph, order)
        for inputs, full in zip(self._inputs, self._full, strict=True):
            permuted = self._run(moved, inputs)
            report.note(
                "full and permuted", _difference(self._of(full), self._of(permuted)), ""
            )

    def _of(self, outputs: list[Tensor]) -> list[Tensor]:
        return [outputs[i] for i in self._final if i < len(outputs)]

    # --- finding the culprits ----------------------------------------------------------------

    def at_fault(self, names: list[str], n: int) -> dict[str, str]:
        """The sites to fix, each with the failure that it causes."""
        report = self.report(names, n)
        if report.ok:
            return {}
        if len(names) == 1:
            return {names[0]: report.failures[0]}
        middle = len(names) // 2
        found = {**self.at_fault(names[:middle], n), **self.at_fault(names[middle:], n)}
        left = [name for name in names if name not in found]
        if left and found:
            found.update(self.at_fault(left, n) if not self.report(left, n).ok else {})
        elif not found:
            found.update(self._together(names, n))
        return found

    def _together(self, names: list[str], n: int) -> dict[str, str]:
        """Sites that hold alone but not together: keep those that hold with the ones before."""
        kept: list[str] = []
        found: dict[str, str] = {}
        for name in names:
            report = self.report([*kept, name], n)
            if report.ok:
                kept.append(name)
            else:
                found[name] = report.failures[0]
        return found

    # --- inputs ------------------------------------------------------------------------------

    def _run(self, module: nn.Module, inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(module(*inputs[0], **inputs[1]))

    def _varied(self, inputs: Inputs) -> list[Inputs]:
        """Inputs of a second batch size, and of a second length, where the model takes them."""
        changed = [change(inputs) for change in (_longer_batch, _shorter_length)]
        return [other for other in changed if other is not None and self._takes(other)]

    def _takes(self, inputs: Inputs) -> bool:
        """Whether the full model runs on these inputs."""
        try:
            self._run(self._twin.module, inputs)
        except Exception:  # a forward may raise anything; a refusal is the answer
            return False
        return True


def _longer_batch(inputs: Inputs) -> Inputs | None:
    leaves, spec = tree_flatten(inputs)
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim() > 0]
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) != 1:
        return None
    longer = [torch.cat([t, t[:1]]) if isinstance(t, Tensor) and t.dim() else t for t in leaves]
    result: Inputs = tree_unflatten(longer, spec)
    return result


def _shorter_length(inputs: Inputs) -> Inputs | None:
    leaves, spec = tree_flatten(inputs)
    tokens = [t for t in leaves if isinstance(t, Tensor) and t.dim() == 2 and not _real(t)]
    lengths = {t.shape[1] for t in tokens}
    if len(lengths) != 1 or min(lengths) < 4:
        return None
    length = lengths.pop()
    shorter = [t[:, : length - 1] if any(t is token for token in tokens) else t for t in leaves]
    result: Inputs = tree_unflatten(shorter, spec)
    return result


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


# --- randomising, masking, comparing ----------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator, scale: float) -> None:
    """Give every parameter and running statistic values of order one, matrices `scale`.

    Freshly initialised networks hide mistakes: zero biases, unit gains, tiny layer scales.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() <= 1:
            value = 1 + 0.5 * noise
        else:
            value = scale * noise / max(1, parameter[0].numel()) ** 0.5
        parameter.copy_(value)
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.running_mean is not None
        ):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.5 * torch.randn(shape, generator=generator))
            assert module.running_var is not None
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))


@torch.no_grad()
def _zero_dropped(
    model: nn.Module, tensors: Mapping[str, Any], sizes: Mapping[Atom, int]
) -> None:
    """Zero every position of every parameter that a size leaves out."""
    for name, parameter in model.named_parameters():
        for dim, structure in enumerate(tensors.get(name, ())):
            kept = {a: np.arange(sizes[a]) for a in atoms(structure) if a in sizes}
            if kept:
                gone = np.ones(parameter.shape[dim], dtype=bool)
                gone[positions(structure, kept)] = False
                parameter.index_fill_(dim, torch.as_tensor(np.flatnonzero(gone)), 0.0)


@contextmanager
def _passing_by(model: nn.Module, blocks: frozenset[str]) -> Iterator[None]:
    """Let blocks run but return their input in place of their output."""
    shadowed = [model.get_submodule(path) for path in blocks]
    for block in shadowed:
        vars(block)["forward"] = _passed_by(block.forward)
    try:
        yield
    finally:
        for block in shadowed:
            del vars(block)["forward"]


def _passed_by(forward: Callable[..., Any]) -> Callable[..., Any]:
    def passed(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten(forward(*args, **kwargs))
        place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        leaves[place] = next(
            t
            for t in inputs
            if t.shape == leaves[place].shape and t.dtype == leaves[place].dtype
        )
        return tree_unflatten(leaves, spec)

    return passed


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference between two lists of outputs, relative to the largest value."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel():
            continue
        scale = max(1e-12, float(x.abs().max()))
        gap = float((x.double() - y.double()).abs().max()) / scale
        worst = max(worst, gap) if gap == gap else float("inf")
    return worst
