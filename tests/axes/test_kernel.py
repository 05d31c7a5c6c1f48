"""Elastic kernels: centres of larger ones, and learned transforms of these."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import supple
from supple import files
from supple.axes.depth import Depth
from supple.axes.kernel import Kernel
from supple.axes.width import Width
from supple.cost.count import count
from supple.errors import CheckpointError, SettingError, SuppleWarning
from supple.network import Elastic, elastic
from supple.recipe.axes import axes_of
from supple.space import Space
from supple.supernet.base import SupernetRule
from supple.training.step import Sampler, WholeOnly
from tests.graph.checks import assert_active_equals_extracted, assert_untouched, shake, state_of
from tests.zoo import ZOO

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
RUN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def by_hand(weight: Tensor, sizes: list[int], matrices: list[Tensor] | None) -> Tensor:
    """The smaller kernel in the middle of zeros, of the full kernel's shape.

    A full convolution with it is the smaller one, with no padding or slicing to get wrong.
    """
    full, dims = weight.shape[2], weight.dim() - 2
    kernel, size = weight, full
    for step, smaller in enumerate(sizes):
        edge = (size - smaller) // 2
        places = list(itertools.product(range(edge, edge + smaller), repeat=dims))
        taken = torch.stack([kernel[(slice(None), slice(None), *p)] for p in places], -1)
        if matrices is not None:
            taken = torch.einsum("oik,jk->oij", taken, matrices[step])
        kernel = taken.reshape(*weight.shape[:2], *[smaller] * dims)
        size = smaller
    padded = torch.zeros_like(weight)
    edge = (full - size) // 2
    padded[(slice(None), slice(None), *[slice(edge, edge + size)] * dims)] = kernel
    return padded


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    dims = draw(st.sampled_from((1, 2, 3)))
    return {
        "dims": dims,
        "full": draw(st.sampled_from((3, 5, 7) if dims < 3 else (3, 5))),
        "stride": draw(st.sampled_from((1, 2))),
        "dilation": draw(st.sampled_from((1, 2))),
        "groups": draw(st.sampled_from((1, 2, 4))),
        "same": draw(st.booleans()),
        "transform": draw(st.booleans()),
        "pick": draw(st.integers(0, 2)),
    }


@given(cases())
@settings(max_examples=40, deadline=None)
def test_any_convolution_runs_as_one_with_a_kernel_cropped_by_hand(
    case: dict[str, Any],
) -> None:
    full, dilation, dims = case["full"], case["dilation"], case["dims"]
    same = case["same"] and case["stride"] == 1
    conv = CONV[dims](
        4,
        8,
        full,
        case["stride"],
        "same" if same else dilation * (full // 2),
        dilation,
        case["groups"],
    )
    shake(conv)
    x = torch.randn(2, 4, *[9] * dims, generator=torch.Generator().manual_seed(5))
    net = elastic(conv, x, axes=[Kernel(None, transform=case["transform"])], verify=False)
    shake(conv, seed=3)
    sizes = [size for size in net.space.site("kernel").choices if size < full]
    choice = sizes[case["pick"] % len(sizes)]
    steps = [size for size in reversed(sizes) if size >= choice]
    own = dict(conv.named_parameters())
    matrices = [own[f"supple_weight_to{size}"] for size in steps] if case["transform"] else None
    kernel = by_hand(conv.weight, steps if case["transform"] else [choice], matrices)
    padding = "same" if same else dilation * (full // 2)
    expected = RUN[dims](
        x, kernel, conv.bias, case["stride"], padding, dilation, case["groups"]
    )
    with net.at({"kernel": choice}):
        active = net(x)
    torch.testing.assert_close(active, expected, rtol=1e-4, atol=1e-4)
    small = net.extract({"kernel": choice})
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4)
    assert type(small) is type(conv)
    assert small.kernel_size == (choice,) * dims
    assert [name for name, _ in small.named_parameters()] == ["weight", "bias"]
    # and backwards: the owners get what the kernel by hand sends them
    wanted = [conv.weight, *(matrices or [])]
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    by_reference = torch.autograd.grad((expected * direction).sum(), wanted)
    for one, other in zip(
        torch.autograd.grad((active * direction).sum(), wanted), by_reference, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


class Mixed(nn.Module):
    """What can vary beside what can't."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 5, stride=2, padding=2)
        self.tall = nn.Conv2d(8, 8, (7, 1), padding=(3, 0))
        self.point = nn.Conv2d(8, 8, 1)
        self.even = nn.Conv2d(8, 8, 4, padding=2)
        self.valid = nn.Conv2d(8, 8, 3)
        self.oblong = nn.Conv2d(8, 8, (3, 5), padding=(1, 2))
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.standardised = nn.Conv2d(8, 8, 3, padding=1)
        self.own = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.far = 1
        self.literal = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.valid(self.even(self.point(self.tall(self.stem(x))))).relu()
        x = self.up(self.circular(self.oblong(x)))
        weight = self.standardised.weight
        x = F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), padding=1)
        x = F.conv2d(x, self.own, None, (1, 1), (self.far, self.far), (1, 1), 1).relu()
        x = F.conv2d(x, self.literal, None, 1, 1)
        return self.head(x.mean((2, 3)))


def mixed(**more: Any) -> Elastic:
    x = torch.randn(2, 2, 17, 17, generator=torch.Generator().manual_seed(1))
    return elastic(shake(Mixed()).eval(), x, axes=[Kernel(None, **more)])


def test_what_keeps_its_size_is_a_site_and_everything_else_says_why() -> None:
    net = mixed()
    assert {site.name: site.choices for site in net.space.sites} == {
        "own.kernel": (1, 3),
        "stem.kernel": (1, 3, 5),
        "tall.kernel": (1, 3, 5, 7),
    }
    assert {site.axis for site in net.space.sites} == {"kernel"}
    reasons = {one.name: one.reason for one in net.space.fixed}
    for place, part in {
        "even.weight[2, 3]": "4, is even",
        "valid.weight[2, 3]": "its padding, 0, would have to be 1",
        "oblong.weight[2, 3]": "its kernel, 3 x 5, has not one size",
        "circular.weight[2, 3]": "its padding, 0, would have to be 1",
        "up.weight[2, 3]": "a transposed convolution",
        "literal[2, 3]": "which integer given to 'conv2d' is its padding is not clear",
    }.items():
        assert part in reasons[place]
    offered = {"stem.weight[2, 3]", "tall.weight[2]", "own[2, 3]"}
    assert not offered & reasons.keys()
    assert reasons["standardised.weight[2, 3]"] == "the kernel size of a convolution"


@pytest.mark.parametrize("transform", [False, True])
def test_costs_of_kernels_are_those_of_the_extracted_network(transform: bool) -> None:
    net = mixed(transform=transform)
    configs = [net.space.smallest(), *(net.space.random(seed) for seed in range(4))]
    priced = net.costs(configs)
    for row, config in enumerate(configs):
        counted = count(net.extract(config), net.args)
        assert {name: int(values[row]) for name, values in priced.items()} == counted
        assert_active_equals_extracted(net, config)


def test_the_padding_is_patched_and_put_back() -> None:
    net = mixed()
    before = state_of(net.module)
    with net.at({"stem.kernel": 3, "tall.kernel": 1, "own.kernel": 1}):
        assert net.module.stem.padding == (1, 1)
        assert net.module.tall.padding == (0, 0)
        assert net.module.far == 0
        assert net.module.stem.weight.shape == (8, 2, 3, 3)
        assert dict(net.module.named_parameters())["stem.weight"].shape == (8, 2, 5, 5)
    assert_untouched(net.module, before)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.filter(x)).relu()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def blocks(*, transform: bool = True, seed: int = 0) -> Elastic:
    x = torch.randn(4, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    axes = [Kernel(transform=transform, where="blocks.*"), Width((0.5,)), Depth()]
    return elastic(shake(Blocks(), seed), x, axes=axes)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(6, 1, 7, 7, generator=source),
            torch.randint(3, (6,), generator=source),
        )
        for _ in range(count)
    ]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


@dataclass(frozen=True, kw_only=True)
class Random(SupernetRule):
    """One random size per step, from labels."""


@dataclass(frozen=True, kw_only=True)
class Only(SupernetRule):
    """Always the same size: the one with these kernels."""

    kernels: tuple[tuple[str, int], ...]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return WholeOnly(space.config(dict(self.kernels)))


def test_kernels_combine_with_width_and_depth_and_vanish_with_their_block() -> None:
    net = blocks()
    assert [site.name for site in net.space.sites if site.axis == "kernel"] == [
        f"blocks.{i}.filter.kernel" for i in range(3)
    ]
    assert "blocks.2.filter.kernel" not in net.space.config({"blocks.depth": 2})
    for name, parameter in net.added_parameters().items():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
        assert name.endswith("filter.supple_weight_to3")
    assert net.verify(4).ok
    for seed in range(4):
        config = net.space.random(seed)
        assert_active_equals_extracted(net, config)
        params = net.costs(config)["params"][0]
        with pytest.warns(SuppleWarning):
            small = net.extract(config)
        assert params == sum(p.numel() for p in small.parameters())


def test_sorting_channels_leaves_the_full_network_and_the_matrices() -> None:
    net = blocks()
    net.eval()
    before, matrices = net(*net.args), {n: p.clone() for n, p in net.added_parameters().items()}
    net.sort()
    torch.testing.assert_close(net(*net.args), before)
    assert all(torch.equal(p, matrices[n]) for n, p in net.added_parameters().items())


def test_matrices_start_as_the_identity_and_are_trained() -> None:
    net, plain = blocks(), blocks(transform=False)
    for name, matrix in net.added_parameters().items():
        assert torch.equal(matrix, torch.eye(9))
        assert any(matrix is one for one in net.module.parameters()), name
    config = {f"blocks.{i}.filter.kernel": 3 for i in range(3)}
    with net.at(config), plain.at(config):
        torch.testing.assert_close(net(*net.args), plain(*plain.args))
    supple.train(net, batches(), loss, method=Random(), lr=0.05, steps=6, progress=False)
    for matrix in net.added_parameters().values():
        assert (matrix - torch.eye(9)).abs().max() > 1e-3


def test_a_resumed_run_ends_with_the_same_matrices(tmp_path: Any) -> None:
    settings_: dict[str, Any] = {"method": Random(), "lr": 0.05, "steps": 6, "progress": False}
    whole, parted = blocks(), blocks()
    supple.train(whole, batches(), loss, **settings_)
    seen: list[int] = []

    def killed(output: Tensor, batch: Any) -> Tensor:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss(output, batch)

    where = {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        supple.train(parted, batches(), killed, **settings_, **where)
    anew = blocks(seed=9)
    supple.train(anew, batches(), loss, **settings_, **where)
    assert len(whole.added_parameters()) == 3
    for (name, one), other in zip(
        whole.module.named_parameters(), anew.module.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_files_hold_the_matrices_and_extracted_networks_do_not(tmp_path: Any) -> None:
    net = blocks()
    net.eval()
    with torch.no_grad():
        for matrix in net.added_parameters().values():
            matrix.add_(torch.randn(9, 9, generator=torch.Generator().manual_seed(4)))
    config = net.space.config({f"blocks.{i}.filter.kernel": 3 for i in range(3)})
    with net.at(config):
        expected = net(*net.args)
    net.save(tmp_path / "net")
    loaded = supple.load(tmp_path / "net", model=Blocks())
    with loaded.at(config):
        assert torch.equal(loaded(*net.args), expected)
    again = supple.load(tmp_path / "net", model=net.module)
    with again.at(config):
        assert torch.equal(again(*net.args), expected)
    with pytest.warns(SuppleWarning):
        small = net.extract(config)
    torch.testing.assert_close(small(*net.args), expected)
    supple.save(small, tmp_path / "small")
    back = supple.load(tmp_path / "small", model=net.module)
    assert torch.equal(back(*net.args), small(*net.args))
    assert not [name for name in back.state_dict() if "supple" in name]


def test_a_file_with_other_matrices_is_refused(tmp_path: Any) -> None:
    net = blocks()
    net.save(tmp_path / "net")
    description = files.read_json(tmp_path / "net" / "supple.json", checked=False)
    assert "axes.safetensors" in description["files"]
    del description["files"]["axes.safetensors"], description["sha256"], description["schema"]
    files.write_json(tmp_path / "net" / "supple.json", description, schema=1)
    with pytest.raises(CheckpointError, match="adds other parameters"):
        supple.load(tmp_path / "net", model=Blocks())


def test_a_network_made_elastic_again_keeps_its_matrices_and_prices_without_them() -> None:
    net = blocks()
    matrix = net.module.blocks[0].filter.supple_weight_to3
    again = elastic(net.module, net.args, axes=[Kernel(transform=True, where="blocks.*")])
    assert again.module.blocks[0].filter.supple_weight_to3 is matrix
    config = again.space.smallest()
    with pytest.warns(SuppleWarning):
        small = again.extract(config)
    assert again.costs(config)["params"][0] == sum(p.numel() for p in small.parameters())


def test_a_site_that_goes_takes_its_matrices_along() -> None:
    net = blocks()
    net.remove_sites({"blocks.1.filter.kernel": "as a test"})
    assert list(net.added_parameters()) == [
        f"blocks.{i}.filter.supple_weight_to3" for i in (0, 2)
    ]


def test_without_a_transform_the_outer_ring_can_be_frozen() -> None:
    net = blocks(transform=False)
    before = net.module.blocks[0].filter.weight.detach().clone()
    small = Only(kernels=tuple((f"blocks.{i}.filter.kernel", 3) for i in range(3)))
    supple.train(
        net, batches(), loss, method=small, lr=0.1, freeze_inactive=True, progress=False
    )
    moved = net.module.blocks[0].filter.weight.detach() != before
    assert moved[:, :, 1:4, 1:4].all()
    assert int(moved.sum()) == 8 * 9


class Shared(nn.Module):
    """Two convolutions that read one padding, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.b = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.far = 1
        self.one, self.two = (nn.Conv2d(4, 4, 5, padding=2, bias=False) for _ in range(2))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.a, self.b):
            x = F.conv2d(x, weight, None, (1, 1), (self.far, self.far), (1, 1), 1).relu()
        return self.two(self.one(x).relu())


def test_tied_kernels_are_one_site_and_a_shared_padding_is_none() -> None:
    net = elastic(shake(Shared()), torch.randn(2, 4, 7, 7), axes=[Kernel()])
    assert [site.name for site in net.space.sites] == ["one.kernel"]
    with net.at({"one.kernel": 3}):
        assert net.module.one.padding == net.module.two.padding == (1, 1)
    reasons = {one.name: one.reason for one in net.space.fixed}
    assert reasons["a[2, 3]"] == reasons["b[2, 3]"] == "far is the padding of other kernels too"
    small = net.extract({"one.kernel": 3})
    assert small.one.weight is small.two.weight


def test_models_on_the_meta_device_have_kernel_sites_too() -> None:
    with torch.device("meta"):
        model, x = Blocks(), torch.randn(2, 1, 7, 7)
    net = elastic(model, x, axes=[Kernel(transform=True)])
    assert len(net.space.sites) == 3
    assert all(p.is_meta for p in net.added_parameters().values())


@pytest.mark.parametrize("choices", [(), (4,), (0,), (-1,), (3.0,), (True,)])
def test_choices_are_odd_sizes(choices: Any) -> None:
    with pytest.raises(SettingError, match="choices of kernel must"):
        Kernel(choices)


def test_only_chosen_places_vary() -> None:
    net = mixed(where="t*")
    assert [site.name for site in net.space.sites] == ["tall.kernel"]


def test_recipes_know_kernels() -> None:
    [axis] = axes_of({"kernel": {"choices": [3, "5"], "transform": "yes"}})
    assert axis == supple.Kernel((3, 5), transform=True)


SLOW = pytest.mark.slow
FAMILIES = {"r2plus1d": 7, "shufflenet": 3, "resnext": 3}
MORE = {
    "x3d": 7,
    "convnext": 5,
    "mobilenet_v3": 8,
    "yolo_v5": 16,
    "deeplab": 6,
    "diffusion_unet": 14,
}


@pytest.mark.parametrize(
    ("family", "sites"),
    [*FAMILIES.items(), *(pytest.param(*each, marks=SLOW) for each in MORE.items())],
)
def test_kernels_of_real_families_are_verified_and_priced(family: str, sites: int) -> None:
    model, args, kwargs = ZOO[family]()
    net = elastic(model, args, kwargs, axes=[Kernel(None, transform=True)])
    assert len(net.space.sites) == sites
    assert not [one for one in net.space.fixed if "verification failed" in one.reason]
    config = net.space.random(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuppleWarning)
        small = net.extract(config)
    counted = count(small, args, kwargs)
    assert {name: int(values[0]) for name, values in net.costs(config).items()} == counted
