"""Networks come back from their folders bit by bit, or not at all."""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import supple
from supple import files, rebuild, storage
from supple.axes.base import Axis, Patch
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.resolution import Resolution
from supple.axes.width import Width
from supple.errors import (
    CheckpointError,
    ConcurrencyError,
    SettingError,
    SuppleWarning,
    UnsupportedModelError,
)
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.plan import Plan
from supple.space import Site
from tests.zoo import ZOO

BUILT = {
    "digits-cnn": lambda: (build("digits-cnn"), (torch.randn(2, 1, 8, 8),), {}),
    "cifar-resnet": lambda: (build("cifar-resnet", depth=8), (torch.randn(2, 3, 32, 32),), {}),
}
FROM_FILE = [*BUILT, "llama", "llama_tied", "bert", "t5", "gpt2", "mobilenet_v2", "vit"]
FROM_CODE = ["resnet_option_a", "nanogpt", "lstm", "transformer_encoder"]


def entry(name):
    if name not in BUILT:
        return ZOO[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, args, kwargs = BUILT[name]()
    return model.eval(), args, kwargs


@functools.cache
def network(name) -> Elastic:
    return elastic(*entry(name), verify=False)


def extracted(net, config) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuppleWarning)  # statistics do not matter here
        return net.extract(config).eval()


def outputs(module, args, kwargs):
    with torch.no_grad():
        output = module(*args, **kwargs)
    plain = dict(output) if hasattr(output, "keys") else output
    return [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, torch.Tensor)]


def same(mine, theirs) -> bool:
    assert mine
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def description(folder) -> dict:
    return json.loads((folder / "supple.json").read_text())


def rewrite(folder, **changes) -> None:
    """Changes the description as somebody would who knows the checksum."""
    content = description(folder)
    content.pop("sha256")
    schema = content.pop("schema")
    schema = changes.pop("schema", schema)
    files.write_json(folder / "supple.json", {**content, **changes}, schema=schema)


@pytest.fixture
def saved(tmp_path):
    """The folder of a small extracted network."""
    folder = tmp_path / "saved"
    storage.save(extracted(network("bert"), network("bert").space.random(1)), folder)
    return folder


# --- round trips --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FROM_FILE)
def test_extracted_networks_come_back_bit_by_bit(name, seed, tmp_path):
    net = network(name)
    module = extracted(net, net.space.random(seed))
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert type(loaded) is type(module)
    assert not loaded.training
    expected = {n: tuple(p.shape) for n, p in module.named_parameters()}
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == expected
    assert same(outputs(module, net.args, net.kwargs), outputs(loaded, net.args, net.kwargs))


@pytest.mark.parametrize("name", FROM_CODE)
def test_classes_of_the_users_own_come_back_with_model(name, tmp_path):
    net = network(name)
    module = extracted(net, net.space.random(2))
    supple.save(module, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"load\(\.\.\., model=\.\.\.\)"):
        supple.load(tmp_path / "net")
    other = entry(name)[0]
    before = {n: t.clone() for n, t in other.state_dict().items()}
    loaded = supple.load(tmp_path / "net", model=other)
    assert same(outputs(module, net.args, net.kwargs), outputs(loaded, net.args, net.kwargs))
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    # What the network itself looks like will do, too.
    again = supple.load(tmp_path / "net", model=loaded)
    assert same(outputs(module, net.args, net.kwargs), outputs(again, net.args, net.kwargs))


class Numbered(nn.Linear):
    """A residual block that knows its position."""

    def __init__(self, position):
        super().__init__(6, 6)
        self.position = position

    def forward(self, x):
        return x + super().forward(x)


def numbered():
    return nn.Sequential(*(Numbered(position) for position in range(3)))


def test_blocks_of_the_users_own_are_numbered_anew(tmp_path):
    axes = [Depth(pattern="any")]
    net = elastic(numbered(), torch.randn(2, 6), axes=axes, verify=False)
    module = net.extract({"1.keep": 0})
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net", model=numbered())
    assert [block.position for block in loaded] == [0, 1]
    assert torch.equal(loaded[1].weight, net.module[2].weight)


def test_layers_of_different_sizes_come_back(tmp_path):
    net = network("llama")
    ffn = [s for s in net.space.sites if s.axis == "width" and s.full == 80]
    assert len(ffn) == 3
    config = {site.name: site.choices[i] for i, site in enumerate(ffn)}
    module = extracted(net, config)
    widths = [layer.mlp.gate_proj.out_features for layer in module.model.layers]
    assert len(set(widths)) == 3
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert [layer.mlp.gate_proj.out_features for layer in loaded.model.layers] == widths
    assert same(outputs(module, net.args, net.kwargs), outputs(loaded, net.args, net.kwargs))


@pytest.mark.parametrize("pattern", ["even", "any"])
def test_blocks_from_the_middle_may_be_missing(pattern, tmp_path):
    model, args, kwargs = entry("llama")
    net = elastic(model, args, kwargs, [Depth(pattern=pattern)], verify=False)
    sites = net.space.sites
    config = {sites[0].name: 2} if pattern == "even" else {sites[1].name: 0}
    module = net.extract(config).eval()
    assert len(module.model.layers) == 2
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == [0, 1]
    assert same(outputs(module, args, kwargs), outputs(loaded, args, kwargs))
    cached = loaded.generate(**kwargs, max_new_tokens=3, do_sample=False)
    assert torch.equal(cached, module.generate(**kwargs, max_new_tokens=3, do_sample=False))


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    module = extracted(network("llama_tied"), network("llama_tied").space.random(3))
    supple.save(module, tmp_path / "net")
    stored, _ = files.read_tensors(tmp_path / "net" / "weights.safetensors")
    assert "lm_head.weight" not in stored
    assert description(tmp_path / "net")["tied"] == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    loaded = supple.load(tmp_path / "net")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_buffers_outside_the_state_dict_and_plain_tensors_come_back(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("shift", torch.zeros(3), persistent=False)
            self.plain = torch.zeros(3)
            self.listed = [torch.zeros(3), 2]
            self.paired = (torch.zeros(3), "x")

        def forward(self, x):
            return self.layer(x) + self.shift + self.plain + self.listed[0] + self.paired[0]

    module = Odd().eval()
    module.shift += 1
    module.plain = torch.full((3,), 3.0)
    module.listed[0] = torch.full((3,), 5.0)
    module.paired = (torch.full((3,), 7.0), "x")
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net", model=Odd())
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), module(x))
    assert loaded.paired[1] == "x"


def test_modes_frozen_weights_and_types_come_back(tmp_path):
    module = build("digits-cnn").to(torch.bfloat16)
    module.head.weight.requires_grad_(False)
    module.stages[1].eval()
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert not loaded.head.weight.requires_grad
    assert loaded.head.bias.requires_grad
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    modes = {path: part.training for path, part in module.named_modules()}
    assert {path: part.training for path, part in loaded.named_modules()} == modes
    assert description(tmp_path / "net")["dtypes"] == ["bfloat16", "int64"]


def test_attributes_that_the_user_changed_come_back(tmp_path):
    module = entry("bert")[0]
    module.dropout.p = 0.3
    module.config.id2label = {0: "no", 1: "yes"}
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert loaded.dropout.p == 0.3
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.bert.config is loaded.config


@pytest.mark.parametrize("change", ["module", "function"])
def test_what_was_changed_beyond_repair_asks_for_the_model(change, tmp_path):
    module = entry("bert")[0]
    layer = module.bert.encoder.layer[0]
    if change == "module":
        layer.output.dense = nn.Sequential(layer.output.dense)
    else:
        layer.forward = lambda *args, **kwargs: args[0]
    supple.save(module, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"changed since it was built: .*layer\.0"):
        supple.load(tmp_path / "net")


def test_attention_kernels_come_back(tmp_path):
    model, _, kwargs = entry("llama")
    model.set_attn_implementation("eager")
    supple.save(model, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert loaded.config._attn_implementation == "eager"
    assert same(outputs(model, (), kwargs), outputs(loaded, (), kwargs))


def test_an_extracted_network_may_be_extracted_from_again(tmp_path):
    net = network("llama")
    first = extracted(net, {**net.space.smallest(), "model.layers.depth": 2})
    second_net = elastic(first, net.args, net.kwargs, verify=False)
    second = extracted(second_net, second_net.space.smallest())
    supple.save(second, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert [s["step"] for s in loaded.supple_provenance["steps"]] == ["extract", "extract"]
    assert same(outputs(second, net.args, net.kwargs), outputs(loaded, net.args, net.kwargs))
    supple.save(loaded, tmp_path / "again")
    again = supple.load(tmp_path / "again")
    assert same(outputs(second, net.args, net.kwargs), outputs(again, net.args, net.kwargs))


def test_a_smaller_resolution_comes_back(tmp_path):
    model, args, kwargs = entry("cifar-resnet")
    net = elastic(model, args, kwargs, [Width(), Resolution((16, 32))], verify=False)
    module = extracted(net, net.space.smallest())
    supple.save(module, tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert same(outputs(module, args, kwargs), outputs(loaded, args, kwargs))


# --- elastic networks ---------------------------------------------------------------------


def test_an_elastic_network_comes_back_whole(tmp_path):
    model, args, kwargs = entry("digits-cnn")
    axes = [Width((0.5, 1.0), divisor=2), Depth(pattern="any")]
    net = elastic(model, args, kwargs, axes, verify=False)
    net.remove_sites({net.space.sites[0].name: "it failed its test"})
    net.sort()
    config = net.space.smallest()
    small = extracted(net, config)
    running = {n: torch.randn_like(b).abs() for n, b in small.named_buffers() if "running" in n}
    net.statistics[config] = running
    net.verified = True
    net.save(tmp_path / "net")

    loaded = supple.load(tmp_path / "net")
    assert isinstance(loaded, Elastic)
    assert loaded.space == net.space
    assert loaded.space.fixed == net.space.fixed
    assert loaded.axes == net.axes
    assert loaded.verified
    assert torch.equal(loaded.args[0], args[0])
    assert list(loaded.statistics) == [config]
    assert all(torch.equal(loaded.statistics[config][n], t) for n, t in running.items())
    for size in (net.space.largest(), config):
        with net.at(size), loaded.at(size):
            assert same(outputs(net, args, {}), outputs(loaded, args, {}))
    one, two = net.extract(config), loaded.extract(config)
    assert same(outputs(one, args, {}), outputs(two, args, {}))


def test_nested_example_inputs_come_back(tmp_path):
    model, _, kwargs = entry("llama")
    net = elastic(model, (), {**kwargs, "use_cache": False}, [Heads()], verify=False)
    net.save(tmp_path / "net")
    loaded = supple.load(tmp_path / "net")
    assert loaded.kwargs["use_cache"] is False
    assert torch.equal(loaded.kwargs["input_ids"], kwargs["input_ids"])


def test_inputs_that_no_file_can_hold_are_refused(tmp_path):
    net = elastic(*entry("digits-cnn"), verify=False)
    net.kwargs["odd"] = object()
    with pytest.raises(SettingError, match=r"can't be saved \(JSON can't hold a .*object\)"):
        net.save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_network_whose_size_is_active_is_not_saved(tmp_path):
    net = network("digits-cnn")
    with net.at(net.space.smallest()), pytest.raises(ConcurrencyError, match="leave its block"):
        net.save(tmp_path / "net")


def test_other_sites_than_saved_are_refused(tmp_path):
    net = elastic(*entry("digits-cnn"), [Width()], verify=False)
    net.save(tmp_path / "net")
    saved = description(tmp_path / "net")["elastic"]
    saved["space"]["sites"][0]["choices"] = [1, saved["space"]["sites"][0]["full"]]
    rewrite(tmp_path / "net", elastic=saved)
    with pytest.raises(CheckpointError, match="finds other sites"):
        supple.load(tmp_path / "net")


# --- axes of the user's own ---------------------------------------------------------------


@dataclass(frozen=True)
class Gate(Axis):
    """Puts another activation in place of a module."""

    path: str
    name = "gate"

    def sites(self, graph):
        return [Site(f"{self.path}.gate", self.name, (0, 1), 1)]

    def patch(self, site, choice):
        return Patch(modules={self.path: nn.Tanh()}) if choice == 0 else Patch()


def gated():
    model = make(16)
    return elastic(model, torch.randn(2, 5), axes=[Width(), Gate("1")], verify=False)


def test_axes_of_the_users_own_are_asked_for(tmp_path):
    net = gated()
    net.save(tmp_path / "net")
    structure = make(16)
    with pytest.raises(CheckpointError, match=r"axis 'gate' is not one of .* axes=\[\.\.\.\]"):
        supple.load(tmp_path / "net", model=structure)
    loaded = supple.load(tmp_path / "net", model=structure, axes=[Gate("1")])
    config = net.space.smallest()
    with net.at(config), loaded.at(config):
        assert same(outputs(net, net.args, {}), outputs(loaded, net.args, {}))


def test_networks_made_with_ones_own_axes_need_them_or_their_structure(tmp_path):
    net = gated()
    module = net.extract(net.space.smallest()).eval()
    assert isinstance(module[1], nn.Tanh)
    supple.save(module, tmp_path / "net")
    base = make(16)
    expected = outputs(module, net.args, {})
    by_axis = supple.load(tmp_path / "net", model=base, axes=[Gate("1")])
    assert same(expected, outputs(by_axis, net.args, {}))
    by_structure = supple.load(tmp_path / "net", model=module)
    assert same(expected, outputs(by_structure, net.args, {}))
    with pytest.raises(CheckpointError, match="the model given is another network"):
        supple.load(tmp_path / "net", model=base)


# --- damage -------------------------------------------------------------------------------


def everything(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_json_and_safetensors_are_written(tmp_path):
    network("digits-cnn").save(tmp_path / "net")
    expected = ["inputs.safetensors", "supple.json", "weights.safetensors"]
    assert everything(tmp_path / "net") == expected


@pytest.mark.parametrize("place", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize(
    "name", ["supple.json", "weights.safetensors", "buffers.safetensors", "inputs.safetensors"]
)
def test_a_flipped_byte_is_named(tmp_path, name, place):
    elastic(*entry("bert"), [Heads()], verify=False).save(tmp_path / "net")
    path = tmp_path / "net" / name
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        supple.load(tmp_path / "net")


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove"])
@pytest.mark.parametrize("name", ["supple.json", "weights.safetensors", "buffers.safetensors"])
def test_a_truncated_or_missing_file_is_named(saved, name, harm):
    path = saved / name
    if harm == "remove":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 if harm == "truncate" else 0])
    with pytest.raises(CheckpointError, match=str(path)):
        supple.load(saved)


def test_a_file_of_another_network_is_named(tmp_path):
    for name in ("one", "two"):
        supple.save(build("digits-cnn"), tmp_path / name)
    stranger = (tmp_path / "two" / "weights.safetensors").read_bytes()
    (tmp_path / "one" / "weights.safetensors").write_bytes(stranger)
    with pytest.raises(CheckpointError, match=r"one/weights\.safetensors doesn't match"):
        supple.load(tmp_path / "one")


def test_a_newer_file_says_what_to_do(saved):
    rewrite(saved, schema=storage.SCHEMA + 1)
    with pytest.raises(CheckpointError, match=r"supple\.json .*newer.* install"):
        supple.load(saved)


def test_a_description_that_lacks_something_is_named(saved):
    rewrite(saved, frozen=None)
    with pytest.raises(CheckpointError, match=r"supple\.json does not fit"):
        supple.load(saved)


def test_files_elsewhere_are_not_read(saved):
    (saved.parent / "other.safetensors").write_bytes(b"")
    rewrite(saved, files={"../other.safetensors": files.checksum(b"")})
    with pytest.raises(CheckpointError, match="of another folder"):
        supple.load(saved)


def test_the_wrong_model_is_refused_by_the_first_tensor(saved):
    other = build("digits-cnn")
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'bert\.embeddings.*is not in it"):
        supple.load(saved, model=other)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


def test_a_model_of_other_sizes_is_refused(tmp_path):
    supple.save(build("digits-cnn"), tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"has shape \(18, 1, 3, 3\), in the file"):
        supple.load(tmp_path / "net", model=build("digits-cnn", widths=(18, 32, 48)))


# --- folders ------------------------------------------------------------------------------


def test_our_own_folder_is_replaced_and_other_peoples_files_kept(saved):
    (saved / "notes.txt").write_text("mine")
    module = build("digits-cnn")
    supple.save(module, saved)
    assert everything(saved) == ["notes.txt", "supple.json", "weights.safetensors"]
    assert type(supple.load(saved)) is type(module)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "net").mkdir()
    supple.save(build("digits-cnn"), tmp_path / "net")
    assert supple.load(tmp_path / "net") is not None


def test_a_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="not a saved network"):
        supple.save(build("digits-cnn"), tmp_path)
    assert everything(tmp_path) == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="is a file"):
        supple.save(build("digits-cnn"), tmp_path / "thesis.tex")


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_a_save_that_fails_leaves_the_old_network(saved, monkeypatch, when):
    def fail(source, target, *rest):
        if when == "writing" or str(source).endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(source, target, *rest)

    rename = os.rename
    content = (saved / "supple.json").read_bytes()
    if when == "writing":
        monkeypatch.setattr(files, "_flush", lambda path: fail(path, path))
    else:
        monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match=r"can't write .*No space left"):
        supple.save(build("digits-cnn"), saved)
    monkeypatch.undo()
    assert (saved / "supple.json").read_bytes() == content
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    supple.load(saved)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "net"
    with pytest.raises(CheckpointError, match=f"can't write {target}"):
        supple.save(build("digits-cnn"), target)


def test_a_folder_without_a_network_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file .*supple\.json; give the folder"):
        supple.load(tmp_path)


def test_what_a_killed_process_left_is_pointed_at(saved):
    os.rename(saved, saved.with_name(".saved.0123.old"))
    with pytest.raises(CheckpointError, match=r"is in .*\.saved\.0123\.old: rename that"):
        supple.load(saved)


def test_a_network_without_values_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="on the meta device"):
        supple.save(build("digits-cnn").to("meta"), tmp_path / "net")
    assert everything(tmp_path) == []


# --- nothing is run -----------------------------------------------------------------------


def make(width):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def test_code_is_run_only_where_that_was_allowed(tmp_path, monkeypatch):
    module = make(16).eval()
    module.supple_origin = {"key": "networks_of_mine:make", "settings": {"width": 16}}
    supple.save(module, tmp_path / "net")
    (tmp_path / "networks_of_mine.py").write_text(
        "from torch import nn\n"
        "def make(width):\n"
        "    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=r"networks_of_mine:make.*allow_code=True"):
        supple.load(tmp_path / "net")
    loaded = supple.load(tmp_path / "net", allow_code=True)
    x = torch.randn(2, 5)
    assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize(
    "name", ["os", "pipeline", "AutoModelForCausalLM", "LlamaConfig", "no.such", "Nothing"]
)
def test_only_model_classes_of_transformers_are_built(tmp_path, name):
    supple.save(entry("bert")[0], tmp_path / "net")
    provenance = description(tmp_path / "net")["provenance"]
    provenance["base"]["origin"]["transformers"] = name
    rewrite(tmp_path / "net", provenance=provenance)
    with pytest.raises(CheckpointError, match=f"has no model '{name}'"):
        supple.load(tmp_path / "net")


def test_kernels_from_elsewhere_are_not_fetched(tmp_path):
    supple.save(entry("bert")[0], tmp_path / "net")
    provenance = description(tmp_path / "net")["provenance"]
    provenance["base"]["origin"]["attention"] = {"": "somebody/kernel"}
    rewrite(tmp_path / "net", provenance=provenance)
    with pytest.raises(CheckpointError, match="may fetch code"):
        supple.load(tmp_path / "net")


def test_configurations_cannot_smuggle_settings_that_fetch(tmp_path):
    origin = rebuild.provenance_of(entry("bert")[0])["base"]["origin"]
    origin["config"]["attn_implementation"] = "somebody/kernel"
    origin["config"]["auto_map"] = {"AutoModel": "code.py"}
    built = rebuild.build(origin)
    assert built.config._attn_implementation == "sdpa"
    assert not hasattr(built.config, "auto_map")


# --- provenance ---------------------------------------------------------------------------


def test_models_carry_what_they_were_built_from():
    model = build("models/digits-cnn", classes=7, widths=(8, 16, 24))
    note = {"key": "digits-cnn", "settings": {"classes": 7, "widths": [8, 16, 24]}}
    assert model.supple_origin == note
    model = build("cifar-resnet", depth=8, weights=None)
    assert model.supple_origin["settings"] == {"depth": 8}  # weights are not structure


def test_extraction_notes_where_a_network_comes_from(saved):
    net = network("bert")
    module = extracted(net, net.space.random(1))
    provenance = module.supple_provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["base"]["class"].endswith("BertForSequenceClassification")
    (step,) = provenance["steps"]
    assert step["config"] == dict(net.space.random(1))
    assert description(saved)["provenance"] == provenance
    assert supple.load(saved).supple_provenance == provenance
    assert not hasattr(net.module, "supple_provenance")


def test_transforms_add_themselves(tmp_path):
    from supple.supernet.sortednet import SortedNet

    net = network("digits-cnn")
    module = extracted(net, net.space.smallest())
    result = rebuild.note_transform(module, extracted(net, net.space.smallest()), SortedNet())
    steps = result.supple_provenance["steps"]
    assert [step["step"] for step in steps] == ["extract", "technique"]
    assert steps[1]["key"] == "supernet/sortednet"
    assert len(module.supple_provenance["steps"]) == 1
    supple.save(result, tmp_path / "net")
    assert supple.load(tmp_path / "net").supple_provenance["steps"] == steps


# --- configurations of transformers -------------------------------------------------------


AUTO = {
    "llama": "AutoModelForCausalLM",
    "llama_tied": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
}


def uniform(net, fraction):
    """A config whose choices are alike at all sites of a kind."""
    return {s.name: s.choices[int(fraction * (len(s.choices) - 1))] for s in net.space.sites}


@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("name", AUTO)
def test_uniform_sizes_go_through_save_pretrained(name, fraction, tmp_path):
    import transformers

    net = network(name)
    module = extracted(net, uniform(net, fraction))
    expected = outputs(module, net.args, net.kwargs)
    module.save_pretrained(tmp_path / "hf")
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "hf").eval()
    assert type(loaded) is type(module)
    assert same(expected, outputs(loaded, net.args, net.kwargs))
    supple.save(module, tmp_path / "net")
    again = supple.load(tmp_path / "net")
    assert again.config.to_dict() == module.config.to_dict()
    assert same(expected, outputs(again, net.args, net.kwargs))


def test_the_settings_that_were_found_are_the_sizes():
    module = extracted(network("llama"), network("llama").space.smallest())
    config = storage.uniform_config(module)
    found = {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "vocab_size": 97,
    }
    assert {name: getattr(config, name) for name in found} == found
    assert module.config.to_dict() == config.to_dict()
    assert network("llama").module.config.hidden_size == 48


def test_head_counts_that_no_shape_tells_are_found():
    net = network("bert")
    module = extracted(net, uniform(net, 0.5))
    heads = module.bert.encoder.layer[0].attention.self.query.out_features // 12
    assert storage.uniform_config(module).num_attention_heads == heads < 4


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_what_is_not_uniform_is_named(name):
    net = network(name)
    ffn = [s for s in net.space.sites if s.axis == "width" and s.full == 80]
    module = extracted(net, {ffn[1].name: ffn[1].choices[0]})
    with pytest.raises(UnsupportedModelError) as error:
        storage.uniform_config(module)
    size, full = ffn[1].choices[0], ffn[1].full
    assert f"intermediate_size would have to be {size} for" in str(error.value)
    assert f"and {full} for" in str(error.value)
    assert module.config.intermediate_size == full


def test_a_configuration_that_computes_something_else_is_not_offered():
    net = network("t5")  # scales its tied output by the width, which extraction keeps
    module = extracted(net, uniform(net, 0.0))
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        storage.uniform_config(module)
    assert module.config.d_model == 48


def test_networks_of_others_have_no_configuration():
    with pytest.raises(UnsupportedModelError, match="no configuration describes it"):
        storage.uniform_config(build("digits-cnn"))


def test_extraction_still_shares_nothing_and_leaves_the_global_generator_alone():
    net = network("bert")
    before = torch.random.get_rng_state()
    module = extracted(net, net.space.smallest())
    assert torch.equal(torch.random.get_rng_state(), before)
    mine = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    owners = {t.data_ptr() for t in (*net.module.parameters(), *net.module.buffers())}
    assert not mine & owners
    assert module.config is not net.module.config
    plain = Plan(net.graph, net.patch(net.space.smallest())).extracted(None).eval()
    assert same(outputs(module, net.args, net.kwargs), outputs(plain, net.args, net.kwargs))


def test_the_folder_may_be_given_as_text(tmp_path):
    supple.save(build("digits-cnn"), str(tmp_path / "net"))
    assert isinstance(supple.load(str(tmp_path / "net")), nn.Module)
    assert Path(tmp_path / "net" / "weights.safetensors").is_file()
