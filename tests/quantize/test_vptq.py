"""VPTQ: vectors from codebooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import statistics
from supple.errors import SettingError
from supple.layers.vector_linear import VectorCodes, VectorLinear, VectorPart
from supple.quantize._solvers import inverse_factor, output_error
from supple.quantize._vectors import as_vectors, codebook, refitted
from supple.quantize.base import bits_per_weight
from supple.quantize.vptq import VPTQ
from supple.storage import load, save
from supple.testing.toys import generator
from supple.transforms import Given

PLAIN = {"iterations": 5, "refit": False}


def layer_and_batches(
    inputs: int = 13, outputs: int = 11
) -> tuple[nn.Linear, list[tuple[Tensor]]]:
    """A layer, and inputs of which some are alike and some far larger than others."""
    source = generator()
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=source))
    mixed = torch.randn(inputs, inputs, generator=source) + 2 * torch.eye(inputs)
    scales = torch.logspace(0, 1, inputs)
    return layer, [(torch.randn(64, inputs, generator=source) @ mixed * scales,)]


def gram_of(layer: nn.Module, batches: list[tuple[Tensor]]) -> Tensor:
    return statistics(layer, batches, ("gram",))["weight"].gram


def test_columns_take_the_nearest_entries_and_those_to_come_make_up_for_the_error() -> None:
    layer, batches = layer_and_batches()
    hessian = gram_of(layer, batches)
    found = VPTQ(bits=2, vector=3, **PLAIN).quantized(
        nn.Sequential(layer), Given(tuple(batches))
    )["0.weight"]
    layer, _ = layer_and_batches()
    matrix = layer.weight.detach().clone()
    counts = hessian.diagonal().repeat(4)  # 11 outputs make 4 vectors in each column
    book = codebook(as_vectors(matrix, 3).flatten(0, 1), counts, 64, 5)
    order = hessian.diagonal().argsort(descending=True)
    upper = inverse_factor(hessian[order][:, order]).float()
    work, wanted = matrix[:, order], torch.zeros_like(matrix)
    for j, column in enumerate(order.tolist()):
        for first in range(0, 11, 3):
            vector = torch.zeros(3)
            own = work[first : first + 3, j]
            vector[: len(own)] = own
            nearest = book[(book - vector).norm(dim=1).argmin()]
            wanted[first : first + 3, column] = nearest[: len(own)]
        error = (work[:, j] - wanted[:, column]) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, None, j:]
    torch.testing.assert_close(found.dequantize(), wanted)


def test_feedback_a_second_codebook_and_fitting_each_lose_less() -> None:
    layer, batches = layer_and_batches(40, 24)
    hessian, before = gram_of(layer, batches), layer.weight.detach()

    def lost(**settings: object) -> float:
        changed = VPTQ(vector=2, **settings).apply(layer, calibration=batches)
        return float(output_error(changed.weight.detach() - before, hessian))

    book = codebook(as_vectors(before, 2).flatten(0, 1), hessian.diagonal().repeat(12), 16, 25)
    codes = torch.cdist(as_vectors(before, 2), book).argmin(-1)
    part = VectorPart(torch.arange(40), (codes,), (book,))
    nearest = VectorCodes((part,), before.shape).dequantize()
    with_feedback = lost(refit=False)
    assert with_feedback < float(output_error(nearest - before, hessian))
    assert lost() < with_feedback
    assert lost(bits=4, residual=4) < 0.5 * lost()
    assert lost(outliers=0.1) < lost()


def test_fitted_codebooks_are_the_least_squares_solution() -> None:
    layer, batches = layer_and_batches(7, 6)
    hessian, matrix = gram_of(layer, batches), layer.weight.detach()
    source = generator()
    parts = tuple(
        VectorPart(
            torch.tensor(columns),
            tuple(
                torch.randint(2, (6 // length, len(columns)), generator=source) for _ in "ab"
            ),
            tuple(torch.randn(2, length, generator=source) for _ in "ab"),
        )
        for columns, length in (([0, 2, 4, 5], 3), ([1, 3, 6], 2))
    )
    codes = VectorCodes(parts, matrix.shape)
    found = refitted(codes, matrix, hessian).dequantize()
    root = torch.linalg.cholesky(
        hessian.double() + 1e-6 * hessian.diagonal().mean() * torch.eye(7)
    )
    basis = []
    for number, part in enumerate(parts):
        for stage, book in enumerate(part.books):
            for place in range(book.numel()):
                books = [[torch.zeros_like(one) for one in each.books] for each in parts]
                books[number][stage].view(-1)[place] = 1.0
                one = VectorCodes(
                    tuple(
                        VectorPart(each.columns, each.codes, tuple(own))
                        for each, own in zip(parts, books, strict=True)
                    ),
                    matrix.shape,
                )
                basis.append(one.dequantize(torch.float64))
    design = torch.stack([(one @ root).flatten() for one in basis], 1)
    wanted = torch.linalg.lstsq(design, (matrix.double() @ root).flatten(), driver="gelsd")
    best = sum(c * one for c, one in zip(wanted.solution, basis, strict=True))
    lost = [output_error(one - matrix, hessian) for one in (found, best)]
    assert lost[0] <= 1.001 * lost[1]


def test_bits_are_those_of_the_file(tmp_path) -> None:
    layer, batches = layer_and_batches(40, 23)
    method = VPTQ(bits=3, vector=2, residual=2, outliers=0.1, iterations=3)
    small = method.apply(layer, calibration=batches)
    assert isinstance(small, VectorLinear)
    # 36 columns of 12 vectors, 4 of 23 numbers; books of 16 and 4 entries; a bit a column.
    codes = (36 * 12 + 4 * 23) * (4 + 2)
    books = 16 * (16 + 4) * (2 + 1)
    found = method.quantized(nn.Sequential(layer), Given(tuple(batches)))
    assert found["0.weight"].total_bits == codes + books + 40
    assert bits_per_weight(found) == pytest.approx((codes + books + 40) / (40 * 23))
    assert small.nbytes == (codes + books + 40) // 8 + layer.bias.nbytes
    assert torch.equal(small.weight, found["0.weight"].dequantize())
    save(small, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", model=layer).weight, small.weight)


def test_inputs_that_are_zero_and_weights_that_are_alike_are_no_trouble() -> None:
    layer, _ = layer_and_batches()
    zeros = [(torch.zeros(5, 13),)]
    assert VPTQ(vector=2).apply(layer, calibration=zeros).weight.isfinite().all()
    layer.weight.data.fill_(0.25)
    layer.weight.data[:, 3] = 0.0
    changed = VPTQ(vector=4).apply(layer, calibration=zeros)
    torch.testing.assert_close(changed.weight, layer.weight)
    assert changed.parts[0][2] == (3,)  # 0, 0.25, and what the outputs leave of the last vector


def test_convolutions_of_several_groups_and_transposed_linear_layers_are_rounded() -> None:
    source = generator()
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), Conv1D(5, 24)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=source)
    x = torch.randn(16, 4, 4, 4, generator=source).bfloat16()
    small = VPTQ(vector=2, iterations=5).apply(model, calibration=[(x,)])
    assert type(small[0]) is nn.Conv2d
    assert isinstance(small[2], VectorLinear)
    assert small[2].weight.dtype == torch.bfloat16
    for place, before in ((0, model[0].weight), (2, model[2].weight.T)):
        change = (small[place].weight - before).float()
        assert 0 < change.norm() < 0.6 * before.float().norm()
    assert (small(x) - model(x)).float().norm() < 0.6 * model(x).float().norm()


def test_gradients_reach_the_codebooks() -> None:
    layer, batches = layer_and_batches()
    small = VPTQ(vector=2, outliers=0.2).apply(layer, calibration=batches).float()
    total = small(batches[0][0]).square().sum()
    for gradient in torch.autograd.grad(total, list(small.parameters())):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"vector": 10}, "bits \\* vector - residual = 2 \\* 10 - 0 = 20"),
        ({"residual": 8}, "an index has 1 to 16 bits"),
        ({"outliers": 1.0}, r"outliers must be in \[0, 1\), got 1.0"),
        ({"iterations": 0}, "must be at least 1, got 4 and 0"),
        ({"group_size": 64}, "vectors have neither scales nor groups"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        VPTQ(**settings)


def test_layers_of_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match="must have 8 columns together, got \\[3, 4\\]"):
        VectorLinear(8, 6, [(3, 2, [4]), (4, 2, [4])])
    with pytest.raises(SettingError, match="codebooks of 1 to 65536 entries, got 8, 2 and"):
        VectorLinear(8, 6, [(8, 2, [0])])
    codes = VectorLinear(8, 6, [(8, 2, [4])]).codes()
    with pytest.raises(SettingError, match=r"shape \(6, 9\), got one of shape \(6, 8\)"):
        VectorLinear.from_codes(nn.Linear(9, 6), codes)
