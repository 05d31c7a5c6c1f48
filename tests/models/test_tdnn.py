"""The time-delay network: its groups, its statistics, and how it becomes elastic."""

from __future__ import annotations

import pytest
import torch

import supple
from supple.errors import SettingError
from supple.models.tdnn import AttentiveStatistics, Res2, build

pytestmark = pytest.mark.filterwarnings("ignore:the running statistics of this size")
SMALL = {"features": 7, "channels": 16, "blocks": 2, "scale": 4, "joint": 12, "bottleneck": 5}


def elastic(**settings):
    torch.manual_seed(0)
    model = build(**SMALL, **settings, embedding=6).eval()
    axes = [supple.Kernel((1, 3, 5), transform=True), supple.Depth(joined=True)]
    return supple.elastic(
        model, torch.randn(2, 7, 13), axes=[*axes, supple.Width((0.5, 1.0))], verify=False
    )


def test_groups_are_filtered_with_what_came_out_of_the_one_before():
    res2 = Res2(12, 4, 3, 2).eval()
    x = torch.randn(2, 12, 11)
    a, b, c, d = x.split(3, 1)
    first = res2.filters[0](a)
    second = res2.filters[1](b + first)
    expected = torch.cat([first, second, res2.filters[2](c + second), d], 1)
    torch.testing.assert_close(res2(x), expected)


def test_one_group_is_an_ordinary_filter():
    res2 = Res2(5, 1, 3, 1).eval()
    x = torch.randn(2, 5, 11)
    torch.testing.assert_close(res2(x), res2.filters[0](x))


def test_inner_widths_are_cut_inside_each_group():
    net = elastic()
    site = net.space.site("blocks.0.enter.conv")
    assert (site.choices, site.full) == ((2, 4), 4)  # of each of the four groups
    last = {"blocks.0.res2.filters.2.conv": 2}  # what the last filter makes is read only
    small = net.extract({**net.space.largest(), site.name: 2, **last})
    rows = torch.tensor([0, 1, 4, 5, 8, 9, 12, 13])
    block = net.module.blocks[0]
    assert small.blocks[0].enter.conv.weight.equal(block.enter.conv.weight[rows])
    assert small.blocks[0].leave.conv.weight.equal(block.leave.conv.weight[:, rows])


def test_blocks_left_out_take_their_part_of_each_readers_width_with_them():
    net = elastic()
    small = net.extract({**net.space.largest(), "blocks.depth": 1, "front.conv": 8})
    assert small.join.weight.equal(net.module.join.weight[:, :8])
    whole = net.extract({**net.space.largest(), "front.conv": 8})
    rows = [*range(8), *range(16, 24)]
    assert whole.join.weight.equal(net.module.join.weight[:, rows])


def test_every_size_equals_the_network_cut_out():
    net = elastic(classes=3)
    assert {site.axis for site in net.space.sites} == {"kernel", "depth", "width"}
    assert net.verify(n=2).ok


def test_the_embedding_is_fixed_where_it_is_the_output_and_elastic_before_a_classifier():
    x = torch.randn(2, 7, 13)
    net = elastic()
    assert net.extract(net.space.smallest())(x).shape == (2, 6)
    net = elastic(classes=3)
    cosines, embeddings = net.extract(net.space.smallest())(x)
    assert (cosines.shape, embeddings.shape) == ((2, 3), (2, 3))


def test_attention_that_is_even_gives_mean_and_deviation():
    pool = AttentiveStatistics(3, 2)
    torch.nn.init.zeros_(pool.expand.weight)
    x = torch.randn(2, 3, 11)
    expected = torch.cat([x.mean(2), x.std(2, correction=0)], 1)
    torch.testing.assert_close(pool(x), expected)


def test_speakers_are_cosines_to_directions():
    model = build(**SMALL, embedding=6, classes=4).eval()
    cosines, embeddings = model(torch.randn(3, 7, 13))
    for n, j in ((0, 0), (2, 3)):
        a, b = embeddings[n], model.directions[j]
        torch.testing.assert_close(cosines[n, j], a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(
    "settings", [{"inner": 6}, {"kernel": 4}, {"classes": -1}, {"channels": 0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        build(**{**SMALL, **settings})
