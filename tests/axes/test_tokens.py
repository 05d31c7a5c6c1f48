"""Fewer tokens, larger or smaller patches: run, extracted, priced, saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import supple
from supple.axes.patch_size import PatchSize
from supple.axes.tokens import Tokens
from supple.cost.count import count
from supple.errors import SettingError
from supple.network import Elastic, elastic
from tests.graph.checks import assert_active_equals_extracted, run, shake
from tests.graph.grammar import Attention, Residual, mlp
from tests.zoo import ZOO


class Transformer(nn.Module):
    """A vision transformer on 16 x 16 images in patches of 4."""

    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(
                        nn.Sequential(nn.LayerNorm(width), Attention(width, 3, 4, "split"))
                    ),
                    Residual(mlp(width, 20 + 2 * i)),
                )
                for i in range(blocks)
            )
        )
        self.head = nn.Linear(width, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.blocks(x)[:, 0])


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return shake(Transformer()).eval()


TOKENS = Tokens(("blocks.1", "blocks.2"), choices=(5, 0.5, 1.0))
PATCHES = PatchSize((2, 8), at="embed", positions="position")


@pytest.fixture(params=["tokens", "patches"])
def net(request: pytest.FixtureRequest) -> Elastic:
    axis = {"tokens": TOKENS, "patches": PATCHES}[request.param]
    axes = [axis, supple.Width(), supple.Heads(), supple.Depth(pattern="any")]
    return elastic(model(), (image(),), axes=axes)


def test_no_site_fails_verification(net: Elastic) -> None:
    assert not [f for f in net.space.fixed if "verification" in f.reason]
    assert {"tokens", "patch_size"} & {site.axis for site in net.space.sites}


def test_sizes_are_extracted_and_priced_exactly(net: Elastic) -> None:
    space = net.space
    for config in [space.smallest(), space.largest(), *map(space.random, range(12))]:
        assert_active_equals_extracted(net, config)
        priced = {name: int(values[0]) for name, values in net.costs(config).items()}
        counted = count(net.extract(config), net.args, net.kwargs)
        if any(config.get(s.name) == 1 for s in space.sites if s.axis == "heads"):
            assert priced.pop("activation_bytes") >= counted.pop("activation_bytes")
        assert priced == counted, config.to_json()


def test_files_give_the_extracted_network_back(net: Elastic, tmp_path) -> None:
    for seed in range(4):
        small = net.extract(net.space.random(seed)).eval()
        supple.save(small, tmp_path / str(seed))
        again = supple.load(tmp_path / str(seed), model=Transformer()).eval()
        assert torch.equal(run(again, net.args, {})[0], run(small, net.args, {})[0])


def test_gradients_reach_the_owners(net: Elastic) -> None:
    smallest = {s.name: s.choices[0] for s in net.space.sites if s.axis != "depth"}
    with net.at(smallest):
        net.module(image()).sum().backward()
    assert net.module.embed.weight.grad.abs().sum() > 0


def test_the_tokens_of_the_highest_score_stay_in_order() -> None:
    net = elastic(model(), (image(),), axes=[TOKENS], verify=False)
    module, seen = net.module, []
    module.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(image())
    with net.at({"blocks.1.tokens": 5}):
        module(image())
    full, kept = seen[0], []
    handed = module.blocks[1].forward  # outside of the block it is the module's own again
    assert handed.__func__ is nn.Sequential.forward
    with net.at({"blocks.1.tokens": 5}):
        inner = module.blocks[1][0]
        hook = inner.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        module(image())
        hook.remove()
    assert kept[0].shape[1] == 5
    for row, all_tokens in zip(kept[0], full, strict=True):
        order = all_tokens[1:].norm(dim=-1).topk(4).indices.sort().values + 1
        assert torch.equal(row, all_tokens[[0, *order.tolist()]])


def test_half_of_the_tokens_stay_at_another_length() -> None:
    net = elastic(model(), (image(),), axes=[Tokens("blocks.1", (0.5, 1.0))], verify=False)
    small = net.extract({"blocks.1.tokens": 8})
    x = torch.randn(1, 33, 12)
    assert small.blocks[1](x).shape[1] == round(33 * 8 / 17)


def test_a_site_whose_output_would_shrink_is_fixed() -> None:
    class Dense(Transformer):
        def forward(self, image: Tensor) -> Tensor:
            x = self.embed(image).flatten(2).transpose(1, 2)
            return self.head(self.blocks(x))

    dense = shake(Dense()).eval()
    net = elastic(dense, (image(),), axes=[Tokens("blocks.1"), supple.Width()])
    fixed = {f.name: f.reason for f in net.space.fixed}
    assert "shape" in fixed["blocks.1.tokens"]


def test_a_resized_patch_gives_the_same_token() -> None:
    net = elastic(model(), (image(),), axes=[PATCHES], verify=False)
    large = net.extract({"embed.patch": 8}).embed
    patch = torch.randn(1, 3, 4, 4)
    resized = nn.functional.interpolate(patch, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(large(resized), net.module.embed(patch), atol=1e-4, rtol=1e-4)


def test_a_vision_transformer_of_transformers_has_elastic_patches() -> None:
    module, args, kwargs = ZOO["vit"]()
    axis = PatchSize(
        (3, 12),
        at="vit.embeddings.patch_embeddings.projection",
        positions="vit.embeddings.position_embeddings",
    )
    net = elastic(module, args, kwargs, axes=[axis, supple.Width()])
    assert "patch_size" in {site.axis for site in net.space.sites}
    for seed in range(3):
        assert_active_equals_extracted(net, net.space.random(seed))


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (Tokens("nothing"), "'nothing', which does not run"),
        (Tokens("embed"), "'embed', which takes none"),
        (PatchSize((2,), at="head"), "'head': Linear"),
        (PatchSize((3,), at="embed"), r"16 pixels, got \[3\]"),
        (PatchSize((2,), at="embed", positions="token"), r"'token': \(1, 1, 12\)"),
    ],
)
def test_a_wrong_place_is_named(axis, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        elastic(model(), (image(),), axes=[axis])


@pytest.mark.parametrize("score", ["attention", ""])
def test_an_unknown_score_is_refused(score: str) -> None:
    with pytest.raises(SettingError, match="score must be one of"):
        Tokens("blocks.1", score=score)
