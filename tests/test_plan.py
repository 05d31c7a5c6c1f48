"""A size, worked out once: slices, integers, shortened containers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.base import Patch, merge
from supple.graph.blocks import Stack
from supple.graph.couple import analyse
from supple.graph.dims import Atom, concatenation, product
from supple.graph.integers import AttributeKey
from supple.plan import Layout, Plan, Slice, per_layer_lists, positional_attributes, slice_of
from tests.graph.checks import assert_same, assert_untouched, run, shake, state_of
from tests.zoo import ZOO


def mlp() -> nn.Sequential:
    return shake(nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)))  # type: ignore[return-value]


def inputs() -> tuple[Tensor, ...]:
    return (torch.randn(4, 5, generator=torch.Generator().manual_seed(1)),)


# --- slices ------------------------------------------------------------------------------


def test_a_prefix_is_a_view_and_an_index_is_not() -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    prefix = Slice(((0, 2),))(tensor)
    assert prefix.data_ptr() == tensor.data_ptr()
    assert prefix.tolist() == [[0, 1, 2], [3, 4, 5]]
    index = Slice(((1, torch.tensor([2, 0])), (0, 1)))(tensor)
    assert index.tolist() == [[2, 0]]


def test_the_slice_of_an_outer_factor_is_a_prefix() -> None:
    heads, width = Atom(4), Atom(3)
    found = slice_of([product([heads, width]), Atom(5)], {heads: 2}, torch.device("cpu"))
    assert found.steps == ((0, 6),)


def test_the_slice_of_an_inner_factor_is_an_index() -> None:
    heads, width = Atom(2), Atom(3)
    found = slice_of([product([heads, width])], {width: 2}, torch.device("cpu"))
    ((dim, index),) = found.steps
    assert dim == 0
    assert isinstance(index, Tensor)
    assert index.tolist() == [0, 1, 3, 4]


def test_the_slice_of_a_later_part_skips_nothing_before_it() -> None:
    a, b = Atom(3), Atom(4)
    both = concatenation([a, b])
    assert slice_of([both], {b: 1}, torch.device("cpu")).steps == ((0, 4),)
    ((_, index),) = slice_of([both], {a: 1}, torch.device("cpu")).steps
    assert isinstance(index, Tensor)
    assert index.tolist() == [0, 3, 4, 5, 6]


def test_full_sizes_need_no_slice() -> None:
    a = Atom(3)
    assert slice_of([a, Atom(2)], {a: 3}, torch.device("cpu")).steps == ()
    assert slice_of([a], {}, torch.device("cpu")).steps == ()


# --- plans -------------------------------------------------------------------------------


def test_an_empty_patch_is_the_full_network() -> None:
    model = mlp()
    plan = Plan(analyse(model, inputs()), Patch())
    before = state_of(model)
    assert plan.is_full
    with plan.applied(None):
        assert_untouched(model, before)


def test_a_plan_slices_every_member_of_a_group() -> None:
    model = mlp()
    graph = analyse(model, inputs())
    (group,) = graph.groups
    plan = Plan(graph, Patch(sizes=group.sizes(4)))
    assert not plan.is_full
    with plan.applied(None):
        assert model[0].weight.shape == (4, 5)
        assert model[0].bias.shape == (4,)
        assert model[2].weight.shape == (3, 4)
        assert model[2].bias is dict(model.named_parameters())["2.bias"]
    assert model[0].weight.shape == (16, 5)


def test_slices_share_memory_with_their_owners() -> None:
    model = mlp()
    graph = analyse(model, inputs())
    with Plan(graph, Patch(sizes=graph.groups[0].sizes(4))).applied(None):
        assert (
            model[0].weight.data_ptr() == dict(model.named_parameters())["0.weight"].data_ptr()
        )


def test_transforms_of_a_tensor_follow_its_slice_in_order() -> None:
    model = mlp()
    graph = analyse(model, inputs())
    patch = merge(
        [
            Patch(sizes=graph.groups[0].sizes(4)),
            Patch(tensors={"0.weight": lambda w: w + 1}),
            Patch(tensors={"0.weight": lambda w: w * 2}),
        ]
    )
    plan = Plan(graph, patch)
    expected = (dict(model.named_parameters())["0.weight"][:4] + 1) * 2
    with plan.applied(None):
        assert torch.equal(model[0].weight, expected)
    assert torch.equal(plan.extracted(None)[0].weight, expected)


def test_a_later_patch_wins_and_input_transforms_chain() -> None:
    key = AttributeKey("", ("n",))
    first = Patch(attributes={key: 1}, inputs={"": lambda a, k: ((a[0] + 1,), k)})
    second = Patch(attributes={key: 2}, inputs={"": lambda a, k: ((a[0] * 10,), k)})
    both = merge([first, second])
    assert both.attributes == {key: 2}
    assert both.inputs[""]((1,), {}) == ((20,), {})
    assert both.structural
    assert not Patch(attributes={key: 1}).structural


class Configured(nn.Module):
    """Reads sizes from attributes, a tuple and a shared plain object."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(5, 16)
        self.out = nn.Linear(16, 3)
        self.shape = (4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).view(x.shape[0], *self.shape)
        return self.out(h.reshape(x.shape[0], self.config.width).relu())


def test_integers_in_tuples_and_configs_get_the_size_and_come_back() -> None:
    config = SimpleNamespace(width=16)
    model = Configured(config)
    graph = analyse(model, inputs())
    before = state_of(model)
    plan = Plan(graph, Patch(attributes={AttributeKey("", ("shape",), 0): 2}))
    with plan.applied(None):
        assert model.shape == (2, 4)
        assert type(model.shape) is tuple
    plan = Plan(graph, Patch(attributes={AttributeKey("", ("config", "width")): 8}))
    with plan.applied(None):
        assert config.width == 8
        assert model.config is config
    assert_untouched(model, before)
    assert plan.extracted(None).config.width == 8
    assert config.width == 16


def test_a_module_patch_stands_in_its_place() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.act(x))

    model = Holder()
    plan = Plan(analyse(model, inputs()), Patch(modules={"act": nn.Tanh()}))
    expected = run(model.body, (inputs()[0].tanh(),), {})
    with plan.applied(None):
        assert_same(run(model, inputs(), {}), expected)
    assert_same(run(plan.extracted(None), inputs(), {}), expected)
    assert isinstance(model.act, nn.ReLU)
    assert isinstance(plan.extracted(None).act, nn.Tanh)


def test_a_module_patch_stands_in_its_place_in_a_sequential() -> None:
    model = mlp()
    plan = Plan(analyse(model, inputs()), Patch(modules={"1": nn.Tanh()}))
    with plan.applied(None):
        active = run(model, inputs(), {})
    assert_same(active, run(plan.extracted(None), inputs(), {}))


# --- blocks ------------------------------------------------------------------------------


class Numbered(nn.Module):
    def __init__(self, position: int) -> None:
        super().__init__()
        self.layer_idx = position
        self.zero = 0
        self.child = nn.Identity()
        self.child.number = position


def test_integers_that_number_the_blocks_are_found_at_any_depth() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Numbered(i) for i in range(3))
    stack = Stack("layers", 3, (0, 1, 2), 1)
    found = positional_attributes(dict(model.named_modules()), stack)
    assert {(str(key), block) for key, block in found} == {
        (f"layers.{block}.{name}", block)
        for block in range(3)
        for name in ("layer_idx", "child.number")
    }


def test_blocks_of_two_kinds_are_numbered_in_different_places() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(4))
    for position, layer in enumerate(model.layers):
        layer.add_module("even" if position % 2 == 0 else "odd", Numbered(position))
    model.layers[3].odd.child.number = 7
    found = positional_attributes(
        dict(model.named_modules()), Stack("layers", 4, tuple(range(4)), 1)
    )
    places = ["0.even", "1.odd", "2.even", "3.odd"]
    assert {str(key) for key, _ in found} == {f"layers.{p}.layer_idx" for p in places}


def test_per_layer_lists_are_found_in_plain_objects_of_the_parents() -> None:
    model = nn.Module()
    model.config = SimpleNamespace(kinds=["a", "b", "c"], other=[1, 2], name="xyz")
    model.body = nn.Module()
    model.body.layers = nn.ModuleList(nn.Identity() for _ in range(3))
    found = per_layer_lists(dict(model.named_modules()), "body.layers", 3)
    assert [(name, items) for _, name, items in found] == [("kinds", ["a", "b", "c"])]


def test_left_out_blocks_renumber_the_others_and_shorten_their_lists() -> None:
    model, args, kwargs = ZOO["llama"]()
    graph = analyse(model, args, kwargs)
    model.config.kinds = ["x", "y", "z"]
    before = state_of(model)
    plan = Plan(graph, Patch(dropped=frozenset({"model.layers.1"})))
    layers = model.model.layers
    with plan.applied(None):
        assert len(model.model.layers) == 2
        assert model.model.layers[1] is layers[2]
        assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1]
        assert model.config.kinds == ["x", "z"]
    assert_untouched(model, before)
    small = plan.extracted(None)
    assert [b.self_attn.layer_idx for b in small.model.layers] == [0, 1]
    assert small.config.kinds == ["x", "z"]
    assert model.config.kinds == ["x", "y", "z"]


def test_two_stacks_of_one_container_are_both_shortened() -> None:
    """A block in the middle that changes the width cuts the run in two."""

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(width, 11), nn.Linear(11, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    model = nn.Module()
    model.blocks = nn.ModuleList(
        [Residual(5), Residual(5), nn.Linear(5, 7), Residual(7), Residual(7)]
    )

    def forward(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return x

    model.forward = forward
    graph = analyse(shake(model), inputs())
    assert [stack.blocks for stack in graph.stacks] == [(0, 1), (3, 4)]
    plan = Plan(graph, Patch(dropped=frozenset({"blocks.0", "blocks.4"})))
    with plan.applied(None):
        assert len(model.blocks) == 3
        active = run(model, inputs(), {})
    reference = inputs()[0]
    with torch.no_grad():
        for position in (1, 2, 3):
            reference = model.blocks[position](reference)
    assert_same(active, [reference])


def test_sizes_of_a_group_keep_their_proportion() -> None:
    model, args, kwargs = ZOO["bert"]()
    graph = analyse(model, args, kwargs)
    for group in graph.groups:
        half = group.sizes(max(group.unit, group.full // 2 // group.unit * group.unit))
        shares = {size / atom.size for atom, size in half.items()}
        assert len(shares) == 1
        assert np.isclose(next(iter(shares)) * group.full % group.unit, 0)


# --- speed -------------------------------------------------------------------------------


def test_a_slice_in_two_dimensions_is_one_view_with_one_gradient() -> None:
    owner = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    value = Slice(((0, 2), (1, 2)))(owner)
    assert value.grad_fn is not None
    assert (
        value.grad_fn.next_functions[0][0] is torch.autograd.graph.get_gradient_edge(owner).node
    )
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert owner.grad is not None
    assert owner.grad.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_slices_are_differentiable_twice() -> None:
    owner = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    cut = Slice(((0, 2), (1, 2)))
    assert torch.autograd.gradcheck(lambda t: cut(t) ** 3, owner)
    assert torch.autograd.gradgradcheck(lambda t: cut(t) ** 3, owner)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_slice_keeps_the_order_of_memory(memory_format: torch.memory_format) -> None:
    tensor = torch.rand(4, 6, 3, 3).to(memory_format=memory_format)
    view = Slice(((0, 2), (1, 4)))(tensor)
    assert view.stride() == tensor[:2, :4].stride()
    assert torch.equal(view, tensor[:2, :4])


def test_a_slice_of_part_of_a_storage_starts_where_the_tensor_does() -> None:
    tensor = torch.arange(24.0)[12:].reshape(4, 3)
    assert torch.equal(Slice(((0, 2), (1, 2)))(tensor), tensor[:2, :2])


def test_positions_that_share_memory_have_gradients_of_their_own() -> None:
    owner = torch.arange(3.0).expand(4, 3).requires_grad_()
    value = Slice(((0, 2), (1, 2)))(owner)
    assert value.tolist() == [[0, 1], [0, 1]]
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert owner.grad is not None
    assert owner.grad.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_tensors_of_left_out_blocks_are_not_sliced() -> None:
    model, args, kwargs = ZOO["llama"]()
    graph = analyse(model, args, kwargs)
    widths = [group for group in graph.groups if group.kind == "width"]
    patch = merge(
        [
            *(Patch(sizes=group.sizes(group.unit)) for group in widths),
            Patch(dropped=frozenset({"model.layers.1"})),
        ]
    )
    layers = [model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1)]
    with Plan(graph, patch).applied(None):
        assert "weight" in vars(layers[0])
        assert "weight" not in vars(layers[1])


def test_plans_of_one_layout_are_those_of_their_own() -> None:
    model, args, kwargs = ZOO["llama"]()
    graph = analyse(model, args, kwargs)
    layout = Layout(graph)
    for group in graph.groups:
        patch = Patch(sizes=group.sizes(group.unit))
        for own in (Plan(graph, patch), Plan(graph, patch, layout), Plan(graph, patch, layout)):
            for name, tensor in model.named_parameters():
                expected = slice_of(graph.tensors[name], patch.sizes, tensor.device)(tensor)
                assert torch.equal(own.sliced(name, tensor), expected), name
