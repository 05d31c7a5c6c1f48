"""Techniques by what a recipe calls them: keys, and the names of baselines.

Published methods that others are measured against have no key of their own. A recipe, `supple
prune` and `supple quantize` name them by family:

- `weights/wanda`: single weights are removed;
- `units/fisher`: channels, neurons, heads or experts are;
- `codes/gptq`: weights are rounded to codes of a few bits, after training;
- `qat/lsq`: weights and inputs are, while the network trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supple.errors import SettingError, nearest
from supple.prune import _units
from supple.prune import base as prune
from supple.quantize import _qat
from supple.quantize import base as quantize
from supple.technique import Technique, from_settings, make

__all__ = ["technique_named"]


def technique_named(key: str, settings: Mapping[str, Any] | None = None) -> Technique:
    """Makes a technique from its key, or a baseline from its name, and the settings.

    Args:
        key: Such as `"prune/global-mp"`, `"weights/wanda"` or `"codes/gptq"`.
        settings: Field name -> value; None for the defaults.

    Returns:
        The technique.

    Raises:
        UnknownTechniqueError: No technique has this key.
        SettingError: There is no such baseline, or a setting is wrong.

    Example:
        >>> technique_named("weights/wanda", {"sparsity": "0.6"}).sparsity
        0.6
        >>> technique_named("codes/nf4", {"group_size": 32}).format
        'nf4'
    """
    family, _, name = key.partition("/")
    given = dict(settings or {})
    if family == "units":
        _known(name, dict.fromkeys(_units.SCORES), family)
        return _made(_units.ScoredUnits, {"score": name, **given}, key)
    if family in _FAMILIES:
        cls, settings_of = _FAMILIES[family]
        return _made(cls, {**_known(name, settings_of, family), **given}, key)
    made: Technique = from_settings(key, given)
    return made


_FAMILIES: Mapping[str, tuple[type[Technique], Mapping[str, Any]]] = {
    "weights": (prune.Weights, prune.BASELINES),
    "codes": (quantize.Weights, quantize.BASELINES),
    "qat": (_qat.QAT, _qat.BASELINES),
}
"""The class of a family's baselines, and the settings of each by name."""


def _made(cls: type[Technique], settings: Mapping[str, Any], key: str) -> Technique:
    made: Technique = make(cls, settings, name=key)
    return made


def _known(name: str, names: Mapping[str, Any], family: str) -> Mapping[str, Any]:
    if name not in names:
        raise SettingError(
            f"there is no baseline '{family}/{name}'{nearest(name, names)} "
            f"(baselines: {', '.join(f'{family}/{one}' for one in names)})"
        )
    return names[name] or {}
