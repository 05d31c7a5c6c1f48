"""Quantized `transformers` models in the ecosystem's own format, compressed-tensors.

`save_compressed_tensors` writes a model whose linear layers are `PackedLinear` as a folder that
`transformers` (with the package `compressed-tensors`), vLLM and others read, and
`load_compressed_tensors` reads such a folder, whoever wrote it. Neither needs that package.

A folder holds `model.safetensors` and `config.json`: the model's own configuration and, as
`quantization_config`, what was done to it. Tokenizer and generation settings are yours to put
beside them (`tokenizer.save_pretrained(folder)`).

| weights | inputs | format | in the file |
|---|---|---|---|
| whole numbers, 2 to 8 bits | as they are | `pack-quantized` | codes bit after bit in int32 |
| whole numbers, 2 to 8 bits | whole numbers, to 8 bits | `int-quantized` | a number a byte |
| `e4m3` | as they are | `naive-quantized` | `float8_e4m3fn` |
| `e4m3` | `e4m3` | `float-quantized` | `float8_e4m3fn` |

Weights are scaled by channel or group, with or without zero points. With 3, 5, 6 and 7 bits the
codes lie as compressed-tensors packs them since it wastes no bits; older versions refuse their
shapes. What a program has kernels for is its own matter: vLLM's take 4 and 8 bits.

Where scales of inputs are found for each token, the reader finds them its own way. For b bits,
compressed-tensors divides the largest magnitude by 2^(b-1) - 1/2 and vLLM by 2^(b-1) - 1; so
does Supple with the former where it is positive, and by 2^(b-1) + 1/2 where it is negative.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple import files, rebuild
from supple.errors import CheckpointError, ExportError, SuppleWarning, UnsupportedModelError
from supple.formats import Float, Int, Quantized, QuantSpec
from supple.layers.packed import PackedLinear, pack_codes, unpack_codes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_compressed_tensors", "save_compressed_tensors"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
VERSION = "0.19.0"
"""Version of compressed-tensors whose layout this is."""
_E4M3 = Float(4, 3)
_SCALE_FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")

Scheme = dict[str, Any]

# ------------------------------------------------------------------------------------- writing


@torch.no_grad()
def save_compressed_tensors(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a quantized `transformers` model so that others read it: see this module.

    Scales take the model's type, in which the reader multiplies: exact from float16 to float32,
    rounded to bfloat16 unless the spec has `scale_format="bf16"`.

    Args:
        model: A `transformers` model whose linear layers are `PackedLinear`, some or all.
        folder: The folder to write. One that was written so is replaced when the new one is
            complete; other files in it are kept.

    Raises:
        UnsupportedModelError: It is no `transformers` model.
        ExportError: Nothing is quantized, or the format can't hold a layer; the message names
            it.
        CheckpointError: The folder holds something else, or can't be written.

    Warns:
        SuppleWarning: Scales had to be rounded.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from supple.quantize.base import baseline
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
        >>> heads = {"num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        >>> small = baseline("rtn", bits=4, group_size=32, layers="*, !lm_head").apply(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed_tensors(small, folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']

    Source:
        The package compressed-tensors 0.19, `compressors` and `quantization/quant_config.py`.
    """
    target = Path(os.path.realpath(folder))  # a link stays a link
    pretrained = _pretrained(model)
    files.check_folder(target, _is_ours, "a quantized model of this kind")
    layers = _packed_layers(pretrained)
    config, state = _untied(pretrained, layers)
    tensors = {name: value for name, value in state.items() if not _within(name, layers)}
    groups: dict[str, list[str]] = {}
    lost: dict[str, float] = {}
    for path, layer in layers.items():
        scheme = _scheme(path, layer)
        groups.setdefault(json.dumps(scheme), []).append(path)
        quantized = layer.quantized()
        held = _tensors(path, layer, quantized, scheme)
        tensors.update({f"{path}.{name}": value for name, value in held.items()})
        lost[path] = _loss(quantized.scale, held["weight_scale"])
    _warn_of_rounding(lost, layers)
    kept = [path for path, one in pretrained.named_modules() if isinstance(one, nn.Linear)]
    config["quantization_config"] = _described(groups, kept)
    with files.replacing_folder(target, (CONFIG, WEIGHTS)) as new:
        files.write_tensors(new / WEIGHTS, tensors, {"format": "pt"})
        files.write_text(new / CONFIG, json.dumps(config, indent=2) + "\n")


def _pretrained(model: nn.Module) -> PreTrainedModel:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"compressed-tensors holds models of transformers, got a {type(model).__name__}, "
            "which has no configuration; give the PreTrainedModel itself, or write this one "
            "with supple.save or supple.export"
        )
    return model


def _is_ours(folder: Path) -> bool:
    if not (folder / CONFIG).is_file() or (folder / INDEX).exists():
        return False
    return "quantization_config" in files.read_json(folder / CONFIG, checked=False)


def _packed_layers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    """The packed layers of a model that is otherwise what its configuration builds."""
    plain = _plain(model)
    expected = dict(plain.named_modules(remove_duplicate=False))
    packed: dict[str, PackedLinear] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        other = expected.get(path)
        if type(module) is PackedLinear and isinstance(other, nn.Linear):
            packed[path] = module
        elif type(module) is not type(other):
            there = "nothing" if other is None else f"a {type(other).__name__}"
            raise ExportError(
                f"layer '{path}' is a {type(module).__name__}, where a {type(model).__name__} "
                f"of transformers has {there}: compressed-tensors has packed codes in place of "
                "linear layers only; quantize without rotations, scaled inputs, products of "
                "low rank and codebooks (codes/rtn, codes/gptq, quantize/awq), leave this "
                "layer out (layers='*, !...'), or export to .onnx"
            )
    if not packed:
        raise ExportError(
            f"no linear layer of this {type(model).__name__} holds packed codes; quantize it "
            "first (with packed=True), or write it with its own save_pretrained"
        )
    _check_shapes(model, plain, packed)
    return packed


def _plain(model: PreTrainedModel) -> nn.Module:
    """The model as its configuration builds it, without values."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return type(model)(copy.deepcopy(model.config))
        except Exception as error:  # whatever a constructor raises
            raise ExportError(
                f"the configuration builds no {type(model).__name__} ({error}), so no reader "
                "could; give the model a configuration of its sizes"
            ) from error


def _check_shapes(
    model: nn.Module, plain: nn.Module, packed: Mapping[str, PackedLinear]
) -> None:
    """Raises where a tensor is not of the shape that the configuration tells."""
    ours = {f"{path}.weight": torch.Size(one.matrix_shape) for path, one in packed.items()}
    biased = {f"{path}.bias" for path, one in packed.items() if one.bias is not None}
    state = model.state_dict()
    ours |= {n: v.shape for n, v in state.items() if n in biased or not _within(n, packed)}
    theirs = {name: value.shape for name, value in plain.state_dict().items()}
    for name in dict.fromkeys((*ours, *theirs)):
        got, wanted = ours.get(name), theirs.get(name)
        if got != wanted:
            told = [None if one is None else tuple(one) for one in (got, wanted)]
            raise ExportError(
                f"'{name}' has shape {told[0]}, and the model's configuration builds "
                f"{told[1]}: no reader could build this network; extract a uniform size, whose "
                "configuration is its own, or export to .onnx"
            )


def _within(name: str, layers: Mapping[str, object]) -> bool:
    return name.rpartition(".")[0] in layers


def _untied(
    model: PreTrainedModel, layers: Mapping[str, PackedLinear]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, and the tensors: tied ones once, where all that it ties are so."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    state = dict(model.state_dict())
    ties = dict(model.all_tied_weights_keys)
    if all(_is_same(state.get(one), state.get(other)) for one, other in ties.items()):
        for name in ties:
            del state[name]
    else:
        config["tie_word_embeddings"] = False
        _check_untied(model, layers)
    config |= {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return config, state


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.data_ptr() == other.data_ptr()


def _check_untied(model: PreTrainedModel, layers: Mapping[str, PackedLinear]) -> None:
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        left = type(model)(config).all_tied_weights_keys
    for name in (*left, *left.values()):
        if _within(name, layers):
            raise ExportError(
                f"a reader ties '{name}' to another weight, whatever the configuration says, "
                "and here it holds codes; leave this layer out (layers='*, !...')"
            )


# ------------------------------------------------------------------------- schemes and tensors


def _scheme(path: str, layer: PackedLinear) -> Scheme:
    """How a layer is quantized, in the format's words."""
    spec, columns = layer.spec, layer.in_features
    weights = _number_type(path, "weight", spec)
    if spec.zero_format != "code" and not spec.symmetric:
        raise _refused(
            path,
            f"its zero points lie between whole numbers (zero_format='{spec.zero_format}')",
            "quantize with zero points that are codes, as codes/gptq has them",
        )
    size = min(spec.group_size or columns, columns)
    if columns % size:
        raise _refused(
            path,
            f"its last group is smaller: {columns} inputs in groups of {size}",
            f"take a group_size that divides {columns}",
        )
    weights |= {
        "symmetric": spec.symmetric and spec.format.least < 0,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": None if spec.group_size is None else size,
        "dynamic": False,
    }
    inputs = None if layer.input is None else _input_scheme(path, layer, layer.input)
    if inputs is not None and inputs["type"] != weights["type"]:
        raise _refused(
            path,
            f"its weight is of '{spec.format.name}' and its input of another kind",
            "take both of whole numbers, or both of e4m3",
        )
    place = 2 * (weights["type"] == "float") + (inputs is not None)
    return {"format": _FORMATS[place], "weights": weights, "input_activations": inputs}


def _number_type(path: str, what: str, spec: QuantSpec) -> dict[str, Any]:
    form = spec.format
    if isinstance(form, Int) and form.bits <= 8:
        return {"num_bits": form.bits, "type": "int"}
    if form == _E4M3:
        return {"num_bits": 8, "type": "float"}
    raise _refused(
        path,
        f"numbers of its {what} are of '{form.name}'",
        "take whole numbers of 2 to 8 bits, or e4m3",
    )


def _input_scheme(path: str, layer: PackedLinear, spec: QuantSpec) -> dict[str, Any]:
    if spec.granularity == "group":
        raise _refused(path, "its input is scaled by group", "scale it by token or tensor")
    if layer.fixed_input and spec.zero_format != "code" and not spec.symmetric:
        raise _refused(
            path,
            f"its input's zero point is no whole number (zero_format='{spec.zero_format}')",
            "take zero_format='code'",
        )
    found = _number_type(path, "input", spec)
    symmetric = spec.symmetric
    if isinstance(spec.format, Int) and symmetric and not spec.format.offset:
        raise _refused(path, "its input has no negative numbers", "take signed ones")
    return {
        **found,
        "symmetric": symmetric,
        "strategy": spec.granularity,
        "group_size": None,
        "dynamic": not layer.fixed_input,
    }


def _refused(path: str, why: str, instead: str) -> ExportError:
    return ExportError(f"layer '{path}': {why}, which compressed-tensors can't hold; {instead}")


def _zeros(quantized: Quantized) -> Tensor:
    """Zero points as codes, of the scales' shape; numbers that are never negative have 0."""
    form = quantized.spec.format
    assert isinstance(form, Int)
    zero = torch.zeros_like(quantized.scale) if quantized.zero is None else quantized.zero
    return (zero + form.offset).round().to(torch.uint8)


def _tensors(
    path: str, layer: PackedLinear, quantized: Quantized, scheme: Scheme
) -> dict[str, Tensor]:
    """What the file holds of a layer."""
    rows, form = layer.out_features, scheme["format"]
    bits, symmetric = scheme["weights"]["num_bits"], scheme["weights"]["symmetric"]
    found = {"weight_scale": _cast(path, quantized.scale.expand(rows, -1), layer.dtype)}
    zero = None if symmetric else _zeros(quantized).expand(rows, -1)
    if form == "pack-quantized":
        found["weight_packed"] = _pack(quantized.codes, bits)
        found["weight_shape"] = torch.tensor(layer.matrix_shape)
        if zero is not None:
            found["weight_zero_point"] = _pack(zero.T, bits).T
    elif scheme["weights"]["type"] == "int":
        found["weight"] = _signed(quantized.codes, bits)
        if zero is not None:
            found["weight_zero_point"] = _signed(zero, bits)
    else:
        found["weight"] = quantized.codes.view(torch.float8_e4m3fn)
    if layer.fixed_input:
        found |= _input_tensors(path, layer)
    return found | ({} if layer.bias is None else {"bias": layer.bias.detach()})


def _input_tensors(path: str, layer: PackedLinear) -> dict[str, Tensor]:
    assert layer.input is not None
    scale, zero = layer._input_range(torch.empty(0))
    found = {"input_scale": _cast(path, scale.reshape(1), layer.dtype)}
    if zero is not None:
        form = layer.input.format
        assert isinstance(form, Int)
        codes = (zero.reshape(1) + form.offset).round().to(torch.uint8)
        found["input_zero_point"] = _signed(codes, form.bits)
    return found


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.int() - 2 ** (bits - 1)).to(torch.int8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Lays each row of codes out in 32-bit words, bit after bit, the last one filled up.

    Args:
        codes: (rows, columns), uint8.
        bits: Of a code.

    Returns:
        (rows, ceil(columns * bits / 32)), int32.
    """
    rows, columns = codes.shape
    bytes_ = pack_codes(F.pad(codes, (0, -columns % 32)), bits)  # 32 codes end with a word
    return bytes_.view(torch.int32).reshape(rows, -1)[:, : -(-columns * bits // 32)]


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Gives the codes that `_pack` laid out, (rows, columns), uint8."""
    whole = F.pad(words, (0, -(-columns // 32) * bits - words.shape[1])).contiguous()
    return unpack_codes(whole.view(torch.uint8), bits, -(-columns // 32) * 32)[:, :columns]


def _cast(path: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    found = scale.to(dtype)
    if not (found.isfinite() & (found > 0)).all():
        raise _refused(
            path,
            f"scales from {scale.amin():.3g} to {scale.amax():.3g} don't fit {dtype}",
            "give the model another type (model.bfloat16()) before it is quantized",
        )
    return found


def _loss(scale: Tensor, written: Tensor) -> float:
    return float(((written.float() - scale) / scale).abs().amax())


def _warn_of_rounding(lost: Mapping[str, float], layers: Mapping[str, PackedLinear]) -> None:
    rounded = [path for path, one in lost.items() if one]
    if rounded:
        short = str(layers[rounded[0]].dtype).removeprefix("torch.")
        warnings.warn(
            f"scales of {len(rounded)} layers ('{rounded[0]}', ...) are rounded to {short}, "
            f"the model's type, by up to {max(lost.values()):.2g} of their size; quantize with "
            f"scale_format='{_SCALE_FORMATS.get(layers[rounded[0]].dtype, 'fp16')}' to keep "
            "them as they are",
            SuppleWarning,
            stacklevel=3,
        )


def _described(groups: Mapping[str, list[str]], kept: list[str]) -> dict[str, Any]:
    """The part of the configuration that tells what was done to which layers."""
    schemes = [json.loads(scheme) for scheme in groups]
    formats = list(dict.fromkeys(scheme["format"] for scheme in schemes))
    paths = ["Linear"] if len(schemes) == 1 else None
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": paths or names,
                **scheme,
                "output_activations": None,
            }
            for index, (scheme, names) in enumerate(zip(schemes, groups.values(), strict=True))
        },
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# ------------------------------------------------------------------------------------- reading


@torch.no_grad()
def load_compressed_tensors(folder: str | os.PathLike[str]) -> nn.Module:
    """Reads a quantized model that llm-compressor or `save_compressed_tensors` wrote.

    The model computes with `PackedLinear` in place of the quantized layers, so all of Supple
    takes it: `supple.save`, `supple.export`, `supple.deploy.engines.deploy`. It is built in
    full first, then its quantized weights are dropped.

    Args:
        folder: The folder, with `config.json` and one or several `.safetensors` files.

    Returns:
        A model of `transformers`, in eval mode, on the CPU.

    Raises:
        CheckpointError: A file is missing or damaged, the installed `transformers` has no such
            model, or it is quantized in a way that is not of this module's table.

    Example:
        >>> model = load_compressed_tensors("Llama-3.2-1B-W4A16")  # doctest: +SKIP
        >>> model.model.layers[0].mlp.up_proj  # doctest: +SKIP
        PackedLinear((8192, 2048), int4, group 128)
    """
    place = Path(folder)
    config = files.read_json(place / CONFIG, checked=False)
    told = config.pop("quantization_config", None)
    _check_told(place, told)
    tensors = _read(place)
    model = _built(place, config)
    schemes = dict(_targeted(model, told))
    made: dict[str, nn.Module] = {}
    rest = {name: value for name, value in tensors.items() if not _within(name, schemes)}
    for path, scheme in schemes.items():
        held = {
            name.removeprefix(f"{path}."): value
            for name, value in tensors.items()
            if name.rpartition(".")[0] == path
        }
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        made[path] = _layer(place, path, linear, scheme, held)
    model = rebuild.replace(model, made)
    _fill(place, model, rest, made)
    return model.eval()


def _check_told(place: Path, told: Any) -> None:
    if not isinstance(told, dict) or told.get("quant_method") != "compressed-tensors":
        got = told.get("quant_method") if isinstance(told, dict) else None
        raise CheckpointError(
            f"{place / CONFIG} tells of no quantization by compressed-tensors, got {got!r}; "
            "read it with transformers' from_pretrained"
        )
    if told.get("quantization_status") != "compressed":
        raise CheckpointError(
            f"{place}: its weights are not compressed (quantization_status "
            f"{told.get('quantization_status')!r}); save it with save_compressed=True"
        )
    for more in ("transform_config", "sparsity_config", "kv_cache_scheme"):
        if told.get(more):
            raise CheckpointError(f"{place}: '{more}' can't be read; quantize without it")


def _read(place: Path) -> dict[str, Tensor]:
    if not (place / INDEX).is_file():
        return files.read_tensors(place / WEIGHTS)[0]
    index = files.read_json(place / INDEX, checked=False)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        if Path(name).name != name:
            raise CheckpointError(f"{place / INDEX} names a file of another folder: {name}")
        tensors |= files.read_tensors(place / name)[0]
    return tensors


def _built(place: Path, config: dict[str, Any]) -> nn.Module:
    names = config.get("architectures") or ["None"]
    origin = {
        "transformers": names[0],
        "config": config,
        "attention": {"": None},
        "experts": {"": None},
    }
    try:
        with torch.random.fork_rng(devices=[]):
            return rebuild.construct(origin)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{place / CONFIG} builds no {names[0]} here ({type(error).__name__}: {error}); "
            "install the transformers that it was written with"
        ) from error


def _targeted(model: nn.Module, told: Mapping[str, Any]) -> Iterator[tuple[str, Scheme]]:
    """Yields the linear layers that are quantized, each with the first scheme that names it."""
    ignored = told.get("ignore") or []
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or any(_names(one, path) for one in ignored):
            continue
        for scheme in told["config_groups"].values():
            if any(_names(one, path) for one in scheme["targets"]):
                yield path, {**scheme, "format": scheme.get("format") or told["format"]}
                break


def _names(target: str, path: str) -> bool:
    """Whether a target (a path, `re:` and a pattern, or a class) names a linear layer."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return target in (path, "Linear")


def _layer(
    place: Path, path: str, linear: nn.Linear, scheme: Scheme, held: dict[str, Tensor]
) -> PackedLinear:
    """The layer of packed codes, from what the file holds of it."""
    try:
        scale = held["weight_scale"]
        spec = _spec(scheme["weights"], scale.dtype)
        codes = _codes(scheme, held)
        shape = tuple(linear.weight.shape)
        scale = scale.float().reshape(spec.scale_shape(shape))
        zero = None if spec.symmetric else _zero(scheme, held, scale)
        input, range_ = _input(scheme.get("input_activations"), held)
        if tuple(codes.shape) != shape or set(held) - _KNOWN:
            raise ValueError(f"holds {sorted(held)}, codes of shape {tuple(codes.shape)}")
        linear.to(held["weight_scale"].dtype)
        if linear.bias is not None:
            linear.bias.copy_(held["bias"])
        elif "bias" in held:
            raise ValueError("has a bias, and the configuration tells of none")
        quantized = Quantized(codes, scale, zero, spec, torch.Size(shape))
        return PackedLinear.from_quantized(linear, quantized, input=input, input_range=range_)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{place}: layer '{path}' is quantized in a way that Supple does not read "
            f"({type(error).__name__}: {error}); it reads {', '.join(_FORMATS)} by tensor, "
            "channel or group"
        ) from error


_KNOWN = {
    "bias",
    "input_scale",
    "input_zero_point",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
}


def _spec(told: Mapping[str, Any], dtype: torch.dtype) -> QuantSpec:
    """How a weight is quantized, from the format's words."""
    strategy, symmetric = told["strategy"], told["symmetric"]
    if strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"strategy {strategy!r}")
    return QuantSpec(
        _number_format(told),
        strategy,
        told["group_size"] if strategy == "group" else None,
        symmetric,
        _SCALE_FORMATS[dtype],  # type: ignore[arg-type]
    )


def _number_format(told: Mapping[str, Any]) -> Int | Float:
    if told["type"] == "int" and told["num_bits"] <= 8:
        return Int(told["num_bits"], symmetric=told["symmetric"])
    if (told["type"], told["num_bits"]) != ("float", 8):
        raise ValueError(f"numbers of type {told['type']} with {told['num_bits']} bits")
    return _E4M3


def _codes(scheme: Scheme, held: Mapping[str, Tensor]) -> Tensor:
    bits = scheme["weights"]["num_bits"]
    if scheme["format"] == "pack-quantized":
        return _unpack(held["weight_packed"], bits, int(held["weight_shape"][1]))
    if scheme["format"] not in _FORMATS:
        raise ValueError(f"format {scheme['format']!r}")
    if held["weight"].dtype == torch.float8_e4m3fn:
        return held["weight"].view(torch.uint8)
    return (held["weight"].int() + 2 ** (bits - 1)).to(torch.uint8)


def _zero(scheme: Scheme, held: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    zero, bits = held["weight_zero_point"], scheme["weights"]["num_bits"]
    if zero.dtype == torch.int32:  # packed, down the columns
        return _unpack(zero.T.contiguous(), bits, len(scale)).T.float()
    return zero.float().reshape(scale.shape) + 2 ** (bits - 1)


def _input(
    told: Mapping[str, Any] | None, held: Mapping[str, Tensor]
) -> tuple[QuantSpec | None, tuple[Tensor, Tensor | None] | None]:
    """How inputs are quantized, and scale and zero point where they are held."""
    if told is None:
        return None, None
    strategy, symmetric = told["strategy"], told["symmetric"]
    if strategy not in ("tensor", "token") or told["dynamic"] not in (True, False):
        raise ValueError(f"inputs of strategy {strategy!r}, dynamic={told['dynamic']!r}")
    spec = QuantSpec(_number_format(told), strategy, symmetric=symmetric)
    if told["dynamic"]:
        return spec, None
    zero = None if symmetric else held["input_zero_point"].float() + 2 ** (spec.bits - 1)
    return spec, (held["input_scale"], zero)


def _fill(
    place: Path, model: nn.Module, rest: Mapping[str, Tensor], made: Mapping[str, nn.Module]
) -> None:
    """Puts the other tensors in, of the type that the file has."""
    found = model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    tied = model.all_tied_weights_keys
    assert isinstance(tied, Mapping)
    missing = [n for n in found.missing_keys if n not in tied and not _within(n, made)]
    if missing or found.unexpected_keys:
        what = "lacks" if missing else "also holds"
        name = (missing or found.unexpected_keys)[0]
        raise CheckpointError(
            f"{place} {what} '{name}': it is not the network that its configuration builds; "
            "install the transformers that it was written with, or fetch the folder anew"
        )
