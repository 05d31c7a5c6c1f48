from collections.abc import Sequence

import pytest

from supple.errors import SettingError
from supple.recipe.settings import fitted


def build(
    *, width: int = 8, lr: float = 0.1, sizes: Sequence[int] = (), name: str | None = None
):
    return width, lr, sizes, name


def needs(path: str, **rest: int):
    return path, rest


def test_values_take_the_types_of_the_parameters():
    assert fitted(build, {"lr": "1e-4", "width": "5", "sizes": [3, "7"]}, "it") == {
        "lr": 1e-4,
        "width": 5,
        "sizes": [3, 7],
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widht": 5}, "it has no setting 'widht', did you mean 'width'"),
        ({"width": "five"}, "setting 'width' of it: .*integer.*got 'five'"),
        ({"width": 5, "hidden": 1}, "no setting 'hidden'"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(SettingError, match=words):
        fitted(build, settings, "it", given=("hidden",))


def test_a_parameter_without_a_default_is_needed_and_open_keywords_take_any_name():
    with pytest.raises(SettingError, match="it needs the setting 'path'"):
        fitted(needs, {}, "it")
    assert fitted(needs, {"path": "a", "other": 3}, "it") == {"path": "a", "other": 3}
