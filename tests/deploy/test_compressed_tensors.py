"""compressed-tensors: what lies in the files, that it comes back, and what is refused."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import supple
from supple.cli.main import app
from supple.deploy.compressed_tensors import (
    _pack,
    _unpack,
    load_compressed_tensors,
    save_compressed_tensors,
)
from supple.errors import CheckpointError, ExportError, SuppleWarning, UnsupportedModelError
from supple.files import read_tensors, write_tensors
from supple.formats import QuantSpec, quantize
from supple.layers.packed import PackedLinear
from supple.models.base import build
from supple.quantize.base import baseline
from supple.rebuild import replace

IDS = torch.arange(24).reshape(2, 12)
UP = "model.layers.1.mlp.up_proj"


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
        initializer_range=0.2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def small(name: str = "rtn", *, layers: str = "*, !lm_head", **settings: Any) -> nn.Module:
    return baseline(name, layers=layers, **settings).apply(llama())


def with_layer(spec: QuantSpec, **more: Any) -> nn.Module:
    """A model with one layer of codes."""
    model = llama()
    linear = model.get_submodule(UP)
    quantized = quantize(linear.weight.detach(), spec)
    return replace(model, {UP: PackedLinear.from_quantized(linear, quantized, **more)})


def written(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    save_compressed_tensors(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    return read_tensors(folder / "model.safetensors")[0], described(folder)


def described(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def read_word(words: Tensor, index: int, bits: int) -> int:
    """One code of a row of 32-bit words, by arithmetic on the row as one whole number."""
    row = sum((int(word) % 2**32) << 32 * place for place, word in enumerate(words))
    return row >> bits * index & 2**bits - 1


# ----------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_lie_bit_after_bit_in_words(tmp_path: Path, bits: int) -> None:
    spec = QuantSpec(f"uint{bits}", "group", 32, symmetric=False, scale_format="fp16")
    model = with_layer(spec)
    tensors, _ = written(model, tmp_path / "net")
    layer = model.get_submodule(UP)
    assert isinstance(layer, PackedLinear)
    ours = layer.quantized()
    assert ours.zero is not None
    words = tensors[f"{UP}.weight_packed"]
    assert (words.dtype, words.shape) == (torch.int32, (96, 64 * bits // 32))
    for row, column in ((0, 0), (5, 31), (5, 32), (95, 63)):
        assert read_word(words[row], column, bits) == int(ours.codes[row, column])
    zeros = tensors[f"{UP}.weight_zero_point"]  # packed down the columns
    assert (zeros.dtype, zeros.shape) == (torch.int32, (96 * bits // 32, 2))
    for row, group in ((0, 0), (7, 1), (95, 1)):
        assert read_word(zeros[:, group], row, bits) == int(ours.zero[row, group])
    assert tensors[f"{UP}.weight_shape"].tolist() == [96, 64]
    scale = tensors[f"{UP}.weight_scale"]
    assert scale.dtype == torch.float32
    assert torch.equal(scale, ours.scale)


def test_a_row_that_ends_within_a_word_is_filled_up() -> None:
    codes = torch.randint(32, (3, 41), generator=torch.Generator().manual_seed(0)).byte()
    words = _pack(codes, 5)
    assert words.shape == (3, 7)  # 205 bits
    assert [read_word(words[1], index, 5) for index in range(41)] == codes[1].tolist()
    assert read_word(words[1], 41, 5) == 0
    assert torch.equal(_unpack(words, 5, 41), codes)


def test_symmetric_codes_have_no_zero_points_and_their_middle_is_zero(tmp_path: Path) -> None:
    tensors, _ = written(small(bits=4, group_size=32), tmp_path / "net")
    names = {name.rpartition(".")[2] for name in tensors if name.startswith(UP)}
    assert names == {"weight_packed", "weight_scale", "weight_shape"}
    weight = llama().get_submodule(UP).weight
    row, column = divmod(int(weight.abs().argmin()), 64)
    assert read_word(tensors[f"{UP}.weight_packed"][row], column, 4) == 8


def test_the_configuration_tells_the_scheme(tmp_path: Path) -> None:
    _, config = written(small(bits=4, group_size=32), tmp_path / "net")
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert config["hidden_size"] == 64
    told = config["quantization_config"]
    assert told["quant_method"] == "compressed-tensors"
    assert told["quantization_status"] == "compressed"
    assert (told["format"], told["ignore"]) == ("pack-quantized", ["lm_head"])
    (group,) = told["config_groups"].values()
    assert (group["targets"], group["input_activations"]) == (["Linear"], None)
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }


def test_layers_of_different_schemes_are_named(tmp_path: Path) -> None:
    model = baseline("rtn", group_size=32, layers="*.mlp.*").apply(llama())
    model = baseline("rtn", bits=8, activations=8, layers="*.q_proj").apply(model)
    _, config = written(model, tmp_path / "net")
    told = config["quantization_config"]
    first, second = told["config_groups"].values()
    paths = [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
    assert (first["targets"], first["format"]) == (paths, "int-quantized")
    assert second["targets"][0] == "model.layers.0.mlp.gate_proj"
    assert len(second["targets"]) == 6
    assert told["format"] == "mixed-precision"
    assert {path.split(".")[-1] for path in told["ignore"]} == {
        "k_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    }


def test_inputs_of_8_bits_are_told_and_numbers_are_signed_bytes(tmp_path: Path) -> None:
    tensors, config = written(small(bits=8, activations=8), tmp_path / "net")
    (group,) = config["quantization_config"]["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"], inputs["num_bits"]) == ("token", True, 8)
    weight, numbers = llama().get_submodule(UP).weight, tensors[f"{UP}.weight"]
    assert numbers.dtype == torch.int8
    scale = tensors[f"{UP}.weight_scale"]
    assert scale.shape == (96, 1)
    # Half a step; and scales in half precision move the largest by 127 parts in 2048.
    assert ((numbers * scale - weight).abs() <= scale * 0.57).all()


def test_a_range_of_inputs_is_held(tmp_path: Path) -> None:
    inputs = QuantSpec("uint8", "tensor", symmetric=False)
    range_ = (torch.tensor([[0.5]]), torch.tensor([[100.0]]))
    model = with_layer(QuantSpec("int8"), input=inputs, input_range=range_)
    tensors, _ = written(model, tmp_path / "net")
    assert tensors[f"{UP}.input_scale"].tolist() == [0.5]
    assert tensors[f"{UP}.input_zero_point"].tolist() == [-28]
    assert torch.equal(logits(load_compressed_tensors(tmp_path / "net")), logits(model))


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model = baseline("rtn").apply(llama(tie_word_embeddings=True))
    tensors, config = written(model, tmp_path / "net")
    assert "lm_head.weight" not in tensors
    assert config["tie_word_embeddings"] is True
    loaded = load_compressed_tensors(tmp_path / "net")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_codes_in_place_of_a_tied_weight_untie_it(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    codes = quantize(model.lm_head.weight.detach(), QuantSpec("int4"))
    model = replace(model, {"lm_head": PackedLinear.from_quantized(model.lm_head, codes)})
    _, config = written(model, tmp_path / "net")
    assert config["tie_word_embeddings"] is False
    assert torch.equal(logits(load_compressed_tensors(tmp_path / "net")), logits(model))


# ------------------------------------------------------------------------------ and comes back


SCHEMES = {
    "4 bits": {"bits": 4, "group_size": 32},
    "4 bits with zero points": {"bits": 4, "group_size": 32, "symmetric": False},
    "3 bits": {"bits": 3, "group_size": 16, "symmetric": False},
    "8 bits by channel": {"bits": 8},
    "4 bits, inputs of 8": {"bits": 4, "group_size": 32, "activations": 8},
    "8 bits with zero points, inputs of 8": {"bits": 8, "symmetric": False, "activations": 8},
    "e4m3": {"bits": 8, "format": "e4m3"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_comes_back(tmp_path: Path, name: str) -> None:
    model = small(**SCHEMES[name])
    save_compressed_tensors(model, tmp_path / "net")
    loaded = load_compressed_tensors(tmp_path / "net")
    assert isinstance(loaded.get_submodule(UP), PackedLinear)
    assert torch.equal(logits(loaded), logits(model))


def test_what_came_back_is_saved_and_written_like_any_other(tmp_path: Path) -> None:
    save_compressed_tensors(small(group_size=32), tmp_path / "one")
    loaded = load_compressed_tensors(tmp_path / "one")
    supple.save(loaded, tmp_path / "saved")
    save_compressed_tensors(supple.load(tmp_path / "saved"), tmp_path / "two")
    one, two = (read_tensors(tmp_path / n / "model.safetensors")[0] for n in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_several_files_and_patterns_are_read(tmp_path: Path) -> None:
    """As llm-compressor writes large networks."""
    model, folder = small(bits=4, group_size=32), tmp_path / "net"
    save_compressed_tensors(model, folder)
    tensors = read_tensors(folder / "model.safetensors")[0]
    (folder / "model.safetensors").unlink()
    names = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(names.values()):
        part = {name: value for name, value in tensors.items() if names[name] == file}
        write_tensors(folder / file, part, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = described(folder)
    told = config["quantization_config"]
    told["config_groups"]["group_0"]["targets"] = [r"re:.*(self_attn|mlp)\..*_proj$"]
    told["ignore"] = ["re:.*lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_compressed_tensors(folder)), logits(model))


def test_files_of_others_stay_when_the_folder_is_written_anew(tmp_path: Path) -> None:
    save_compressed_tensors(small(bits=8), tmp_path / "net")
    (tmp_path / "net" / "tokenizer.json").write_text("{}")
    save_compressed_tensors(small(bits=4), tmp_path / "net")
    names = sorted(path.name for path in (tmp_path / "net").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    told = described(tmp_path / "net")["quantization_config"]
    assert told["config_groups"]["group_0"]["weights"]["num_bits"] == 4


# ----------------------------------------------------------------------- what can't be written


def test_scales_that_have_to_be_rounded_are_told_of(tmp_path: Path) -> None:
    model = baseline("rtn", layers="*.up_proj").apply(llama().bfloat16())
    with pytest.warns(SuppleWarning, match=r"2 layers .*rounded to bfloat16.*format='bf16'"):
        save_compressed_tensors(model, tmp_path / "net")
    exact = baseline("rtn", layers="*.up_proj", scale_format="bf16").apply(llama().bfloat16())
    save_compressed_tensors(exact, tmp_path / "net")  # without a warning


def test_scales_that_do_not_fit_the_models_type_are_refused(tmp_path: Path) -> None:
    model = llama().half()
    model.get_submodule(UP).weight.data.mul_(1e-7)
    model = baseline("rtn", layers="*.up_proj", scale_format="fp32").apply(model)
    with pytest.raises(ExportError, match=rf"'{UP}': scales from .* don't fit torch.float16"):
        save_compressed_tensors(model, tmp_path / "net")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "nf4"}, "numbers of its weight are of 'nf4'.*whole numbers of 2 to 8 bits"),
        ({"name": "fp4", "group_size": 32}, "numbers of its weight are of 'e2m1'"),
        ({"name": "hqq", "group_size": 32}, "zero points lie between whole numbers"),
        ({"bits": 12}, "numbers of its weight are of 'int12'"),
        ({"group_size": 40}, "last group is smaller: 64 inputs in groups of 40"),
        ({"activations": 12}, "numbers of its input are of 'int12'"),
        ({"name": "fp8", "activations": 8}, "its input of another kind"),
        ({"name": "quarot"}, r"'\S+q_proj' is a RotatedInput, where a Llama.* has a Linear"),
        ({"packed": False, "activations": 8}, "is a QuantizedInput, .* without rotations"),
        ({"packed": False}, "no linear layer .* holds packed codes; quantize it first"),
    ],
)
def test_what_the_format_can_not_hold_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        save_compressed_tensors(small(**settings), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_layers_that_readers_do_not_take_for_linear_are_refused(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    model = baseline("rtn").apply(GPT2LMHeadModel(GPT2Config(**sizes)))
    with pytest.raises(ExportError, match=r"is a PackedLinear, where .* has a Conv1D"):
        save_compressed_tensors(model, tmp_path / "net")


def test_a_network_that_its_configuration_does_not_build_is_refused(tmp_path: Path) -> None:
    model = baseline("rtn").apply(llama())
    model.config.intermediate_size = 80
    with pytest.raises(ExportError, match=r"gate_proj.*\(96, 64\), .* builds \(80, 64\)"):
        save_compressed_tensors(model, tmp_path / "net")


def test_a_model_that_is_not_of_transformers_is_refused(tmp_path: Path) -> None:
    model = baseline("rtn").apply(build("digits-cnn"))
    with pytest.raises(UnsupportedModelError, match=r"got a DigitsCNN.*supple\.export"):
        save_compressed_tensors(model, tmp_path / "net")


def test_a_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="not a quantized model"):
        save_compressed_tensors(small(), tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        save_compressed_tensors(small(), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# -------------------------------------------------------------------------- what can't be read


def changed(folder: Path, *keys: str, to: Any) -> None:
    """Writes a small model, then changes what its configuration tells."""
    save_compressed_tensors(small(bits=4, group_size=32), folder)
    config = described(folder)
    holder = config
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("quant_method",), "gptq", "no quantization by compressed-tensors, got 'gptq'"),
        (("quantization_status",), "frozen", "not compressed .*save_compressed=True"),
        (("transform_config",), {"config_groups": {"R1": {}}}, "'transform_config' can't be"),
        (("config_groups", "group_0", "format"), "nvfp4-pack-quantized", "does not read"),
        (("config_groups", "group_0", "weights", "strategy"), "block", "strategy 'block'"),
        (("config_groups", "group_0", "weights", "symmetric"), False, "weight_zero_point"),
        (("ignore",), ["lm_head", UP], f"also holds '{UP}.weight_packed'|lacks '{UP}"),
    ],
)
def test_what_can_not_be_read_is_told(
    tmp_path: Path, keys: tuple[str, ...], to: Any, message: str
) -> None:
    changed(tmp_path / "net", "quantization_config", *keys, to=to)
    with pytest.raises(CheckpointError, match=message):
        load_compressed_tensors(tmp_path / "net")


def test_a_model_that_is_unknown_here_is_told(tmp_path: Path) -> None:
    changed(tmp_path / "net", "architectures", to=["NobodysForCausalLM"])
    with pytest.raises(CheckpointError, match="has no model 'NobodysForCausalLM'"):
        load_compressed_tensors(tmp_path / "net")


# -------------------------------------------------------------------------- on the command line


def test_a_saved_network_is_exported_on_the_command_line(tmp_path: Path) -> None:
    model = small(bits=4, group_size=32)
    supple.save(model, tmp_path / "net")
    command = ["export", str(tmp_path / "net"), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--format", "compressed-tensors"])
    assert done.exit_code == 0, done.output
    assert torch.equal(logits(load_compressed_tensors(tmp_path / "out")), logits(model))
    for more, message in (
        (["--format", "compressed-tensor"], "did you mean 'compressed-tensors'?"),
        (["--format", "compressed-tensors", "--engine", "auto"], "leave out --engine"),
        (["--format", "compressed-tensors", "--threads", "2"], "leave out --threads"),
        (["--threads", "2"], "add --engine, or leave it out"),
        ([], "tell what the network is given, such as --input"),
    ):
        failed = CliRunner().invoke(app, [*command, *more])
        assert failed.exit_code == 2
        assert message in " ".join(failed.output.split())


# ------------------------------------------------------------------ the format's own reader


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="the package compressed-tensors is not installed",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in SCHEMES if "inputs" not in name])
def test_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = small(**SCHEMES[name])
    save_compressed_tensors(model, tmp_path / "net")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "net").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
