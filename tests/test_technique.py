from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import yaml

from supple.errors import SettingError, UnknownTechniqueError
from supple.technique import (
    ROOMS,
    Card,
    Study,
    Technique,
    from_settings,
    key_of,
    make,
    register,
    registered_in,
    settings,
    technique,
    techniques,
)
from tests.guards import ROOT


@register(title="An inner one", paper="none")
@dataclass(frozen=True, kw_only=True)
class Inner(Study):
    seed: int = 0

    def run(self) -> None:
        """Does nothing."""


@register(title="One of everything", paper="none", requires=["ray"])
@dataclass(frozen=True, kw_only=True)
class Everything(Study):
    distinguishing: ClassVar[str] = "run"

    whole: int = 1
    number: float = 0.5
    flag: bool = False
    text: str = "a"
    maybe: float | None = None
    either: int | str = 1
    mode: Literal["no", "sum", 8] = "sum"
    many: tuple[float, ...] = ()
    pair: tuple[int, str] = (1, "a")
    names: list[str] = dataclasses.field(default_factory=list)
    table: Mapping[str, float] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)

    def run(self) -> None:
        """Does nothing."""


def test_a_card_holds_the_facts_and_register_changes_nothing_else() -> None:
    assert Everything.card == Card("One of everything", "none", ("ray",))
    assert Everything.kind == "study"
    assert Everything().key == key_of(Everything) == "tests/test-technique"
    assert Everything.examples() == [Everything()]
    assert Everything.neutral() is None


def test_keys_are_file_names_below_rooms() -> None:
    for key in techniques():
        room, name = key.split("/")
        assert room in ROOMS
        assert (ROOT / "supple" / room / f"{name.replace('-', '_')}.py").exists()
    assert "supernet/bignas" in techniques()
    assert not [key for key in techniques() if key.endswith("/base") or "__" in key]


def test_keys_of_one_room() -> None:
    assert techniques("supernet") == [k for k in techniques() if k.startswith("supernet/")]
    with pytest.raises(UnknownTechniqueError, match="did you mean 'supernet'"):
        techniques("supernets")


def test_listing_keys_imports_none_of_them() -> None:
    code = "import sys, supple; supple.techniques(); print('supple.search' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("supernet/bignass", "did you mean 'supernet/bignas'"),
        ("search/bignas", "did you mean 'supernet/bignas'"),
        ("bignas", "did you mean 'supernet/bignas'"),
        ("supernet/base", "there is no technique 'supernet/base'"),
        ("supernet/../search/nsga2", "there is no technique"),
        ("", "there is no technique ''"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, message: str) -> None:
    with pytest.raises(UnknownTechniqueError, match=message):
        technique(key)


def test_settings_make_the_same_technique_again() -> None:
    everything = Everything(many=(1.0, 2.0), table={"a": 1.0}, maybe=2.0, names=["x"])
    assert make(Everything, {**settings(everything), "inner": Inner()}) == everything


def test_a_technique_among_the_settings_is_written_as_its_key() -> None:
    assert settings(Everything(inner=Inner(seed=3)))["inner"] == {
        "tests/test-technique": {"seed": 3}
    }


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("whole: 1e3", "whole", 1000),
        ("whole: 4.0", "whole", 4),
        ("number: 1e-4", "number", 1e-4),
        ("number: 3", "number", 3.0),
        ("flag: 'yes'", "flag", True),
        ("flag: off", "flag", False),
        ("maybe: null", "maybe", None),
        ("maybe: 1e-2", "maybe", 0.01),
        ("either: abc", "either", "abc"),
        ("either: 7", "either", 7),
        ("mode: 'no'", "mode", "no"),
        ("mode: '8'", "mode", 8),
        ("many: [1, 2e-1]", "many", (1.0, 0.2)),
        ("pair: ['3', b]", "pair", (3, "b")),
        ("names: [a]", "names", ["a"]),
        ("table: {a: 1e-1}", "table", {"a": 0.1}),
    ],
)
def test_yaml_is_converted_by_the_type_of_the_field(
    text: str, name: str, value: object
) -> None:
    converted = getattr(make(Everything, yaml.safe_load(text)), name)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wole": 1}, "no setting 'wole', did you mean 'whole'"),
        ({"whole": "four"}, "'whole' of Everything must be a whole number, got 'four'"),
        ({"whole": 1.5}, "must be a whole number, got 1.5"),
        ({"whole": True}, "must be a whole number, got True"),
        ({"number": "fast"}, "must be a number, got 'fast'"),
        ({"flag": 2}, "must be true or false, got 2"),
        ({"text": False}, "must be text, got False"),
        ({"maybe": "x"}, "must be a number or nothing, got 'x'"),
        ({"mode": "max"}, "must be one of 'no', 'sum', 8, got 'max'"),
        ({"many": 3}, "'many' of Everything must be"),
        ({"many": [1, "x"]}, "value 2 of setting 'many'"),
        ({"pair": [1]}, "must have 2 values"),
        ({"inner": "supernet/bignas"}, "technique of kind Inner"),
        ({"inner": {"seed": 0, "run": 1}}, "technique of kind Inner"),
        ([1], "must be a mapping"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_do(given: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make(Everything, given)


def test_a_setting_without_a_value_is_asked_for() -> None:
    @dataclass(frozen=True)
    class Needy:
        rank: int

    with pytest.raises(SettingError, match="needs a value for: rank"):
        make(Needy, {})


def test_techniques_are_made_from_key_and_settings() -> None:
    made = from_settings("supernet/bignas", {"temperature": "2e0"})
    assert made.temperature == 2.0
    assert from_settings("supernet/bignas", settings(made)) == made
    assert from_settings("supernet/bignas") == technique("supernet/bignas")()
    with pytest.raises(SettingError, match=r"supernet/bignas has no setting 'temprature'"):
        from_settings("supernet/bignas", {"temprature": 1})


def test_a_file_must_hold_exactly_one_registered_class() -> None:
    module = ModuleType(__name__)
    with pytest.raises(SettingError, match="it has 0: none"):
        registered_in(module)
    vars(module).update(Inner=Inner)
    assert registered_in(module) is Inner
    vars(module).update(Everything=Everything, Technique=Technique)
    with pytest.raises(SettingError, match="it has 2: Inner, Everything"):
        registered_in(module)
