"""Truths about products by packed codes in Triton.

Triton's interpreter, which needs no GPU, has to be chosen before Triton is imported: one test
runs those that need it in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from supple.errors import MissingExtraError, SettingError, SuppleWarning
from supple.formats import QuantSpec, quantize
from supple.layers import triton_linear
from supple.layers.packed import _PRODUCTS, PackedLinear
from tests.guards import ROOT

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="another test runs it")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs Triton")

BITS = [QuantSpec(f"int{bits}") for bits in (2, 3, 4, 6, 8)]
ZEROS = [QuantSpec(f"uint{bits}", symmetric=False) for bits in (1, 2, 3, 4, 8)]
GROUPS = [
    QuantSpec(form, "group", size, form[0] == "i", held, zero)
    for form, size, held, zero in (
        ("int4", 32, "fp16", "code"),
        ("int4", 5, "fp32", "code"),  # groups begin within bytes
        ("uint2", 24, "bf16", "fp16"),
        ("uint3", 7, "int8", "fp32"),
        ("int8", 64, "e8m0", "code"),
        ("int4", 1000, "fp16", "code"),
    )
]
OTHERS = [
    QuantSpec("int4", "tensor"),
    QuantSpec("uint4", "tensor", symmetric=False, zero_format="fp16"),
    QuantSpec("int4", symmetric=False),  # zero points below zero
    QuantSpec("int4-narrow", scale_format="e4m3"),
]
SPECS = BITS + ZEROS + GROUPS + OTHERS
RTOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def names(specs: list[QuantSpec]) -> list[str]:
    return [f"{one.format.name}-{one.granularity}-{one.group_size}" for one in specs]


def packed(spec: QuantSpec, inputs: int = 72, outputs: int = 7, **more) -> PackedLinear:
    linear = nn.Linear(inputs, outputs)
    return PackedLinear.from_quantized(linear, quantize(linear.weight, spec), **more)


def check(layer: PackedLinear, x: torch.Tensor) -> None:
    """The product is that with the dense weight, in float64, up to the rounding of inputs."""
    y = _PRODUCTS["triton"](layer, x)
    wanted = layer._rounded(x).double() @ layer.dense_weight().double().T
    assert y.dtype == x.dtype
    assert y.shape == wanted.shape
    assert (y.double() - wanted).norm() <= RTOL[x.dtype] * wanted.norm()


# ---------------------------------------------------------------------- in the interpreter


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs Triton, not interpreted")
def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "tokens or triton_takes"],
        cwd=ROOT,
        env=dict(os.environ, TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@in_interpreter
@pytest.mark.parametrize("spec", SPECS, ids=names(SPECS))
def test_products_of_few_tokens_and_many_are_those_of_the_dense_weight(spec) -> None:
    layer = packed(spec)
    for tokens in (1, 17):
        check(layer, torch.randn(tokens, 72))


@in_interpreter
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 70])
def test_every_type_of_inputs_and_number_of_tokens_will_do(dtype, tokens: int) -> None:
    many = tokens > triton_linear._FEW
    if dtype == torch.bfloat16 and many:
        pytest.skip("the interpreter multiplies matrices of bfloat16 as if they were whole")
    # More than a step, and than a tile of rows.
    layer = packed(GROUPS[0], 136, 67) if many else packed(GROUPS[0], 1096)
    check(layer, torch.randn(tokens, layer.in_features).to(dtype))


@in_interpreter
def test_quantized_inputs_and_inputs_out_of_order_are_multiplied_tokens_first() -> None:
    layer = packed(GROUPS[0], input=QuantSpec("int8", "token"))
    check(layer, torch.randn(72, 5).T)


# ------------------------------------------------------------------------------ compiled


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles nothing in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_kernels_compile_for_gpus(dtype: str, tokens: int, capability: int) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(zip(("fp32", "fp16", "bf16"), RTOL, strict=True))
    kernel, tiles = triton_linear._plan(tokens, types[dtype])
    for spec in (GROUPS[0], GROUPS[3]):
        fixed = tiles | triton_linear._layout(spec, 9, tiles["STEP"])
        zero = {} if spec.symmetric else {"zero": "*fp16"}
        fixed |= {} if zero else {"zero": None}
        pointers = {"x": f"*{dtype}", "codes": "*u8", "scale": "*fp16", **zero}
        types_of = pointers | {"y": f"*{dtype}"} | dict.fromkeys(fixed, "constexpr")
        signature = {name: types_of.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, fixed)
        target = GPUTarget("cuda", capability, 32)
        made = compile(source, target=target, options=triton_linear._COMPILED)
        assert len(made.asm["cubin"]) > 1000
        # Units for matrices multiply many tokens, except in float32, which they would round.
        assert ("mma" in made.asm["ptx"]) == (tokens > 4 and dtype != "fp32")


# ------------------------------------------------------------------------------- on GPUs


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("spec", SPECS, ids=names(SPECS))
def test_layers_on_a_gpu_multiply_by_codes(spec: QuantSpec) -> None:
    layer = packed(spec, 1096, 67).cuda()
    for dtype in RTOL:
        for tokens in (1, 3, 17, 70):
            x = torch.randn(tokens, 1096, device="cuda").to(dtype)
            assert layer.engine_for(x) == "triton"
            check(layer, x)
            with torch.no_grad():
                y, layer.engine = layer(x), "plain"
                wanted, layer.engine = layer(x), "auto"
            error = (y.double() - wanted.double()).norm() / wanted.double().norm()
            assert error <= 2 * RTOL[dtype]


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_gradients_and_odd_rows_go_the_plain_way() -> None:
    layer = packed(QuantSpec("int4")).cuda()
    x = torch.randn(3, 72, device="cuda", requires_grad=True)
    assert layer.engine_for(x) == "plain"
    assert layer.engine_for(x.detach()) == "triton"
    assert layer.engine_for(x.detach().cpu()) == "plain"
    assert layer.engine_for(x.detach().double()) == "plain"
    assert packed(QuantSpec("int4"), 71).cuda().engine_for(x.detach()[:, :71]) == "plain"
    layer.engine = "plain"
    assert layer.engine_for(x.detach()) == "plain"


# ------------------------------------------------------------------------- without either


@pytest.mark.parametrize(
    ("spec", "columns", "reason"),
    [
        (QuantSpec("int4"), 71, "71 codes of 4 bits begin within bytes"),
        (QuantSpec("int3"), 36, "36 codes of 3 bits begin within bytes"),
        (QuantSpec("int5"), 64, "whole numbers of .* not 'int5'"),
        (QuantSpec("int12"), 64, "not 'int12'"),
        (QuantSpec("e2m1"), 64, "not 'e2m1'"),
    ],
)
def test_what_does_not_suit_is_told(spec: QuantSpec, columns: int, reason: str) -> None:
    layer = packed(spec, columns)
    with pytest.raises(SettingError, match=reason):
        _PRODUCTS["triton"](layer, torch.randn(2, columns))


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(SettingError, match=r"inputs must be .* not torch\.float64"):
        _PRODUCTS["triton"](packed(BITS[2]), torch.randn(2, 72).double())


@pytest.mark.skipif(INSTALLED, reason="Triton is installed")
def test_an_absent_triton_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'supple\[triton\]'"):
        _PRODUCTS["triton"](packed(BITS[2]), torch.randn(2, 72))
    assert not triton_linear.works(torch.device("cuda", 0))


def test_a_triton_that_fails_is_told_and_not_used(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nAnd more")

    monkeypatch.setattr(triton_linear.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_linear, "product", fails)
    monkeypatch.setattr(triton_linear.torch, "ones", lambda *_, device: torch.zeros(1, 16))
    triton_linear.works.cache_clear()
    with pytest.warns(SuppleWarning, match=r"cuda:7 with RuntimeError: Failed .* compiler\.$"):
        assert not triton_linear.works(torch.device("cuda", 7))
    assert not triton_linear.works(torch.device("cuda", 7))  # and says so once
    triton_linear.works.cache_clear()


def test_engines_on_a_cpu_are_as_they_were() -> None:
    x = torch.randn(5, 128)
    layer = packed(QuantSpec("int4", "group", 64), 128, 32)
    assert layer.engine_for(x) == "plain"
    assert layer.engine_for(x.bfloat16()) == "int4"
    assert layer.engine_for(x.to("meta")) == "plain"
    assert not triton_linear.works(x.device)


def test_zero_points_and_scales_are_read_in_the_fewest_bytes() -> None:
    scale, zero = packed(QuantSpec("int4", symmetric=False))._ready("triton")
    assert (scale.dtype, zero.dtype, zero.shape) == (torch.float32, torch.float16, (7, 1))
    layer = packed(GROUPS[0])
    (scale,) = layer._ready("triton")
    assert scale.data_ptr() == layer.scale.data_ptr()
    (scale,) = packed(GROUPS[4])._ready("triton")
    assert (scale.dtype, scale.shape) == (torch.float32, (7, 2))


def test_the_codes_that_are_read_are_the_layers_own() -> None:
    layout = triton_linear._layout(QuantSpec("int3", "group", 24), 3, 64)
    # 3 bytes hold 8 codes, which 3 halvings take apart; 8 neighbours share a scale.
    assert layout == {
        "BITS": 3,
        "OFFSET": 4,
        "CELL": 3,
        "HALVINGS": 3,
        "GROUP": 24,
        "PART": 8,
    }
    one = triton_linear._layout(QuantSpec("uint8"), 1, 64)
    assert (one["CELL"], one["HALVINGS"], one["PART"]) == (1, 0, 64)
