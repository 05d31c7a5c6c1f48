"""Truths about rounding that can be trained through."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import supple
from supple.errors import SettingError, UnsupportedModelError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.fake_quantize import FakeQuantize, FakeQuantized
from supple.observers import RANGES
from supple.rebuild import replace
from supple.testing.toys import generator

INT3 = QuantSpec("int3", "tensor")  # -4 to 3


def gradient(layer: FakeQuantize, x: Tensor) -> list[float]:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    return found.flatten().tolist()


@pytest.mark.parametrize("observer", ["minmax", "rms", "twice_mean", "gaussian"])
def test_what_comes_out_is_what_codes_stand_for(observer: str) -> None:
    x = torch.randn(5, 14, generator=generator())
    for spec in (
        QuantSpec("int3", "group", 4, scale_format="fp16"),
        QuantSpec("uint4", "channel", symmetric=False),
        QuantSpec("midrise2"),
        QuantSpec("e2m1", "tensor"),
    ):
        expected = fake_quantize(x, spec, observer=RANGES[observer])
        for estimator in ("ste", "clipped", "trust", "noise"):
            layer = FakeQuantize(spec, observer=observer, estimator=estimator).eval()
            torch.testing.assert_close(layer(x), expected)
            assert torch.equal(layer.quantized(x).dequantize(), expected)


def test_gradients_pass_where_the_estimator_says() -> None:
    x = torch.tensor([[-9.0, -3.2, 0.4, 2.6, 3.4, 3.9, 8.0]])
    held = {"observer": "ema", "scales": (1, 1)}
    ends = torch.tensor([[-4.5, 3.5]])  # a scale of 1
    for estimator, passes in (
        ("ste", [1, 1, 1, 1, 1, 1, 1]),
        ("clipped", [0, 1, 1, 1, 1, 0, 0]),
        ("trust", [0, 1, 1, 1, 1, 0, 0]),
    ):
        layer = FakeQuantize(INT3, estimator=estimator, **held).begin(ends).eval()
        assert gradient(layer, x) == passes
    wide = torch.tensor([[-9.0, -3.2, 0.4, 2.8, 3.2, 3.4, 8.0]])
    near = FakeQuantize(INT3, estimator="trust", trust=0.3, **held).begin(ends).eval()
    assert gradient(near, wide) == [0, 1, 0, 1, 1, 0, 0]


def test_learned_scales_have_the_gradient_of_lsq() -> None:
    layer = FakeQuantize(INT3, observer="learned", estimator="lsq")
    x = torch.tensor([[-9.0, -2.4, 0.8, 3.0, 9.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]])
    with torch.no_grad():
        layer.scale.fill_(2.0)
    assert layer(x).tolist() == [[-8.0, -2.0, 0.0, 4.0, 6.0]]
    of_x, of_scale = torch.autograd.grad((layer(x) * weights).sum(), [x, layer.scale])
    assert of_x.tolist() == [[0.0, 10.0, 100.0, 1000.0, 0.0]]
    # Outside: -4 and 3; inside: what rounding adds, in steps.
    sums = -4 + 10 * 0.2 + 100 * -0.4 + 1000 * 0.5 + 10000 * 3
    assert of_scale.item() == pytest.approx(sums / math.sqrt(5 * 3))


def test_learned_bounds_have_the_gradient_of_clipping() -> None:
    layer = FakeQuantize(
        QuantSpec("uint2", "tensor", symmetric=False), observer="learned", estimator="pact"
    )
    layer.begin(torch.tensor([0.0, 6.0]))
    x = torch.tensor([[-1.0, 0.9, 4.8, 7.0, 9.0]], requires_grad=True)
    assert layer(x).tolist() == [[0.0, 0.0, 4.0, 6.0, 6.0]]
    weights = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]])
    of_x, of_bound = torch.autograd.grad((layer(x) * weights).sum(), [x, layer.bound])
    assert of_x.tolist() == [[0.0, 10.0, 100.0, 0.0, 0.0]]
    assert of_bound.tolist() == [11000.0]


def test_learned_scales_begin_at_the_least_error_and_are_held_as_the_spec_says() -> None:
    spec = QuantSpec("int3", scale_format="e8m0-up")
    layer = FakeQuantize(spec, observer="learned", estimator="lsq", scales=(2, 1))
    x = torch.tensor([[1.0, -1.0, 4.0], [0.5, 0.5, 0.5]])
    layer.begin(x)  # 1 rounds all but 4 without error, 0.25 all of the others
    torch.testing.assert_close(layer.scales(x)[0], torch.tensor([[1.0], [0.25]]))
    x = torch.cat((torch.tensor([-3.0, 3.0, 2.0]), torch.ones(999)))
    fine = FakeQuantize(INT3, observer="learned", estimator="lsq").begin(x)
    assert fine.scale.item() == pytest.approx(1.0, abs=0.01)
    assert fine.begin(10 * x).scale.item() == pytest.approx(10.0, abs=0.1)
    with torch.no_grad():
        fine.scale.fill_(-3.0)
    assert fine.scales(x)[0].item() == pytest.approx(1e-5)


def test_noise_is_within_half_a_step_and_follows_its_seed() -> None:
    x = torch.randn(7, 11, generator=generator())
    layer = FakeQuantize(QuantSpec("int4"), estimator="noise")
    step = layer.scales(x)[0]
    first, again = layer(x), layer(x)
    layer.seed = 1
    other = layer(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    moved = (first - x) / step
    assert 0.4 < float(moved.abs().max()) <= 0.5
    assert gradient(layer, x) == [1.0] * 77


def test_running_averages_move_in_training_only() -> None:
    spec = QuantSpec("uint8", "tensor", symmetric=False)
    layer = FakeQuantize(spec, observer="ema", decay=0.75).begin(torch.tensor([0.0, 1.0]))
    layer(torch.tensor([[-1.0, 5.0]]))
    assert (layer.least.item(), layer.most.item()) == (-0.25, 2.0)
    layer.eval()(torch.tensor([[-9.0, 9.0]]))
    assert layer.scales(torch.zeros(1))[0].item() == pytest.approx(2.25 / 255)


def test_shifts_are_learned_and_a_rotation_is_not_undone() -> None:
    class Swap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    layer = FakeQuantize(QuantSpec("int3", "token"), shift=3, rotation=Swap())
    with torch.no_grad():
        layer.before.copy_(torch.tensor([1.0, 0.0, 0.0]))
        layer.after.copy_(torch.tensor([0.0, 0.0, 10.0]))
    x = torch.tensor([[2.5, 1.2, 0.9]])
    assert layer(x).tolist() == [[1.0, 1.0, 13.0]]
    (of_after,) = torch.autograd.grad(layer(x).sum(), layer.after)
    assert of_after.tolist() == [1.0, 1.0, 1.0]


LAYERS = [
    (lambda: nn.Linear(5, 3), (7, 5)),
    (lambda: Conv1D(3, 5), (7, 5)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 5)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layers_compute_with_the_rounded_weight(make, shape) -> None:  # type: ignore[no-untyped-def]
    layer, x = make(), torch.randn(shape, generator=generator())
    spec = QuantSpec("int3", "channel")
    found = FakeQuantized(layer, FakeQuantize(spec), FakeQuantize(QuantSpec("int8", "tensor")))
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        transposed = isinstance(layer, Conv1D)
        weight = fake_quantize(layer.weight.T if transposed else layer.weight, spec)
        plain.weight.copy_(weight.T if transposed else weight)
    expected = plain(fake_quantize(x, QuantSpec("int8", "tensor")))
    torch.testing.assert_close(found(x), expected)
    found(x).sum().backward()
    assert layer.weight.grad is not None


def test_embeddings_have_rounded_vectors() -> None:
    table = nn.Embedding(7, 4)
    layer = FakeQuantized(table, FakeQuantize(QuantSpec("int3", "token")))
    ids = torch.tensor([[3, 6]])
    expected = fake_quantize(table.weight, QuantSpec("int3", "token"))[ids]
    torch.testing.assert_close(layer(ids), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_that_is_taken_in_does_what_it_did(bias: bool) -> None:
    norm = nn.BatchNorm2d(5)
    layer = nn.Conv2d(3, 5, 3, bias=bias)
    with torch.no_grad():
        for one in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            one.uniform_(0.5, 1.5, generator=generator(1))
    x = torch.randn(4, 3, 6, 6, generator=generator())
    apart = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))
    found = FakeQuantized(layer, norm=norm)
    for _ in range(2):
        expected, got = apart(x), found(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    for one, other in zip(apart.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)
    for name, one in apart[1].named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), one)
    torch.testing.assert_close(found.eval()(x), apart.eval()(x), rtol=1e-4, atol=1e-5)
    found.train().frozen = True
    mean = norm.running_mean.clone()
    torch.testing.assert_close(found(x), apart(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(norm.running_mean, mean)
    torch.testing.assert_close(
        nn.functional.conv2d(x, found.rounded(), found.folded_bias()), apart(x)
    )


def test_files_and_programs_hold_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    spec = QuantSpec("int4", "group", 4, scale_format="fp16")
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(9, 5))
    scales = spec.scale_shape((5, 9))
    of_input = FakeQuantize(
        QuantSpec("uint8", "tensor", symmetric=False), observer="ema", shift=9
    )
    layers = {
        "0": FakeQuantized(model[0], FakeQuantize(QuantSpec("midrise3")), norm=model[1]),
        "1": nn.Identity(),
        "3": FakeQuantized(
            model[3],
            FakeQuantize(spec, observer="learned", estimator="lsq", scales=scales),
            of_input,
        ),
    }
    layers["3"].of_weight.begin(model[3].weight)
    of_input.begin(torch.tensor([-2.0, 2.0]))
    structure = copy.deepcopy(model)
    changed = replace(model, layers).eval()
    x = torch.randn(3, 2, 3, 3, generator=generator())
    supple.save(changed, tmp_path / "net")
    loaded = supple.load(tmp_path / "net", model=structure)
    assert torch.equal(loaded(x), changed(x))
    program = torch.export.export(changed, (x,)).module()
    torch.testing.assert_close(program(x), changed(x))


def test_what_can_not_be_used_says_so() -> None:
    for settings, match in (
        ({"estimator": "lsqq"}, "estimator must be one of .* did you mean 'lsq'"),
        ({"observer": "mimax"}, "no observer 'mimax', did you mean 'minmax'"),
        ({"observer": "learned"}, "observer='learned' goes with estimator lsq or pact"),
        ({"estimator": "pact"}, "observer='learned' goes with"),
        ({"decay": 1.0}, "decay must be in"),
        ({"trust": 0.0}, "trust must be above 0"),
        ({"shift": -1}, "shift at least 0"),
        ({"spec": QuantSpec("nf4"), "observer": "learned", "estimator": "lsq"}, "whole num"),
    ):
        with pytest.raises(SettingError, match=match):
            FakeQuantize(**{"spec": INT3, **settings})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="a transposed convolution"):
        FakeQuantized(nn.ConvTranspose2d(2, 3, 1))
