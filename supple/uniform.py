"""The `transformers` configuration of a sub-network, where one can describe it.

A configuration says one number for all layers: it can describe a sub-network whose layers are
alike. Which settings have to change, and to what, is found by trying: the model is built on the
meta device with one setting changed, and the sizes that follow tell what the setting does. No
architecture is known here. What is found is run on example inputs beside the sub-network and
must give equal outputs, bit by bit.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from supple import rebuild
from supple.errors import UnsupportedModelError
from supple.space import Config

if TYPE_CHECKING:
    from supple.network import Elastic

__all__ = ["fitted", "uniform_config"]

_MOST_TRIED, _MOST_BUILDS = 128, 400  # values of a setting, models for a network
Place = tuple[str, str, str | int]
"""A size in a network: kind (`tensor`, `integer`, `length`), path, and dimension or name."""
Setting = tuple[str | int, ...]
"""Where a number stands in a configuration, such as `("depths", 2)`."""


def uniform_config(module: nn.Module) -> Any:
    """Finds the `transformers` configuration that describes an extracted network.

    Args:
        module: A network that `Elastic.extract` gave, of a class that `transformers` exports.

    Returns:
        A new configuration, from which `type(module)(config)` builds a network of the same
        shapes that computes the same with the same weights.

    Raises:
        UnsupportedModelError: There is none; the message names what is not uniform.
    """
    steps = rebuild.provenance_of(module)["steps"]
    examples = next((s["examples"] for s in reversed(steps) if "examples" in s), None)
    if examples is None:
        return copy.deepcopy(_of_transformers(module).config)
    device = next(module.parameters()).device
    args, kwargs = _made_up(rebuild.unpack(examples, {}), device)
    changes = _found(module, args, kwargs)
    config = copy.deepcopy(_of_transformers(module).config)
    for setting, value in changes:
        set_setting(config, setting, value)
    return config


def fitted(net: Elastic, config: Config, module: nn.Module) -> nn.Module:
    """Gives an extracted network the configuration of its size, where there is one.

    Args:
        net: The elastic network that it was taken from.
        config: Its size.
        module: The extracted network; `module.config` is changed in place.

    Returns:
        `module`.
    """
    if config == net.space.largest() or not _looks_uniform(net, config):
        return module
    try:
        changes = _found(module, net.args, net.kwargs)
    except UnsupportedModelError:  # it keeps the configuration of the full network
        return module
    for setting, value in changes:
        set_setting(module.config, setting, value)
    return module


def _looks_uniform(net: Elastic, config: Config) -> bool:
    """Whether sites at the same place of sibling blocks have the same choice."""
    choices: dict[tuple[str, str, int], int] = {}
    for name, choice in config.items():
        site = net.space.site(name)
        alike = (site.axis, re.sub(r"\d+", "#", name), site.full)
        if choices.setdefault(alike, choice) != choice:
            return False
    return not any(parameter.is_meta for parameter in net.module.parameters())


def _of_transformers(module: nn.Module) -> Any:
    origin = rebuild.provenance_of(module)["base"]["origin"]
    if (origin or {}).get("transformers") != type(module).__name__:
        raise UnsupportedModelError(
            f"{type(module).__name__} is no model that transformers exports, so no "
            "configuration describes it; save it with supple.save"
        )
    return module


def _found(module: nn.Module, args: Any, kwargs: Any) -> list[tuple[Setting, Any]]:
    """What changes in the base's configuration; found by trying and compared by running."""
    model = _of_transformers(module)
    origin = rebuild.provenance_of(model)["base"]["origin"]
    search = _Search(origin, module)
    reason = ""
    for config in search.candidates():
        if search.same_outputs(config, args, kwargs):
            return list(_changes(json.loads(model.config.to_json_string(False)), config))
        reason = "the one that gives its sizes computes something else with its weights"
    raise UnsupportedModelError(
        f"no configuration describes this {type(module).__name__}: {reason or search.why}; "
        "extract a uniform size, or save it with supple.save"
    )


# --- what a setting does ------------------------------------------------------------------


def _sizes(module: nn.Module) -> dict[Place, int]:
    """Every size and integer of a network, by its place."""
    found: dict[Place, int] = {}
    for name, shape in rebuild.shapes_of(module).items():
        found.update({("tensor", name, dim): size for dim, size in enumerate(shape)})
    own = vars(nn.Module())
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if type(value) is int and name not in own:
                found["integer", path, name] = value
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            found["length", path, ""] = len(part)
    return found


@functools.lru_cache(maxsize=256)
def _sizes_of(origin: str) -> dict[Place, int] | None:
    """Sizes of what an origin builds; None if it can't be built."""
    built = quietly_built(json.loads(origin))
    return None if built is None else _sizes(built)


def quietly_built(origin: dict[str, Any]) -> nn.Module | None:
    """What an origin of `transformers` builds, without weights; None if it can't be built."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return rebuild.build(origin)
    except Exception:  # whatever a model says of a configuration that can't be
        return None
    finally:
        logging.set_verbosity(verbosity)


def whole_numbers(config: Any, at: Setting = ()) -> Iterator[tuple[Setting, int]]:
    """Every whole number above one in a configuration, its lists and its parts."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if type(value) is int and value > 1:
            yield (*at, key), value
        elif isinstance(value, list) or (isinstance(value, dict) and "model_type" in value):
            yield from whole_numbers(value, (*at, key))


def _changes(before: Any, after: Any, at: Setting = ()) -> Iterator[tuple[Setting, Any]]:
    """Where two configurations differ; a list as a whole."""
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            yield from _changes(before[key], value, (*at, key))
        elif before.get(key) != value:
            yield (*at, key), value


def _get(config: Any, setting: Setting) -> int:
    for key in setting:
        config = config[key]
    return int(config)


def set_setting(config: Any, setting: Setting, value: Any) -> None:
    """Sets a value in a configuration, as JSON or as an object of `transformers`."""
    *path, last = setting
    for key in path:
        config = getattr(config, str(key)) if hasattr(config, str(key)) else config[key]
    if type(config) in (dict, list):
        config[last] = value
    else:
        setattr(config, str(last), value)


def _with(config: dict[str, Any], values: Mapping[Setting, int]) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    for setting, value in values.items():
        set_setting(changed, setting, value)
    return changed


def _tensors_first(place: Place) -> tuple[bool, str]:
    return place[0] != "tensor", str(place)


def _named(setting: Setting) -> str:
    return ".".join(map(str, setting))


def _at(place: Place) -> str:
    kind, path, detail = place
    return f"{path}[{detail}]" if kind == "tensor" else f"{path}.{detail}".rstrip(".")


# --- the search ---------------------------------------------------------------------------


@dataclass
class _Search:
    """Looks for the configuration of one sub-network.

    Attributes:
        origin: Where the base model comes from.
        module: The sub-network.
        why: Why there is none, as far as is known.
        builds: How many models were tried.
        target: The sub-network's sizes.
    """

    origin: dict[str, Any]
    module: nn.Module
    why: str = ""
    builds: int = 0
    target: dict[Place, int] = field(init=False)
    _first_sizes: dict[Place, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.target = _sizes(self.module)

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Configurations that give every tensor its shape."""
        config = self._shortened()
        sizes = None if config is None else self._build(config)
        if config is None or sizes is None:
            return
        self._first_sizes = sizes
        if not self._same_places(sizes):
            return
        # An integer that is not the full network's was set by the extraction. The others may be
        # left over, where the code does not compute with them.
        full = self._build(self.origin["config"]) or {}
        known = {p for p in self.target if p[0] == "tensor" or self.target[p] != full.get(p)}
        known = {place for place in known if place[0] != "length"}
        yield from self._solved(config, known & sizes.keys(), frozenset())

    def _build(self, config: dict[str, Any]) -> dict[Place, int] | None:
        self.builds += 1
        if self.builds > _MOST_BUILDS:
            return None
        return _sizes_of(json.dumps({**self.origin, "config": config}, sort_keys=True))

    def _same_places(self, sizes: Mapping[Place, int]) -> bool:
        mine = {place for place in self.target if place[0] == "tensor"}
        theirs = {place for place in sizes if place[0] == "tensor"}
        for place in sorted(mine ^ theirs, key=str):
            owner = "the sub-network" if place in mine else "the configured model"
            self.why = self.why or f"only {owner} has '{place[1]}'"
            return False
        return True

    # depth: settings that say how long a container is

    def _shortened(self) -> dict[str, Any] | None:
        """The configuration with as many blocks as there are, or None."""
        config: dict[str, Any] = copy.deepcopy(self.origin["config"])
        base = self._build(config)
        if base is None:
            self.why = "the base model can't be built from its configuration"
            return None
        shorter = {p for p in base if p[0] == "length" and self.target.get(p) != base[p]}
        if not shorter:
            return config
        wanted: dict[Setting, dict[int, Place]] = {}
        lengths = {base[place] for place in shorter}
        for setting, value in whole_numbers(self.origin["config"]):
            if value in lengths:
                for place, length in self._lengths(setting, value, base, shorter).items():
                    wanted.setdefault(setting, {})[length] = place
        for setting, values in wanted.items():
            if not self._agree(setting, values):
                return None
            self._set_depth(config, setting, next(iter(values)))
        return config

    def _lengths(
        self, setting: Setting, value: int, base: dict[Place, int], shorter: set[Place]
    ) -> dict[Place, int]:
        """For each container that a setting governs, the value that gives its length."""
        trial = copy.deepcopy(self.origin["config"])
        self._set_depth(trial, setting, value - 1)
        sizes = self._build(trial) or {}
        governed = {p for p in base if p[0] == "length" and sizes.get(p, base[p]) != base[p]}
        if not governed & shorter:
            return {}
        return {p: value - base[p] + self.target.get(p, 0) for p in governed}

    def _set_depth(self, config: dict[str, Any], setting: Setting, value: int) -> None:
        """Sets a depth; shortens lists with an entry per block if the model asks for it."""
        before = _get(config, setting)
        set_setting(config, setting, value)
        holder: Any = config
        for key in setting[:-1]:
            holder = holder[key]
        if self._build(config) is not None or not isinstance(holder, dict):
            return
        own = self._own_lists()
        for name, items in holder.items():
            if isinstance(items, list) and len(items) == before:
                kept = own.get(name, [])
                holder[name] = kept if len(kept) == value else items[:value]

    def _own_lists(self) -> dict[str, list[Any]]:
        """Lists in the sub-network's own configuration: extraction has shortened them."""
        config: Any = self.module.config
        return {k: list(v) for k, v in vars(config).items() if isinstance(v, (list, tuple))}

    # sizes: settings that say how large dimensions are

    def _solved(
        self, config: dict[str, Any], known: set[Place], settled: frozenset[Setting]
    ) -> Iterator[dict[str, Any]]:
        """Configurations that can be had by changing settings that are not settled yet."""
        sizes = self._build(config)
        if sizes is None or not known <= sizes.keys():
            return
        wrong = {place for place in known if sizes[place] != self.target[place]}
        for changed, done in self._steps(config, sizes, known, wrong, settled) if wrong else ():
            yield from self._solved(changed, known, done)
        if not any(place[0] == "tensor" for place in wrong):
            yield config
            yield from self._retuned(config)

    def _steps(
        self,
        config: dict[str, Any],
        sizes: dict[Place, int],
        known: set[Place],
        wrong: set[Place],
        settled: frozenset[Setting],
    ) -> Iterator[tuple[dict[str, Any], frozenset[Setting]]]:
        """What to change next, the surest first, and the settings that are settled then."""
        multiples = {self._first_sizes[p] for p in wrong}
        likely = [
            setting
            for setting, value in whole_numbers(self.origin["config"])
            if setting not in settled and any(size % value == 0 for size in multiples)
        ]
        moves = self._moves(config, sizes, known, wrong, likely)
        movers = Counter(place for moved in moves.values() for place in moved)
        right = {place for place in known - wrong if place[0] == "tensor"}
        # A size that is right may change if another setting can change it back.
        for held in (right, {place for place in right if movers[place] == 1}):
            able = {s: moved for s, moved in moves.items() if not moved.keys() & held}
            values, shared = self._determined(config, sizes, wrong, able)
            if values:
                yield _with(config, values), settled | values.keys()
            for setting in shared if values == {} else ():  # as many as can stay as they are
                yield config, settled | {setting}
        self.why = self.why or self._unmoved(config, sizes, wrong, moves, right)

    def _by_trial(self, config: dict[str, Any], setting: Setting, place: Place) -> int:
        """The value of a small setting that gives a size; 0 if there is none."""
        for value in range(1, min(_get(self.origin["config"], setting), _MOST_TRIED) + 1):
            changed = self._build(_with(config, {setting: value})) or {}
            if changed.get(place) == self.target[place]:
                return value
        return 0

    def _moves(
        self,
        config: dict[str, Any],
        sizes: dict[Place, int],
        known: set[Place],
        wanted: set[Place],
        settings: Sequence[Setting],
    ) -> dict[Setting, dict[Place, float]]:
        """For each setting that changes a wanted size: what it changes, and how fast.

        The speed is 0 where it is not constant.
        """
        found: dict[Setting, dict[Place, float]] = {}
        for setting in settings:
            trials: list[dict[Place, float]] = []
            value = _get(config, setting)
            for other in (2 * value, value // 2, value + 1, value - 1):
                changed = self._build(_with(config, {setting: other})) if other else None
                if changed is None or not known <= changed.keys():
                    continue
                moved = {p: changed[p] - sizes[p] for p in known if changed[p] != sizes[p]}
                trials.append({p: by / (other - value) for p, by in moved.items()})
                if len(trials) == 2 or not moved.keys() & wanted:
                    break
            # What moves once only was rounded.
            places = set.intersection(*map(set, trials)) if trials else set()
            if places & wanted:
                constant = {p for p in places if len({trial[p] for trial in trials}) == 1}
                found[setting] = {p: trials[0][p] if p in constant else 0.0 for p in places}
        return found

    def _determined(
        self,
        config: dict[str, Any],
        sizes: dict[Place, int],
        wrong: set[Place],
        able: dict[Setting, dict[Place, float]],
    ) -> tuple[dict[Setting, int] | None, list[Setting]]:
        """Values that sizes with one setting ask for, and the settings of the others."""
        wanted: dict[Setting, dict[int, Place]] = {}
        shared: dict[Setting, None] = {}
        for place in sorted(wrong, key=_tensors_first):
            movers = [setting for setting, moved in able.items() if place in moved]
            if len(movers) != 1:
                shared.update(dict.fromkeys(movers))
                if not movers and place[0] == "tensor":
                    return None, []
                continue
            (setting,) = movers
            slope = able[setting][place]
            if slope:
                more = (self.target[place] - sizes[place]) / slope
                value = int(_get(config, setting) + more) if more.is_integer() else 0
            elif place[0] == "tensor" and setting not in wanted:
                value = self._by_trial(config, setting, place)
            else:
                continue
            wanted.setdefault(setting, {}).setdefault(value, place)
        if not all(self._agree(setting, values) for setting, values in wanted.items()):
            return None, []
        return {setting: next(iter(values)) for setting, values in wanted.items()}, [*shared]

    def _unmoved(
        self,
        config: dict[str, Any],
        sizes: dict[Place, int],
        wrong: set[Place],
        moves: dict[Setting, dict[Place, float]],
        right: set[Place],
    ) -> str:
        """Why a size can't be had: its setting would change others that are right."""
        for place in sorted(wrong, key=_tensors_first):
            movers = [setting for setting, moved in moves.items() if place in moved]
            movers.sort(key=lambda setting: len(moves[setting]))
            if any(not moves[setting].keys() & right for setting in movers):
                continue
            for setting in movers:
                other = min(moves[setting].keys() & right, key=_tensors_first)
                slope = moves[setting][place]
                if slope:
                    now = _get(config, setting)
                    asked = now + (self.target[place] - sizes[place]) / slope
                    return (
                        f"{_named(setting)} would have to be {asked:g} for '{_at(place)}' and "
                        f"{now} for '{_at(other)}'"
                    )
            return f"'{_at(place)}' has size {self.target[place]}, and no setting says so"
        return ""

    def _retuned(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """With other values for settings that change integers only, such as head counts.

        Shapes don't tell them. Values are tried that give integers as they are in the
        sub-network, those that give most first.
        """
        sizes = self._build(config)
        assert sizes is not None
        wrong = {p for p in sizes.keys() & self.target if p[0] == "integer"}
        wrong = {place for place in wrong if sizes[place] != self.target[place]}
        beside = {(p[1], sizes[p]) for p in sizes if p[0] == "integer"}
        likely = [
            setting
            for setting, value in whole_numbers(config)
            if any((place[1], value) in beside for place in wrong)
        ]
        best = copy.deepcopy(config)
        for setting, moved in self._moves(config, sizes, set(sizes), wrong, likely).items():
            if any(place[0] != "integer" for place in moved):
                continue
            gains: dict[int, int] = {}
            for other in range(1, min(_get(self.origin["config"], setting), _MOST_TRIED) + 1):
                changed = self._build(_with(config, {setting: other})) or {}
                gains[other] = sum(changed.get(p) == self.target[p] for p in wrong)
            value = max(gains, key=lambda other: gains[other])
            if gains[value]:
                set_setting(best, setting, value)
        if best != config:
            yield best

    def _agree(self, setting: Setting, values: Mapping[int, Place]) -> bool:
        if len(values) == 1 and min(values) > 0:
            return True
        asked = [f"{value or 'a fraction'} for '{_at(p)}'" for value, p in values.items()]
        self.why = self.why or f"{_named(setting)} would have to be {' and '.join(asked)}"
        return False

    # the proof

    def same_outputs(self, config: dict[str, Any], args: Any, kwargs: Any) -> bool:
        """Whether the configured model computes what the sub-network computes."""
        try:
            twin = _twin(self.module, {**self.origin, "config": config})
            mine, theirs = rebuild.outline(self.module), rebuild.outline(twin)
            if next(rebuild.structural(mine, theirs), None):
                return False
            ours, its = (_outputs(network, args, kwargs) for network in (self.module, twin))
        except Exception:  # whatever a model raises: then nothing is proven
            return False
        return len(ours) == len(its) and all(map(torch.equal, ours, its))


class _WithoutWeights(TorchFunctionMode):
    """Puts what is not yet initialised on the meta device; all other tensors are real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


def _twin(module: nn.Module, origin: dict[str, Any]) -> nn.Module:
    """The configured model with a network's own tensors; what no file has, it makes itself."""
    with torch.random.fork_rng(devices=[]), _WithoutWeights():
        twin = rebuild.construct(origin)
    state = module.state_dict(keep_vars=True)
    device = next(module.parameters()).device
    for path, part in twin.named_modules():
        for store in (part._parameters, part._buffers):
            for name in store:
                full = f"{path}.{name}" if path else name
                if full in state:
                    store[name] = state[full]
                elif store[name] is not None:
                    store[name] = store[name].to(device)
    return twin


def _outputs(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            given = copy.deepcopy((args, kwargs))
            output = module(*given[0], **given[1])
    finally:
        for part, mode in modes.items():
            part.training = mode
    plain = dict(output) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, Tensor)]


def _made_up(specification: Any, device: torch.device) -> Any:
    """Inputs of the shapes, types and ranges that an example had."""
    generator = torch.Generator().manual_seed(0)

    def made(one: dict[str, Any]) -> Tensor:
        shape, dtype = one["shape"], one["dtype"]
        if "low" in one:
            low, high = one["low"], one["high"] + 1
            return torch.randint(low, high, shape, generator=generator).to(device, dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    def is_tensor(one: Any) -> bool:
        return isinstance(one, dict) and "dtype" in one

    return tree_map(
        lambda one: made(one) if is_tensor(one) else one, specification, is_leaf=is_tensor
    )
