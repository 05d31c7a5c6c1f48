"""Conformance: what every technique must do, checked the same way for all of them.

`yield_checks(cls)` gives the checks of a technique by its kind, for every one of its
`examples()`. `tests/test_conformance.py` is the one test that runs them; anybody's own
techniques can be run through them too:

    @pytest.mark.parametrize("check", list(yield_checks(MyPruner)), ids=lambda c: c.name)
    def test_conformance(check):
        check.run()

A check that can't apply is declared on the class, with its reason:
`skips = {"check_exports": "data-dependent control flow"}`. It still runs, and must fail
(`Check.reason` makes it a strict expected failure), so a skip that is no longer needed shows.

No technique is named here. A check that needs a network uses a small one with prime sizes; a
Transform that needs another gives it with `toy()`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import doctest
import functools
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from supple.technique import (
    Rule,
    Search,
    Technique,
    Transform,
    key_of,
    make,
    registered_in,
    settings,
)
from supple.testing import rules, searches, transforms
from supple.testing.toys import global_random_untouched, globals_untouched

__all__ = ["Check", "yield_checks"]


@dataclass(frozen=True)
class Check:
    """One thing that a technique must do.

    Args:
        name: Name of the check, with the number of the example, such as `"check_runs[1]"`.
        run: Raises where the technique fails.
        reason: Why the technique declares that it must fail; None where it must pass.
    """

    name: str
    run: Callable[[], None]
    reason: str | None = None


def yield_checks(cls: type[Technique]) -> Iterator[Check]:
    """Gives all checks of a technique.

    Args:
        cls: Its class.

    Yields:
        Checks of the class, then those of each of its `examples()`.
    """
    names = {check.__name__ for check in _checks_of(cls)} | {
        check.__name__ for check in _CLASS_CHECKS
    }
    yield Check("check_skips_exist", functools.partial(_check_skips_exist, cls, names))
    for check in _CLASS_CHECKS:
        yield Check(check.__name__, functools.partial(check, cls), _reason(cls, check))
    for number, example in enumerate(cls.examples()):
        for run in _checks_of(cls):
            name = f"{run.__name__}[{number}]"
            yield Check(name, functools.partial(run, example), _reason(cls, run))


# ---------------------------------------------------------------- every technique: the class


def check_frozen_dataclass(cls: type[Technique]) -> None:
    """It is a frozen dataclass, and its defaults and examples can be made."""
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} must be a dataclass"
    assert "__dataclass_fields__" in vars(cls), f"{cls.__name__} lacks its own @dataclass"
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen, f"{cls.__name__} must be @dataclass(frozen=True, kw_only=True)"
    assert not inspect.isabstract(cls), f"{cls.__name__} leaves methods abstract"
    assert isinstance(cls(), cls), f"{cls.__name__}() gives something else"
    examples = cls.examples()
    assert examples, f"{cls.__name__}.examples() gives nothing to check"
    given = {type(example) for example in examples} | {type(cls.neutral())}
    assert given <= {cls, type(None)}, f"{cls.__name__}.examples() gives other classes: {given}"


def check_card(cls: type[Technique]) -> None:
    """It has a title, a paper, and a kind."""
    assert cls.card.title.strip(), f"{cls.__name__} has no title"
    assert cls.card.paper.strip(), f"{cls.__name__} names no paper"
    assert cls.kind, f"{cls.__name__} has no kind"


def check_names_agree(cls: type[Technique]) -> None:
    """File, key and class have one name, and the file has one technique."""
    module = sys.modules[cls.__module__]
    assert registered_in(module) is cls, f"{cls.__name__} lacks @register"
    name = key_of(cls).rpartition("/")[2].replace("-", "")
    assert cls.__name__.lower() == name, (
        f"class {cls.__name__} must have the name of its key, {key_of(cls)}"
    )


def check_docstring(cls: type[Technique]) -> None:
    """The docstring has an example and a source, tells every setting, and its example runs."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    sections = _sections(text)
    for title in ("Example", "Source"):
        assert sections.get(title, "").strip(), f"{cls.__name__} has no section '{title}:'"
    arguments = sections.get("Args", "") + _sections(_inherited_docs(cls)).get("Args", "")
    for field in dataclasses.fields(cls):
        assert re.search(rf"^\s+{field.name}:", arguments, re.MULTILINE), (
            f"{cls.__name__} doesn't tell its setting '{field.name}' under 'Args:'"
        )
    example = sections["Example"]
    blocks = re.findall(r"```python\n(.*?)```", example, re.DOTALL)
    assert blocks or ">>>" in example, f"the example of {cls.__name__} has no code"
    for block in blocks:
        compile(textwrap.dedent(block), f"example of {cls.__name__}", "exec")
    _run_doctests(cls)


def check_import_leaves_no_trace(cls: type[Technique]) -> None:
    """Running its file changes no random state, default, hook or warning filter."""
    spec = importlib.util.find_spec(cls.__module__)
    assert spec is not None and spec.loader is not None, f"no file for {cls.__module__}"  # noqa: PT018
    fresh = importlib.util.module_from_spec(spec)
    original = sys.modules[cls.__module__]
    with global_random_untouched(), globals_untouched():
        try:
            # dataclasses look their module up by name.
            sys.modules[cls.__module__] = fresh
            spec.loader.exec_module(fresh)
        finally:
            sys.modules[cls.__module__] = original


# ------------------------------------------------------------- every technique: each example


def check_is_a_value(technique: Technique) -> None:
    """It can be hashed, copied and compared by its settings, and not changed."""
    assert hash(technique) == hash(copy.deepcopy(technique)), "a copy has another hash"
    assert technique == copy.deepcopy(technique), "it differs from its copy"
    for field in dataclasses.fields(technique):
        with contextlib.suppress(dataclasses.FrozenInstanceError):
            setattr(technique, field.name, getattr(technique, field.name))
            raise AssertionError(f"setting '{field.name}' can be assigned to")


def check_recipe_round_trip(technique: Technique) -> None:
    """Its settings survive being written as YAML and as JSON, and make the same technique."""
    plain = settings(technique)
    for again in (yaml.safe_load(yaml.safe_dump(plain)), json.loads(json.dumps(plain))):
        made = make(type(technique), again)
        assert made == technique, f"{technique} became {made}"


_CLASS_CHECKS: tuple[Callable[[type[Technique]], None], ...] = (
    check_frozen_dataclass,
    check_card,
    check_names_agree,
    check_docstring,
    check_import_leaves_no_trace,
)
_EXAMPLE_CHECKS: dict[type[Technique], Sequence[Callable[[Any], None]]] = {
    Technique: (check_is_a_value, check_recipe_round_trip),
    Transform: transforms.CHECKS,
    Rule: rules.CHECKS,
    Search: searches.CHECKS,
}


def _checks_of(cls: type[Technique]) -> list[Callable[[Any], None]]:
    return [
        check
        for kind, checks in _EXAMPLE_CHECKS.items()
        if issubclass(cls, kind)
        for check in checks
    ]


def _reason(cls: type[Technique], check: Callable[[Any], None]) -> str | None:
    return cls.skips.get(check.__name__)


def _check_skips_exist(cls: type[Technique], names: set[str]) -> None:
    for name, reason in cls.skips.items():
        assert name in names, f"{cls.__name__} skips '{name}', which is no check of its kind"
        assert reason.strip(), f"{cls.__name__} skips '{name}' without a reason"


# -------------------------------------------------------------------------------- docstrings


def _sections(text: str) -> dict[str, str]:
    """Splits a Google-style docstring at its section titles."""
    parts = re.split(r"^(\w+):\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _inherited_docs(cls: type[Technique]) -> str:
    """Gives the Args of the bases' docstrings, in one section."""
    texts = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in cls.__mro__[1:]]
    return "Args:\n" + "\n".join(_sections(text).get("Args", "") for text in texts)


def _run_doctests(cls: type[Technique]) -> None:
    module = sys.modules[cls.__module__]
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    told: list[str] = []
    for test in doctest.DocTestFinder().find(cls, module=module, globs=dict(vars(module))):
        runner.run(test, out=told.append)
    assert not runner.failures, "".join(told)
