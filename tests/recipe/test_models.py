import json

import pytest
import torch
from torch import nn

from supple.errors import CheckpointError, SettingError, UnsupportedModelError
from supple.recipe.models import example_inputs, model_source, parse_input

CONFIG = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("digits-cnn", {"widths": [5, 7], "blocks": [1, 0]}),
        ("models/digits-cnn", {"widths": ["5", 7], "blocks": [1, 0]}),
        ("LlamaForCausalLM", {"config": CONFIG}),
        ("AutoModelForCausalLM", {"config": CONFIG | {"model_type": "llama"}}),
        ("tests.cli.models:bessel", {}),
    ],
)
def test_a_model_is_built_the_same_from_the_same_seed(key, settings):
    source = model_source(key, settings, allow_code=True)
    before = torch.get_rng_state()
    first, again, other = (source.build(seed) for seed in (3, 3, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert not source.pretrained


def test_a_folder_in_the_format_of_transformers_keeps_its_weights(tmp_path):
    model = model_source("LlamaForCausalLM", {"config": CONFIG}).build(0)
    model.save_pretrained(tmp_path)
    source = model_source("LlamaForCausalLM", {"folder": str(tmp_path)})
    assert source.pretrained
    assert tmp_path / "config.json" in source.files
    assert torch.equal(weights(source.build(1)), weights(model))


def test_a_configuration_may_be_a_file(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    source = model_source("LlamaForCausalLM", {"config": str(tmp_path / "c.json")})
    assert source.build(0).config.hidden_size == 16


def test_what_the_data_tells_fills_settings_that_are_left_out():
    known = {"classes": 3}
    assert model_source("digits-cnn", known=known).build(0).head.out_features == 3
    chosen = model_source("digits-cnn", {"classes": 7}, known=known)
    assert chosen.build(0).head.out_features == 7


@pytest.mark.parametrize(
    ("key", "settings", "error", "words"),
    [
        ("digits-cn", {}, SettingError, "did you mean 'digits-cnn'"),
        ("LlamaForCausalML", {}, SettingError, "did you mean 'LlamaForCausalLM'"),
        ("LlamaForCausalLM", {}, SettingError, "either config"),
        ("LlamaForCausalLM", {"config": {}, "folder": "x"}, SettingError, "either config"),
        ("LlamaForCausalLM", {"confg": {}}, SettingError, "did you mean 'config'"),
        (
            "LlamaForCausalLM",
            {"config": {"hiden_size": 8}},
            SettingError,
            "did you mean 'hidden_size'",
        ),
        ("LlamaForCausalLM", {"folder": "nowhere"}, CheckpointError, "nowhere"),
        ("AutoModel", {"config": {"model_type": "lama"}}, SettingError, "did you mean 'llama'"),
        ("tests.cli.models:bessel", {}, SettingError, "allow_code"),
    ],
)
def test_a_wrong_model_is_told_with_what_would_do(key, settings, error, words):
    with pytest.raises(error, match=words):
        model_source(key, settings)


def test_what_is_no_module_is_refused_when_it_is_built():
    source = model_source("tests.cli.models:no_module", allow_code=True)
    with pytest.raises(UnsupportedModelError, match="gave a str, wants a torch"):
        source.build(0)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("vit", {}),
        ("digits-cnn", {"channels": 3}),
        ("LlamaForCausalLM", {"config": CONFIG}),
        (
            "ViTModel",
            {"config": {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 16,
                        "num_attention_heads": 2, "patch_size": 8, "intermediate_size": 24}},
        ),
        (
            "T5Model",
            {"config": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
                        "vocab_size": 31}},
        ),
    ],
)  # fmt: skip
def test_made_up_inputs_are_taken_by_the_model(key, settings):
    source = model_source(key, settings)
    model = source.build(0).eval()
    args, kwargs = example_inputs(model, source.settings)
    with torch.no_grad():
        model(*args, **kwargs)


def test_inputs_of_an_unknown_model_have_to_be_given():
    with pytest.raises(UnsupportedModelError, match="--input 2x3x32x32"):
        example_inputs(nn.Linear(3, 5))


@pytest.mark.parametrize("text", ["", "2x", "x", "2x3:float", "a=2x-1", "2x0"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(SettingError, match="2x3x32x32"):
        parse_input(text)
