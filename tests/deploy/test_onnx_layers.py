"""Packed layers in exported files: operators that hold codes, and the same outputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import supple
from supple.deploy.onnx_layers import input_steps, onnx_layers
from supple.formats import Int, QuantSpec, quantize
from supple.layers.lookup_linear import LookupLinear
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.layers.quantized_input import QuantizedInput
from supple.quantize.base import baseline
from supple.quantize.fireq import FireQ
from supple.quantize.int8_whitepaper import Int8Whitepaper


def operators(path: Path) -> Counter[str]:
    """How often each operator is in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def held(path: Path) -> dict[str, tuple[int, int]]:
    """Type and number of bytes of each tensor of a file that is larger than a scale."""
    tensors = onnx.load(path).graph.initializer
    return {
        one.name: (one.data_type, len(one.raw_data)) for one in tensors if len(one.dims) > 1
    }


def small(inputs: int = 100) -> tuple[nn.Module, Tensor]:
    """Two linear layers and an input."""
    source = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3, generator=source)
    return model, torch.randn(3, inputs, generator=source)


@pytest.mark.parametrize(
    ("name", "settings", "bits", "whole"),
    [
        ("rtn", {"bits": 4, "group_size": 32}, 4, 128),  # 100 inputs are four blocks of 32
        ("rtn", {"bits": 3, "group_size": 48}, 4, 112),  # blocks of 16
        ("rtn", {"bits": 2, "group_size": 16}, 2, 112),
        ("rtn", {"bits": 8}, 8, 128),  # two blocks of 64
        ("rtn-asymmetric", {"bits": 4, "group_size": 16}, 4, 112),
        ("hqq", {"bits": 4, "group_size": 32}, 4, 128),  # zero points between numbers
    ],
)
def test_linear_layers_hold_codes_in_onnx(
    tmp_path: Path, name: str, settings: dict[str, int], bits: int, whole: int
) -> None:
    model, x = small()
    packed = baseline(name, **settings).apply(model)
    path = supple.export(packed, tmp_path / "net.onnx", (x,), dynamic_batch=True)
    assert operators(path)["MatMulNBits"] == 2
    codes = max(size for _, size in held(path).values())
    assert codes == 32 * whole * bits // 8


def test_convolutions_hold_codes_between_qdq_operators(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten()
    ).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    packed = Int8Whitepaper().apply(model, calibration=[(x,)])
    path = supple.export(packed, tmp_path / "net.onnx", (x,))
    assert operators(path)["QuantizeLinear"] == 2
    assert operators(path)["DequantizeLinear"] == 4
    assert {kind for kind, _ in held(path).values()} == {onnx.TensorProto.INT8}


def test_convolutions_round_each_example_by_its_own_scale(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[1] *= 100
    packed = baseline("rtn", bits=8, activations=8).apply(model)
    for ending in (".onnx", ".xml"):
        path = supple.export(packed, tmp_path / f"net{ending}", (x,), tolerance=1e-5)
        assert path.exists()


@pytest.mark.parametrize("bits", [3, 8])
def test_inputs_with_a_fixed_range_stay_in_it(tmp_path: Path, bits: int) -> None:
    model, x = small(20)
    packed = Int8Whitepaper(bits=bits, activations=bits).apply(model, calibration=[(x,)])
    path = supple.export(packed, tmp_path / "net.onnx", (5 * x,), tolerance=1e-5)
    assert ("Clip" in operators(path)) == (bits == 3)


@pytest.mark.parametrize(
    "quantizer",
    [
        baseline("rtn", bits=4, group_size=32),
        baseline("mxfp4"),  # operators of its own forward
        Int8Whitepaper(),
    ],
)
def test_openvino_runs_networks_of_codes(tmp_path: Path, quantizer: supple.Transform) -> None:
    model, x = small(64)
    packed = quantizer.apply(model, calibration=[(x,)])
    folder = tmp_path / "one, two"
    path = supple.export(packed, folder / "net.xml", (x,))
    assert [file.name for file in sorted(folder.iterdir())] == ["net.bin", "net.xml"]
    assert path.read_text().startswith("<?xml")


def test_inputs_of_eight_bits_are_multiplied_as_whole_numbers(tmp_path: Path) -> None:
    model, x = small(64)
    packed = baseline("rtn", bits=4, group_size=32, activations=8).apply(model)
    path = supple.export(packed, tmp_path / "net.onnx", (x,))
    nodes = [one for one in onnx.load(path).graph.node if one.op_type == "MatMulNBits"]
    levels = [a.i for one in nodes for a in one.attribute if a.name == "accuracy_level"]
    assert levels == [4, 4]


def test_the_network_is_as_it_was_afterwards() -> None:
    model, _ = small()
    packed = baseline("rtn", group_size=32).apply(model)
    before = dict(packed.named_modules())

    def fail() -> None:
        with onnx_layers(packed) as (exported, count):
            assert (exported, count) == (packed, 2)
            assert packed.get_submodule("0") is not before["0"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(packed.get_submodule(path) is one for path, one in before.items() if path)


def test_a_layer_by_itself_gives_way_too() -> None:
    layer = nn.Linear(32, 4)
    packed = PackedLinear.from_quantized(layer, quantize(layer.weight, QuantSpec("int4")))
    with onnx_layers(packed) as (exported, count):
        assert exported is not packed
        assert count == 1


def test_layers_without_an_operator_keep_their_own() -> None:
    conv = nn.Conv2d(4, 4, 3)
    grouped = quantize(conv.weight.flatten(1), QuantSpec("int4", "group", 12))
    with onnx_layers(nn.Sequential(PackedConv2d.from_quantized(conv, grouped))) as (_, count):
        assert count == 0


def test_steps_are_those_of_the_coarsest_input() -> None:
    model, x = small()
    assert input_steps(model) == 0
    assert input_steps(Int8Whitepaper(activations=4).apply(model, calibration=[(x,)])) == 15
    assert input_steps(QuantizedInput(model, QuantSpec(Int(3, symmetric=False)))) == 7


def test_codes_that_stand_for_something_else_keep_their_own_operators() -> None:
    method, x = FireQ(activations=None, group_size=16, kv_bits=None), torch.randn(8, 32)
    model = method.apply(nn.Sequential(nn.Linear(32, 16)), calibration=[(x,)])
    assert isinstance(model[0], LookupLinear)
    with onnx_layers(model) as (_, count):
        assert count == 0
