from __future__ import annotations

import inspect

import pytest

from supple import errors
from supple.errors import MissingExtraError, SuppleError, import_extra, nearest

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, SuppleError) and value is not SuppleError
]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_doubles_as_a_builtin_and_is_drawn_in_the_tree(
    error: type[SuppleError],
) -> None:
    builtin = error.__bases__[1]
    assert error.__bases__[0] is SuppleError
    assert builtin.__module__ == "builtins"
    assert f"{error.__name__} " in (errors.__doc__ or "")
    assert f" {builtin.__name__} " in (errors.__doc__ or "")


def test_no_message_is_printed_in_quotes() -> None:
    assert all(str(error("what was wrong")) == "what was wrong" for error in CLASSES)


def test_a_guess_is_made_only_if_one_is_close() -> None:
    assert nearest("epoch", ["epochs", "lr"]) == ", did you mean 'epochs'?"
    assert nearest("momentum", ["epochs", "lr"]) == ""


def test_a_missing_package_is_told_with_the_extra_that_brings_it() -> None:
    with pytest.raises(MissingExtraError, match=r"'no_such_package'.*'supple\[serve\]'"):
        import_extra("no_such_package.part", "serve")


def test_a_package_that_is_there_is_given() -> None:
    assert import_extra("json", "serve").loads("[1]") == [1]


def test_a_fault_inside_an_installed_package_is_not_called_missing(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"{tmp_path}/broken_package.py"
    with open(file, "w", encoding="utf-8") as stream:
        stream.write("import something_it_needs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_it_needs") as caught:
        import_extra("broken_package", "serve")
    assert not isinstance(caught.value, MissingExtraError)
