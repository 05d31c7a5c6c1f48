"""Names of published baselines."""

from __future__ import annotations

import pytest

from supple.errors import SettingError
from supple.recipe.baselines import technique_named


@pytest.mark.parametrize(
    ("key", "kind", "settings"),
    [
        ("weights/wanda", "transform", {"score": "wanda"}),
        ("units/fisher", "transform", {"score": "fisher", "target": "macs=50%"}),
        ("codes/rtn", "transform", {"bits": 3, "solver": "nearest"}),
        ("codes/gptq", "transform", {"solver": "gptq", "group_size": 64}),
        ("codes/nf4", "transform", {"format": "nf4", "group_size": 64}),
        ("codes/smoothquant", "transform", {"alpha": 0.7, "activations": 8}),
        ("qat/lsq", "rule", {"bits": 2, "granularity": "tensor"}),
        ("prune/global-mp", "transform", {"sparsity": 0.5}),
    ],
)
def test_names_and_settings_make_techniques(key: str, kind: str, settings: dict) -> None:
    made = technique_named(key, settings)
    assert made.kind == kind
    assert {name: getattr(made, name) for name in settings} == settings
    own = technique_named(key, {"target": settings["target"]} if "target" in settings else None)
    assert type(own) is type(made)


def test_what_has_no_name_is_told_the_nearest() -> None:
    for key, match in (
        ("codes/gptqq", r"no baseline 'codes/gptqq', did you mean 'gptq'\?"),
        ("qat/lsqq", "did you mean 'lsq'"),
        ("units/fischer", "did you mean 'fisher'"),
    ):
        with pytest.raises(SettingError, match=match):
            technique_named(key)
    with pytest.raises(SettingError, match="has no setting 'sparsity'"):
        technique_named("codes/rtn", {"sparsity": 0.5})
