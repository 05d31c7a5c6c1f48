"""Integers that remember where they came from."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from supple.graph.integers import (
    AttributeKey,
    Attributes,
    Expression,
    Operation,
    Size,
    TracedInt,
    expression_of,
    leaves,
)
from tests.graph.checks import assert_untouched, state_of

HEADS = AttributeKey("attention", ("num_heads",))


def heads(value: int = 4) -> TracedInt:
    return TracedInt(value, HEADS)


@pytest.mark.parametrize(
    ("computed", "value", "symbol"),
    [
        (heads() + 3, 7, "+"),
        (3 + heads(), 7, "+"),
        (heads() - 3, 1, "-"),
        (3 - heads(), -1, "-"),
        (heads() * 3, 12, "*"),
        (3 * heads(), 12, "*"),
        (48 // heads(), 12, "//"),
        (heads() // 3, 1, "//"),
        (heads() % 3, 1, "%"),
        (50 % heads(), 2, "%"),
    ],
)
def test_arithmetic_keeps_the_value_and_the_expression(
    computed: Any, value: int, symbol: str
) -> None:
    assert isinstance(computed, TracedInt)
    assert int(computed) == value
    assert isinstance(computed.expression, Operation)
    assert computed.expression.symbol == symbol
    assert list(leaves(computed.expression)) == [HEADS]


def test_reflected_operands_keep_their_sides() -> None:
    assert (48 // heads()).expression == Operation("//", 48, HEADS)
    assert (heads() // 2).expression == Operation("//", HEADS, 2)
    assert (heads() - heads()).expression == Operation("-", HEADS, HEADS)


def test_nested_arithmetic_lists_every_leaf() -> None:
    width = TracedInt(48, Size(3, 1))
    computed = (width // heads()) * heads()
    assert int(computed) == 48
    assert list(leaves(computed.expression)) == [Size(3, 1), HEADS, HEADS]


def test_a_plain_integer_is_a_literal() -> None:
    assert expression_of(7) == 7
    assert list(leaves(7)) == []


def test_floats_and_booleans_are_no_sizes() -> None:
    assert heads() / 2 == 2.0
    assert isinstance(heads() * 0.5, float)
    assert type(heads() + True) is int


def test_division_by_zero_raises_as_ever() -> None:
    with pytest.raises(ZeroDivisionError):
        heads() // 0


def test_it_hashes_compares_and_indexes_like_an_integer() -> None:
    assert {4: "x"}[heads()] == "x"
    assert heads() == 4
    assert heads() != 5
    assert [0, 1, 2, 3, 9][heads()] == 9
    assert len(range(heads())) == 4
    assert heads() != "4"


def test_copies_keep_the_expression_and_pickles_do_not() -> None:
    traced = heads()
    assert copy.deepcopy({"n": traced})["n"] is traced
    assert copy.copy(traced) is traced
    restored = pickle.loads(pickle.dumps(traced))  # not a file: only what deepcopy relies on
    assert type(restored) is int
    assert restored == 4


@pytest.fixture
def compared() -> Any:
    found: list[tuple[Expression, Expression]] = []
    TracedInt.on_equal = lambda a, b: found.append((a, b))
    yield found
    TracedInt.on_equal = None


def test_equal_traced_integers_are_reported(compared: list[Any]) -> None:
    size = TracedInt(4, Size(0, 1))
    assert heads() == size
    assert (heads() != size) is False
    assert compared == [(HEADS, Size(0, 1))] * 2


def test_a_literal_that_is_equal_is_reported_and_unequal_ones_are_not(
    compared: list[Any],
) -> None:
    assert heads() != TracedInt(5, Size(0, 1))
    assert heads() != 5
    assert heads() < TracedInt(5, Size(0, 1))
    assert compared == []
    assert heads() == 4
    assert compared == [(HEADS, 4)]


# --- attributes --------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.num_heads = 4
        self.shape = (3, 5)
        self.sizes = [7, 8]
        self.flag = True
        self.mixed = (3, "x")
        self.empty: tuple[int, ...] = ()
        self.scale = 0.5
        self.torch_size = torch.Size([2, 9])
        self.name = "layer"


def two_layers() -> nn.Sequential:
    config = SimpleNamespace(hidden=48, groups=(2, 4), act="relu")
    return nn.Sequential(Layer(config), Layer(config))


def test_every_integer_attribute_is_traced_and_put_back() -> None:
    model = two_layers()
    before = state_of(model)
    with Attributes(model):
        first = model[0]
        assert first.num_heads.expression == AttributeKey("0", ("num_heads",))
        assert [n.expression.index for n in first.shape] == [0, 1]
        assert type(first.shape) is tuple
        assert type(first.sizes) is list
        assert first.sizes == [7, 8]
        assert first.sizes[1].expression == AttributeKey("0", ("sizes",), 1)
        assert type(first.torch_size) is torch.Size
        assert first.config.hidden.expression == AttributeKey("0", ("config", "hidden"))
        assert first.config.groups[1].expression == AttributeKey("0", ("config", "groups"), 1)
    assert_untouched(model, before)


def test_booleans_strings_floats_and_mixed_tuples_stay() -> None:
    model = two_layers()
    with Attributes(model):
        layer = model[1]
        assert layer.flag is True
        assert layer.mixed == (3, "x")
        assert type(layer.mixed[0]) is int
        assert layer.scale == 0.5
        assert layer.empty == ()
        assert layer.config.act == "relu"


def test_a_config_that_modules_share_counts_once() -> None:
    model = two_layers()
    with Attributes(model):
        assert model[0].config is model[1].config
        assert model[1].config.hidden.expression.module == "0"
        assert model[1].num_heads.expression.module == "1"


def test_attributes_are_put_back_after_an_exception() -> None:
    model = two_layers()
    before = state_of(model)
    with pytest.raises(KeyError), Attributes(model):
        raise KeyError
    assert_untouched(model, before)
    assert type(model[0].num_heads) is int


def test_attributes_are_put_back_although_the_forward_changed_them() -> None:
    model = two_layers()
    with Attributes(model):
        model[0].num_heads = 99
        del model[0].sizes
    assert model[0].num_heads == 4
    assert model[0].sizes == [7, 8]


def test_a_key_reads_as_a_reader_would_write_it() -> None:
    assert str(AttributeKey("a.b", ("config", "n"))) == "a.b.config.n"
    assert str(AttributeKey("", ("shape",), 1)) == "shape[1]"


def test_sizes_of_tensors_are_traced_only_while_a_model_is_recorded() -> None:
    assert type(torch.zeros(2, 3).shape[0]) is int
    assert TracedInt.on_equal is None
