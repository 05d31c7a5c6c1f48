"""The loop in which columns to come make up for the error of those rounded."""

from __future__ import annotations

import pytest
import torch

from supple.errors import SettingError
from supple.formats import QuantSpec, quantize
from supple.quantize._solvers import gptq, inverse_factor, output_error, sweep
from supple.testing.toys import generator


def problem(rows: int = 7, columns: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the products of inputs that depend on one another."""
    source = generator()
    mixed = torch.randn(3 * columns, columns, generator=source)
    mixed = mixed @ torch.randn(columns, columns, generator=source)
    return torch.randn(rows, columns, generator=source), mixed.T @ mixed


def one_by_one(matrix, hessian, spec, damp=0.01):  # type: ignore[no-untyped-def]
    """The slow way: after each column, the best change of all columns left."""
    new, size = matrix.double().clone(), spec.group_size
    hessian = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(
        len(hessian)
    )
    within = QuantSpec(spec.format, symmetric=spec.symmetric, scale_format=spec.scale_format)
    for column in range(matrix.shape[1]):
        if column % size == 0:
            scale, zero = within.scales(new[:, column : column + size].float())
        rounded = spec.rounded(new[:, column : column + 1].float(), scale, zero).double()
        error = new[:, column] - rounded[:, 0]
        left = slice(column, None)
        inverse = torch.linalg.inv(hessian[left, left])
        new[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        new[:, column] = rounded[:, 0]
    return new.float()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int3", "group", 3, scale_format="fp16"),
        QuantSpec("uint2", "group", 6, symmetric=False),
        QuantSpec("e2m1", "group", 4, scale_format="e8m0"),
    ],
)
@pytest.mark.parametrize("block", [1, 5, 128])
def test_gptq_equals_solving_anew_after_each_column(spec: QuantSpec, block: int) -> None:
    matrix, hessian = problem()
    found = gptq(matrix, hessian, spec, block=block).dequantize()
    torch.testing.assert_close(found, one_by_one(matrix, hessian, spec), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4"),
        QuantSpec("int4", "tensor"),
        QuantSpec("nf4", "group", 5),
        QuantSpec("e2m1", "group", 4, scale_format="e4m3"),
        QuantSpec("uint3", "group", 4, symmetric=False, scale_format="int8"),
    ],
)
def test_outputs_change_less_than_by_rounding_to_the_nearest(spec: QuantSpec) -> None:
    matrix, hessian = problem()
    nearest = quantize(matrix, spec)
    for order in ("none", "activation"):
        found = gptq(matrix, hessian, spec, order=order)
        assert found.codes.dtype == nearest.codes.dtype
        assert found.scale.shape == nearest.scale.shape
        errors = [output_error(one.dequantize() - matrix, hessian) for one in (found, nearest)]
        assert errors[0] < 0.85 * errors[1]


def test_columns_in_another_order_keep_their_groups_and_scales() -> None:
    matrix, hessian = problem()
    spec = QuantSpec("int3", "group", 4)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    found = gptq(matrix, hessian, spec, order="activation")
    assert torch.equal(found.scale, spec.scales(matrix)[0])
    given = gptq(matrix, hessian, spec, order=order)
    assert torch.equal(given.codes, found.codes)
    scale = spec.spread(found.scale, matrix.shape)[:, order]
    expected = sweep(
        matrix[:, order],
        hessian[order][:, order],
        lambda x, places: spec.rounded(x, scale[:, places]),
    )
    torch.testing.assert_close(found.dequantize()[:, order], expected)
    known = gptq(matrix, hessian, spec, scale=2 * found.scale)
    assert torch.equal(known.scale, 2 * found.scale)


def test_groups_of_a_convolution_have_their_own_inputs() -> None:
    matrix, one = problem(rows=6)
    hessians = torch.stack([one, one.flip(0, 1), torch.zeros_like(one)])
    spec = QuantSpec("int3", "group", 5)
    found = gptq(matrix, hessians, spec, block=4)
    for place, hessian in enumerate(hessians):
        rows = slice(2 * place, 2 * place + 2)
        alone = gptq(matrix[rows], hessian, spec).dequantize()
        torch.testing.assert_close(found.dequantize()[rows], alone)
    # Inputs that are always zero leave nothing to make up for.
    assert torch.equal(found.dequantize()[4:], quantize(matrix[4:], spec).dequantize())


def test_columns_rounded_at_once_are_made_up_for_by_those_behind() -> None:
    matrix, hessian = problem(columns=11)
    seen = []

    def rounded(columns, places):  # type: ignore[no-untyped-def]
        seen.append(places.tolist())
        return columns.round() if places[0] < 4 else columns

    found = sweep(matrix, hessian, rounded, width=4, damp=0.0, block=5)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.equal(found[:, :4], matrix[:, :4].round())
    # What is left is what solves the normal equations for the others.
    change = (matrix - found)[:, :4].double() @ hessian.double()[:4, 4:]
    best = matrix[:, 4:] + torch.linalg.solve(hessian.double()[4:, 4:], change, left=False)
    torch.testing.assert_close(found[:, 4:], best.float(), rtol=1e-3, atol=1e-3)


def test_groups_begin_with_what_columns_before_them_changed() -> None:
    matrix, hessian = problem()
    for block in (2, 5, 128):
        begun = {}
        new = sweep(
            matrix,
            hessian,
            lambda x, _: x.round(),
            group=4,
            begin=lambda x, first: begun.update({first: x.clone()}),  # noqa: B023
            block=block,
        )
        assert list(begun) == [0, 4, 8, 12]
        upper = inverse_factor(hessian).float()
        errors = torch.linalg.solve_triangular(upper, matrix - new, upper=True, left=False)
        expected = matrix[:, 8:12] - errors[:, :8] @ upper[:8, 8:12]
        torch.testing.assert_close(begun[8], expected, rtol=1e-3, atol=1e-3)


def test_bad_input_says_so() -> None:
    matrix, hessian = problem()
    spec = QuantSpec("int4")
    for arguments, match in (
        ((matrix, hessian[:5, :5], spec), r"has shape \(13, 13\)"),
        ((matrix, hessian.expand(2, 13, 13), spec), "groups of such first"),
        ((matrix[0], hessian, spec), "is needed, got"),
        ((matrix, hessian * torch.nan, spec), "finite and, damped, positive definite"),
        ((matrix, -hessian + 99 * torch.ones(13, 13), spec), "positive definite"),
    ):
        with pytest.raises(SettingError, match=match):
            gptq(*arguments)
    for settings, match in (
        ({"damp": -1.0}, "damp must be at least 0"),
        ({"block": 0}, "block must be at least 1"),
        ({"order": "random"}, "order must be none, activation or"),
        ({"order": torch.zeros(13)}, "each number from 0 to 12 once"),
    ):
        with pytest.raises(SettingError, match=match):
            gptq(matrix, hessian, spec, **settings)
    with pytest.raises(SettingError, match="multiple of width"):
        sweep(matrix, hessian, lambda x, _: x, width=3, group=4)
