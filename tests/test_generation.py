"""Generation with a cache gives what generation without one gives, at every size.

Done in float64 where the model has kernels for it: what a cache changes is the order of sums,
and no more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supple.axes.depth import Depth
from supple.network import Elastic, elastic
from supple.plan import Plan
from supple.storage import load, save
from tests.graph.checks import shake
from tests.zoo import ZOO
from tests.zoo.base import Entry, tokens
from tests.zoo.decoders import decoder_sizes

NEW = 6
Generated = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """Without its advice on flags and on kernels that are not installed."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        yield
    logging.set_verbosity(verbosity)


def gemma2() -> Entry:
    """Layers that attend to all and to four tokens take turns."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {**decoder_sizes(), "num_hidden_layers": 4}
    config = Gemma2Config(**sizes, head_dim=10, sliding_window=4)
    return Gemma2ForCausalLM(config), (), {"input_ids": tokens()}


def lfm2() -> Entry:
    """Layers that convolve and layers that attend, numbered in different places."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    kinds = ["conv", "full_attention", "conv", "full_attention"]
    sizes = {**decoder_sizes(), "num_hidden_layers": 4}
    return Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=kinds)), (), {"input_ids": tokens()}


def jamba() -> Entry:
    """Which layers attend is computed by the configuration, whenever it is asked."""
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        **{**decoder_sizes(), "num_hidden_layers": 4},
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=3,
        mamba_d_state=4,
        mamba_dt_rank=5,
    )
    return JambaForCausalLM(config), (), {"input_ids": tokens()}


OWN: dict[str, Callable[[], Entry]] = {"gemma2": gemma2, "lfm2": lfm2, "jamba": jamba}
SINGLE = ("jamba", "mixtral")  # the product of grouped matrices has no float64 kernel


def language_net(name: str, *axes: Any) -> Elastic:
    if name in OWN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs = OWN[name]()
    else:
        model, args, kwargs = ZOO[name]()
    model = shake(model.eval())
    if name not in SINGLE:
        kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
        model = model.double()
    return elastic(model, args, kwargs, axes=list(axes) or None, verify=False)


def generated(
    model: nn.Module, kwargs: Mapping[str, Any], cached: bool, **how: Any
) -> Generated:
    """New tokens of every sequence, and the scores of every step."""
    if "input_features" in kwargs:
        inputs = {"input_features": kwargs["input_features"]}
    else:
        prompt = kwargs["input_ids"][:, :5]
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        no_repeat_ngram_size=1,  # a small random network would say one word all the time
        use_cache=cached,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    return output.sequences[:, -NEW:], torch.stack(output.scores)


def assert_same_words(left: Generated, right: Generated, what: str) -> None:
    assert torch.equal(left[0], right[0]), what
    finite = left[1].isfinite()
    near = 1e-6 if left[1].dtype is torch.float64 else 1e-4
    assert torch.equal(finite, right[1].isfinite()), what
    torch.testing.assert_close(
        left[1][finite], right[1][finite], rtol=near, atol=near, msg=lambda m: f"{what}: {m}"
    )


def check_size(net: Elastic, config: Mapping[str, int], **how: Any) -> Generated:
    """Active and extracted, with a cache and without, say the same; gives what they say."""
    plain = {key: value for key, value in how.items() if key != "cache_implementation"}
    with net.at(config):
        uncached = generated(net.module, net.kwargs, False, **plain)
        cached = generated(net.module, net.kwargs, True, **how)
    small = net.extract(config)
    assert_same_words(cached, uncached, f"active with a cache at {config}")
    assert uncached[0][0].unique().numel() > NEW // 2, "it says nothing that could differ"
    for use, settings in ((True, how), (False, plain)):
        alone = generated(small, net.kwargs, use, **settings)
        assert_same_words(alone, uncached, f"extracted, cache {use}, at {config}")
    return uncached


FAMILIES = {"llama": 3, "gpt2": 3, "t5": 4}
MORE = {
    "whisper": 5,
    "mixtral": 3,
    "gemma": 3,
    "gemma2": 4,
    "qwen2": 3,
    "opt": 3,
    "mamba": 3,
    "lfm2": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_skipped_block_generates_alike_with_and_without_a_cache(
    family: str,
) -> None:
    net = language_net(family, Depth(pattern="any"))
    assert len(net.space.sites) == FAMILIES[family]
    full = generated(net.module, net.kwargs, True)
    for site in net.space.sites:
        skipped = check_size(net, {site.name: 0})
        assert not torch.allclose(skipped[1], full[1]), f"{site.name} changes nothing"
    assert_same_words(generated(net.module, net.kwargs, True), full, "afterwards")


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_skipped_blocks_of_other_decoders_generate_alike(family: str) -> None:
    net = language_net(family, Depth(pattern="any"))
    assert len(net.space.sites) == MORE[family]
    for site in net.space.sites:
        check_size(net, {site.name: 0})


@pytest.mark.parametrize("family", ["gemma2", "lfm2"])
def test_a_cache_with_layers_of_two_kinds_follows_the_blocks_that_stay(family: str) -> None:
    net = language_net(family, Depth(pattern="any"))
    check_size(net, {net.space.sites[0].name: 0})
    check_size(net, {net.space.sites[1].name: 0, net.space.sites[2].name: 0})


def test_blocks_whose_kinds_are_computed_keep_their_place_in_the_cache() -> None:
    net = language_net("jamba", Depth(pattern="any"))
    for site in net.space.sites[1:3]:
        check_size(net, {site.name: 0})


@pytest.mark.parametrize(("family", "how"), [("llama", "static"), ("t5", "beam")])
def test_beams_and_static_caches_generate_alike_at_a_small_size(family: str, how: str) -> None:
    net = language_net(family)
    settings = {"beam": {"num_beams": 3}, "static": {"cache_implementation": "static"}}
    check_size(net, net.space.random(2), **settings[how])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "whisper"])
@pytest.mark.parametrize("how", ["beam", "static"])
def test_beams_and_static_caches_with_every_single_skipped_block(family: str, how: str) -> None:
    net = language_net(family, Depth(pattern="any"))
    settings = {"beam": {"num_beams": 3}, "static": {"cache_implementation": "static"}}
    for site in net.space.sites:
        check_size(net, {site.name: 0}, **settings[how])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_random_sizes_generate_alike_with_and_without_a_cache(family: str) -> None:
    net = language_net(family)
    assert {site.axis for site in net.space.sites} == {"width", "heads", "depth"}
    full = generated(net.module, net.kwargs, True)
    assert not torch.equal(check_size(net, net.space.random(2))[0], full[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "gemma2", "whisper"])
def test_many_random_sizes_generate_alike_with_and_without_a_cache(family: str) -> None:
    net = language_net(family)
    for seed in range(12):
        check_size(net, net.space.random(seed))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_depth_of_a_prefix_generates_alike(family: str) -> None:
    net = language_net(family, Depth())
    for site in net.space.sites:
        for choice in site.choices[:-1]:
            check_size(net, {site.name: choice})


def test_with_blocks_that_keep_their_numbers_the_comparison_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests above can fail."""
    net = language_net("llama", Depth(pattern="any"))
    monkeypatch.setattr(Plan, "_renumbered", lambda *_: iter(()))
    for site in net.space.sites[:-1]:
        with pytest.raises((AssertionError, IndexError)):
            check_size(net, {site.name: 0})


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "whisper"])
def test_a_saved_size_generates_as_before(family: str, tmp_path: Any) -> None:
    net = language_net(family, Depth(pattern="any"))
    small = net.extract({net.space.sites[-1].name: 0})
    said = generated(small, net.kwargs, True)
    save(small, tmp_path / "small")
    assert_same_words(generated(load(tmp_path / "small"), net.kwargs, True), said, "loaded")


@pytest.mark.parametrize(
    ("family", "count", "container"),
    [
        ("llama", "num_hidden_layers", "model.layers"),
        ("gpt2", "n_layer", "transformer.h"),
        ("whisper", "decoder_layers", "model.decoder.layers"),
        ("gemma2", "num_hidden_layers", "model.layers"),
    ],
)
def test_the_configuration_counts_the_blocks_that_run(
    family: str, count: str, container: str
) -> None:
    net = language_net(family, Depth(where=container))
    full = len(net.module.get_submodule(container))
    config = {f"{container}.depth": 1}
    limits = net.module.generation_config.to_dict()
    with net.at(config):
        assert getattr(net.module.config, count) == 1
        assert net.module.generation_config.to_dict() == limits
    assert getattr(net.module.config, count) == full
    small = net.extract(config)
    assert (getattr(small.config, count), getattr(net.module.config, count)) == (1, full)
    assert small.generation_config.to_dict() == limits
    small.config.validate()


def test_a_count_is_not_less_than_the_blocks_of_another_stack_of_that_name() -> None:
    """T5 lays out the decoder's cache by `num_layers`, which counts the encoder's blocks."""
    net = language_net("t5", Depth())
    with net.at({"encoder.block.depth": 0}):
        assert net.module.config.num_layers == 3
        assert net.module.config.num_decoder_layers == 3
    with net.at({"decoder.block.depth": 0}):
        assert net.module.config.num_decoder_layers == 1
        assert net.module.config.num_layers == 3
    with net.at({"encoder.block.depth": 1, "decoder.block.depth": 0}):
        assert net.module.config.num_layers == 2
