"""Truths about layers that hold packed codes."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import supple
from supple.deploy.export import export
from supple.errors import SettingError, UnsupportedModelError
from supple.formats import Quantized, QuantSpec, fake_quantize, quantize
from supple.layers import packed as packed_layers
from supple.layers.packed import (
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    pack_codes,
    unpack_codes,
)
from supple.rebuild import replace
from supple.testing.toys import generator
from supple.weights import as_matrix

SPECS = [
    QuantSpec("int4", "group", 32, scale_format="fp16"),
    QuantSpec("uint3", "group", 5, symmetric=False, scale_format="bf16"),
    QuantSpec("int8"),
    QuantSpec("uint2", symmetric=False, scale_format="int8", zero_format="fp16"),
    QuantSpec("uint5", "tensor", symmetric=False),
    QuantSpec("int6-narrow", scale_format="int4"),
    QuantSpec("int12"),
    QuantSpec("e2m1", "group", 32, scale_format="e8m0"),
    QuantSpec("e2m1", "group", 16, scale_format="e4m3"),
    QuantSpec("e3m2"),
    QuantSpec("e4m3", "tensor"),
    QuantSpec("nf4", "group", 64),
    QuantSpec("power4^0.5"),
    QuantSpec("e2m1", "group", 16, scale_format="shift4"),
    QuantSpec("e2m1", "group", 32, scale_format="e8m0-wide"),
]
WHOLE = [  # products of whole numbers: weights, inputs
    (QuantSpec("int8"), QuantSpec("int8", "token")),
    (QuantSpec("uint4", symmetric=False), QuantSpec("uint8", "token", symmetric=False)),
    (QuantSpec("uint8", symmetric=False), QuantSpec("int4", "token")),
    (QuantSpec("int3", "tensor"), QuantSpec("uint8", "tensor", symmetric=False)),
]


def names(specs) -> list[str]:
    return [f"{one.format.name}-{one.granularity}-{one.scale_format}" for one in specs]


def packed(spec: QuantSpec, inputs: int = 67, outputs: int = 7, **more) -> PackedLinear:
    linear = nn.Linear(inputs, outputs)
    return PackedLinear.from_quantized(linear, quantize(linear.weight, spec), **more)


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed_codes_come_back(bits: int) -> None:
    for count in (1, 7, 8, 37, 64):
        codes = torch.randint(2**bits, (count,))
        codes[0], codes[-1] = 2**bits - 1, 0
        laid = pack_codes(codes, bits)
        assert laid.dtype == torch.uint8
        assert len(laid) == -(-count * bits // 8)
        assert unpack_codes(laid, bits, count).tolist() == codes.tolist()


def test_bits_lie_in_order_without_gaps() -> None:
    # 5, 3, 7 of 3 bits: 101, 110, 111 with the lowest first, so 10111011 1 read from the right.
    assert pack_codes(torch.tensor([5, 3, 7]), 3).tolist() == [0b11_011_101, 0b1]
    assert pack_codes(torch.tensor([1, 15, 2]), 4).tolist() == [0xF1, 0x02]
    with pytest.raises(SettingError, match="from 1 to 16, got 0"):
        pack_codes(torch.tensor([1]), 0)


def test_rows_of_bytes_are_unpacked_row_by_row() -> None:
    codes = torch.randint(8, (5, 16))
    rows = torch.stack([pack_codes(row, 3) for row in codes])
    assert unpack_codes(rows, 3, 16).tolist() == codes.tolist()


@pytest.mark.parametrize("spec", SPECS, ids=names(SPECS))
def test_a_packed_layer_is_the_fake_quantized_one_and_as_small(spec: QuantSpec, tmp_path):
    linear = nn.Linear(67, 7)
    codes = quantize(linear.weight, spec)
    layer = PackedLinear.from_quantized(linear, codes)
    wanted = fake_quantize(linear.weight, spec)
    torch.testing.assert_close(layer.dense_weight(), wanted, rtol=1e-6, atol=1e-7)
    x = torch.randn(3, 67)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, linear.bias))
    torch.testing.assert_close(layer.merge()(x), layer(x))
    save_file(layer.state_dict(), tmp_path / "layer")
    header = int.from_bytes((tmp_path / "layer").read_bytes()[:8], "little") + 8
    assert (tmp_path / "layer").stat().st_size - header == layer.nbytes
    assert 0 <= layer.nbytes - linear.bias.nbytes - codes.nbytes <= 1  # two paddings to a byte


@pytest.mark.parametrize(("spec", "input"), WHOLE, ids=names(spec for spec, _ in WHOLE))
def test_whole_products_are_those_of_fake_quantized_inputs(spec, input) -> None:
    layer = packed(spec, input=input)
    x = torch.randn(2, 5, 67) + 0.5
    assert layer.engine_for(x) == "integer"
    wanted = nn.functional.linear(fake_quantize(x, input), layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    layer.engine = "plain"
    torch.testing.assert_close(layer(x), wanted)


SHAPES = [(1, 1, 1), (1, 67, 3), (2, 5, 16), (33, 300, 17), (64, 64, 1)]


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("input", ["int8", "uint8", "int4", "uint3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_whole_products_are_exact(shape, input, vnni, monkeypatch) -> None:
    if vnni and not packed_layers._HAS_VNNI:
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(packed_layers, "_HAS_VNNI", vnni)
    tokens, columns, rows = shape
    spec = QuantSpec(input, "token", symmetric=input.startswith("i"))
    weight, seen = (
        torch.randint(0, 2**one.bits, size, dtype=torch.uint8, generator=generator())
        for one, size in ((QuantSpec("int8"), (rows, columns)), (spec, (tokens, columns)))
    )
    weight[0], seen[0] = 0, 0  # the largest sums
    held, given = (
        Quantized(codes, torch.ones(len(codes), 1), None, of, codes.shape)
        for codes, of in ((weight, QuantSpec("int8")), (seen, spec))
    )
    ready, *scaled, _ = packed_layers._ready_integer(held)
    assert ready.is_mkldnn == vnni
    wanted = spec.format.decode(seen).double() @ (weight.double() - 128).T
    torch.testing.assert_close(packed_layers._sums(given, ready, *scaled).double(), wanted)


def test_inputs_may_have_one_range_that_is_held() -> None:
    input = QuantSpec("uint8", "tensor", symmetric=False)
    scale, zero = torch.tensor([[0.01]]), torch.tensor([[100.0]])
    layer = packed(QuantSpec("int8"), input=input, input_range=(scale, zero))
    x = torch.randn(5, 67) * 3
    wanted = fake_quantize(x, input, scale, zero)
    assert wanted.amax() == pytest.approx(1.55)
    wanted = nn.functional.linear(wanted, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert {"input_scale", "input_zero"} <= set(layer.state_dict())


@pytest.mark.parametrize(
    ("spec", "engine"),
    [
        (QuantSpec("int4", "group", 64), "int4"),
        (QuantSpec("uint4", "group", 32, symmetric=False), "int4"),
        (QuantSpec("uint2", symmetric=False), "int4"),
        (QuantSpec("int3"), "int4"),
        (QuantSpec("int8"), "int8"),
        (QuantSpec("int6", "tensor"), "int8"),
        (QuantSpec("uint8", symmetric=False), "plain"),
        (QuantSpec("e2m1"), "plain"),
        (QuantSpec("int4", "group", 16), "plain"),
    ],
)
def test_kernels_serve_bfloat16(spec: QuantSpec, engine: str) -> None:
    layer = packed(spec, 128, 32).bfloat16()
    x = torch.randn(5, 128).bfloat16()
    assert layer.engine_for(x) == engine
    assert layer.engine_for(x.float()) == "plain"
    wanted = x.float() @ layer.dense_weight().T.float() + layer.bias.float()
    torch.testing.assert_close(layer(x).float(), wanted, rtol=2e-2, atol=2e-2)
    layer.engine = "bfloat16"
    assert layer.engine_for(x.float()) == engine
    assert layer(x.float()).dtype == torch.float32


def test_many_tokens_and_gradients_go_the_plain_way() -> None:
    layer = packed(QuantSpec("int4", "group", 64), 128, 32, engine="bfloat16")
    assert layer.engine_for(torch.randn(128, 128)) == "int4"
    assert layer.engine_for(torch.randn(129, 128)) == "plain"
    x = torch.randn(5, 128, requires_grad=True)
    assert layer.engine_for(x) == "plain"
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, layer.dense_weight().sum(0).expand(5, -1))


def test_engines_follow_new_codes() -> None:
    layer, other = (packed(QuantSpec("int8"), input=QuantSpec("int8", "token")) for _ in "ab")
    x = torch.randn(5, 67)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert "_prepared" not in vars(copy.deepcopy(layer))


def test_layers_made_in_inference_mode_keep_what_engines_need() -> None:
    with torch.inference_mode():
        layer = packed(QuantSpec("int8"), input=QuantSpec("int8", "token"))
        x = torch.randn(5, 67)
        wanted = layer(x)
        assert "_prepared" in vars(layer)
        loaded = copy.deepcopy(layer)
        loaded.codes = loaded.codes.clone()
        assert loaded.codes.is_inference()
        assert torch.equal(loaded(x), wanted)
        assert "_prepared" not in vars(loaded)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[2]], ids=names(SPECS[1:3]))
@pytest.mark.parametrize("groups", [1, 2])
def test_a_packed_convolution_is_the_fake_quantized_one(spec: QuantSpec, groups: int) -> None:
    conv = nn.Conv2d(6, 10, 3, stride=(2, 1), padding="valid", dilation=2, groups=groups)
    matrix = as_matrix(conv, conv.weight)
    layer = PackedConv2d.from_quantized(conv, quantize(matrix, spec))
    x = torch.randn(2, 6, 9, 11)
    fake = copy.deepcopy(conv)
    fake.weight.data = fake_quantize(matrix, spec).view_as(conv.weight)
    torch.testing.assert_close(layer(x), fake(x))
    torch.testing.assert_close(layer.weight, fake.weight.data)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_convolution_rounds_its_inputs(granularity: str) -> None:
    conv = nn.Conv2d(3, 5, 3)
    input = QuantSpec("int4", granularity)
    layer = PackedConv2d.from_quantized(conv, quantize(conv.weight, SPECS[2]), input=input)
    x = torch.randn(2, 3, 7, 7)
    wanted = nn.functional.conv2d(fake_quantize(x, input), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("spec", SPECS, ids=names(SPECS))
@pytest.mark.parametrize("width", [8, 11])
def test_a_packed_table_gives_the_fake_quantized_vectors(spec: QuantSpec, width: int) -> None:
    table = nn.Embedding(13, width, padding_idx=2)
    layer = PackedEmbedding.from_quantized(table, quantize(table.weight, spec))
    asked = torch.tensor([[1, 12, 2], [7, 7, 0]])
    wanted = nn.functional.embedding(asked, fake_quantize(table.weight, spec))
    torch.testing.assert_close(layer(asked), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.weight[asked], wanted, rtol=1e-6, atol=1e-7)


def test_a_transposed_linear_layer_is_replaced_too() -> None:
    layer = Conv1D(3, 5)
    codes = quantize(as_matrix(layer, layer.weight), QuantSpec("int8"))
    x = torch.randn(2, 5)
    torch.testing.assert_close(
        PackedLinear.from_quantized(layer, codes)(x), layer(x), rtol=0, atol=1e-3
    )


def test_packed_networks_come_back_from_a_file_and_are_exported(tmp_path) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(8, 6))
    base = copy.deepcopy(model)
    weights = [layer.weight for layer in model]
    input = QuantSpec("uint8", "tensor", symmetric=False)
    seen = (torch.tensor([[0.02]]), torch.tensor([[90.0]]))
    layers = {
        "0": PackedEmbedding.from_quantized(model[0], quantize(weights[0], SPECS[9])),
        "1": PackedConv2d.from_quantized(
            model[1], quantize(weights[1], SPECS[2]), input=input, input_range=seen
        ),
        "2": PackedLinear.from_quantized(
            model[2], quantize(weights[2], SPECS[1]), input=QuantSpec("int8", "token")
        ),
    }
    model = replace(model, layers)
    x = torch.tensor([[[1, 2, 8, 0]]])
    with torch.no_grad():
        wanted = model[2](model[1](model[0](x)[0]))
    supple.save(model, tmp_path / "model")
    loaded = supple.load(tmp_path / "model", model=base)
    assert torch.equal(loaded[2](loaded[1](loaded[0](x)[0])), wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    program = torch.export.export(model[2], (torch.randn(3, 8),)).module()
    y = torch.randn(3, 8)
    torch.testing.assert_close(program(y), model[2](y))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [SPECS[0], SPECS[1], SPECS[7]], ids=names(SPECS[:2] + SPECS[7:8])
)
def test_packed_layers_are_exported_to_onnx(spec: QuantSpec, tmp_path) -> None:
    export(packed(spec), tmp_path / "layer.onnx", (torch.randn(3, 67),))  # compares outputs


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30])
def test_constant_and_tiny_weights(value: float) -> None:
    linear = nn.Linear(5, 3, bias=False)
    linear.weight.data.fill_(value)
    for spec in SPECS:
        layer = PackedLinear.from_quantized(linear, quantize(linear.weight, spec))
        torch.testing.assert_close(
            layer.dense_weight(), fake_quantize(linear.weight, spec), rtol=1e-6, atol=0
        )


def test_bad_settings_are_told() -> None:
    linear, spec = nn.Linear(6, 4), QuantSpec("int4", "group", 2)
    with pytest.raises(SettingError, match=r"matrix of shape \(4, 6\), got .* \(6, 4\)"):
        PackedLinear.from_quantized(linear, quantize(linear.weight.T, spec))
    with pytest.raises(SettingError, match=r"engine must be one of .*, got 'fast'"):
        packed(spec, engine="fast")
    with pytest.raises(SettingError, match="'tensor', got granularity='channel'"):
        packed(spec, input=QuantSpec("int8"))
    with pytest.raises(SettingError, match="needs input of granularity 'tensor', got 'token'"):
        packed(spec, input=QuantSpec("int8", "token"), input_range=(torch.ones(1), None))
    with pytest.raises(SettingError, match="needs input="):
        packed(spec, input_range=(torch.ones(1), None))
    conv = nn.Conv2d(2, 3, 3, padding=1)
    with pytest.raises(SettingError, match="'channel' or 'tensor', got granularity='token'"):
        PackedConv2d.from_quantized(
            conv, quantize(conv.weight, QuantSpec("int8")), input=QuantSpec("int8", "token")
        )
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(UnsupportedModelError, match="pads by zeros, this one by 'reflect'"):
        PackedConv2d.from_quantized(conv, quantize(conv.weight, QuantSpec("int8")))
    table = nn.Embedding(5, 3, max_norm=1.0)
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        PackedEmbedding.from_quantized(table, quantize(table.weight, QuantSpec("int8")))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int3", "group", 20, scale_format="int8"),
        QuantSpec("uint4", "channel", symmetric=False),
        QuantSpec("e2m1", "tensor"),
    ],
)
def test_rows_that_are_put_together_in_turn_give_the_same(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, x = nn.Linear(50, 29), torch.randn(3, 50)
    layer = PackedLinear.from_quantized(linear, quantize(linear.weight.detach(), spec))
    with torch.inference_mode():
        assert layer.engine_for(x) == "plain"
        whole = layer(x)
        monkeypatch.setattr("supple.layers.packed._AT_ONCE", 8 * 50)
        assert layer.engine_for(x) == "rows"
        torch.testing.assert_close(layer(x), whole)
