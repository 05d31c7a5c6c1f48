"""Techniques by what a recipe calls them: keys, and the names of baselines.

Published methods that others are measured against have no key of their own. A recipe, `supple
prune` and `supple quantize` name them by family:

- `weights/wanda`: single weights are removed;
- `units/fisher`: channels, neurons, heads or experts are;
- `codes/gptq`: weights are rounded to codes of a few bits, after training;
- `qat/lsq`: weights and inputs are, while the network trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from supple.errors import SettingError, nearest
from supple.prune import _units
from supple.prune import base as prune
from supple.quantize import _qat
from supple.quantize import base as quantize
from supple.quantize._embeddings import Embeddings
from supple.quantize._smooth import SmoothQuant
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
        _check(name, _units.SCORES, family)
        return _made(_units.ScoredUnits, {"score": name, **given}, key)
    if family in _FAMILIES:
        _check(name, _FAMILIES[family], family)
        cls, own = _FAMILIES[family][name]
        return _made(cls, {**own, **given}, key)
    made: Technique = from_settings(key, given)
    return made


def _all(
    cls: type[Technique], baselines: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[type[Technique], Mapping[str, Any]]]:
    return {name: (cls, settings) for name, settings in baselines.items()}


_FAMILIES: Mapping[str, Mapping[str, tuple[type[Technique], Mapping[str, Any]]]] = {
    "weights": _all(prune.Weights, prune.BASELINES),
    "codes": {
        **_all(quantize.Weights, quantize.BASELINES),
        "smoothquant": (SmoothQuant, {}),
        "embeddings": (Embeddings, {}),
    },
    "qat": _all(_qat.QAT, _qat.BASELINES),
}
"""The class and the settings of each baseline, by family and name."""


def _made(cls: type[Technique], settings: Mapping[str, Any], key: str) -> Technique:
    made: Technique = make(cls, settings, name=key)
    return made


def _check(name: str, names: Iterable[str], family: str) -> None:
    known = list(names)
    if name not in known:
        raise SettingError(
            f"there is no baseline '{family}/{name}'{nearest(name, known)} "
            f"(baselines: {', '.join(f'{family}/{one}' for one in known)})"
        )
