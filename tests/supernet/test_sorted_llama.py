"""Sorted fine-tuning: all depths of one forward, with the shared norm and head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import supple
from supple.cost.count import count
from supple.errors import SettingError
from supple.models.base import build
from supple.network import Elastic
from supple.supernet.sorted_llama import MeanOverDepths, SortedLlama
from supple.training.batches import run_model
from supple.training.depths import WithDepths, prefix_site
from supple.training.step import Pass

SITE = "blocks.depth"
CLASSES = 23


def vit(num_layers: int = 4, axes=None) -> Elastic:
    torch.manual_seed(0)
    model = build(
        "vit", image_size=6, patch_size=3, dim=10, num_layers=num_layers, num_heads=2,
        hidden=11, classes=CLASSES, channels=1,
    )  # fmt: skip
    axes = [supple.Depth()] if axes is None else axes
    return supple.elastic(model, images()[0], axes=axes, verify=False)


def images(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=source)
    return x, torch.randint(CLASSES, (count,), generator=source)


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def by_passes(net: Elastic, depths) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and its gradients, from a forward and backward for each depth."""
    batch, total = images(), 0.0
    for n in depths:
        with net.at({SITE: n}):
            one = loss(net.module(batch[0]), batch) / len(depths)
        one.backward()
        total += float(one.detach())
    found = {name: p.grad.clone() for name, p in net.module.named_parameters()}
    net.module.zero_grad()
    return total, found


def started(method: SortedLlama, net: Elastic, lr: float = 0.1):
    return method.start(net, torch.optim.SGD(net.module.parameters(), lr=lr), loss=loss)


def test_every_depth_read_from_one_forward_is_what_that_size_gives():
    net, batch = vit(), images()
    read = WithDepths(net, prefix_site(net))(net.module, batch)
    for n in (1, 2, 3, 4):
        with net.at({SITE: n}):
            expected = net.module(batch[0])
        torch.testing.assert_close(read.at(n), expected)
    assert not torch.allclose(read.at(2), read.at(3))
    # nothing stays in the blocks
    torch.testing.assert_close(net.module(batch[0]), read.output)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("depths", [None, (2,), (1, 4)])
def test_one_step_follows_the_mean_of_the_depths_gradients(depths, recompute):
    net = vit()
    before = {name: p.detach().clone() for name, p in net.module.named_parameters()}
    trained = (1, 2, 3, 4) if depths is None else sorted({*depths, 4})
    expected, gradients = by_passes(net, trained)
    run = started(SortedLlama(depths=depths, recompute=recompute), net)
    losses = run.step(images())
    assert losses == {"depths": pytest.approx(expected, rel=1e-5)}
    assert run.passes == 1
    for name, p in net.module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradients[name])


def test_blocks_run_once_and_only_what_lies_outside_runs_again():
    net, batch = vit(), images()
    site = prefix_site(net)
    costs = net.costs([net.space.config({SITE: n}) for n in (1, 2, 3, 4)])["macs"]
    block = costs[1] - costs[0]
    outside = costs[0] - block
    assert costs[3] == outside + 4 * block

    class Step(nn.Module):
        def forward(self, x):
            read = WithDepths(net, site)(net.module, (x,))
            return [read.at(n) for n in (1, 2, 3, 4)]

    assert count(Step(), (batch[0],))["macs"] == 4 * outside + 4 * block


@pytest.mark.parametrize(("recompute", "held"), [(False, True), (True, False)])
def test_recomputing_holds_no_depths_logits_until_backward(recompute, held):
    net, batch = vit(), images()
    read = WithDepths(net, prefix_site(net))(net.module, batch)
    shapes: list[tuple[int, ...]] = []
    with saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        MeanOverDepths(loss, None, recompute)(Pass(None, "depths"), read, batch, {})
    assert ((3, CLASSES) in shapes) == held


def test_dropout_outside_the_stack_draws_the_same_again_in_backward():
    model = nn.Sequential(
        nn.Linear(5, 7), Residual(), Residual(), nn.Dropout(0.5), nn.Linear(7, CLASSES)
    )
    x = torch.randn(3, 5)
    net = supple.elastic(model, x, axes=[supple.Depth()], verify=False)
    y = torch.tensor([1, 2, 3])
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        read = WithDepths(net, prefix_site(net))(model.train(), (x, y))
        criterion = MeanOverDepths(loss, None, recompute)
        criterion(Pass(None, "depths"), read, (x, y), {}).backward()
        gradients.append(model[-1].weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*gradients)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)

    def forward(self, x):
        return x + self.inner(x).tanh()


class Checkpointed(Residual):
    reentrant = False

    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=self.reentrant).tanh()

    def __call__(self, x):
        return checkpoint(super().__call__, x, use_reentrant=self.reentrant)


def test_checkpointed_blocks_give_the_same_gradients_and_lossy_ones_are_refused():
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), Residual(), Residual(), nn.Linear(7, CLASSES))
    other = nn.Sequential(
        nn.Linear(5, 7), Checkpointed(), Checkpointed(), nn.Linear(7, CLASSES)
    )
    other.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, other):
        net = supple.elastic(model, x, axes=[supple.Depth()], verify=False)
        run = started(SortedLlama(), net)
        run.step((x, y))
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(*gradients)
    other[1].reentrant = True
    with pytest.raises(SettingError, match="reentrant"):
        run.step((x, y))


def test_sizes_are_ordinary_ones_of_the_elastic_network_afterwards():
    net, batch = vit(), images()
    started(SortedLlama(), net).step(batch)
    net.eval()
    small = net.extract({SITE: 2})
    with net.at({SITE: 2}), torch.no_grad():
        torch.testing.assert_close(net.module(batch[0]), small(batch[0]))
    assert len(small.blocks) == 2


def test_other_axes_stay_full():
    net = vit(axes=[supple.Depth(), supple.Width((0.5, 1.0))])
    expected, _ = by_passes(net, (1, 2, 3, 4))
    assert started(SortedLlama(), net).step(images())["depths"] == pytest.approx(expected)


def test_networks_without_one_stack_of_first_blocks_are_refused():
    x = torch.randn(3, 5)
    net = supple.elastic(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), x, verify=False)
    with pytest.raises(SettingError, match="depth sites are none"):
        started(SortedLlama(), net)
    with pytest.raises(SettingError, match="pattern='prefix'"):
        started(SortedLlama(), vit(axes=[supple.Depth(pattern="even")]))
    with pytest.raises(SettingError, match="where is 'other'"):
        started(SortedLlama(where="other"), vit())
    with pytest.raises(SettingError, match=r"choices of 'blocks\.depth', \(1, 2, 3, 4\)"):
        started(SortedLlama(depths=(2, 5)), vit())


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.first = nn.Sequential(Residual(), Residual())
        self.second = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x)).relu()))


def test_where_names_one_of_several_stacks():
    model = TwoStacks()
    x = torch.randn(3, 5)
    net = supple.elastic(model, x, axes=[supple.Depth()], verify=False)
    with pytest.raises(SettingError, match=r"first\.depth, second\.depth"):
        prefix_site(net)
    site = prefix_site(net, "second.*")
    read = WithDepths(net, site)(model, (x,))
    with net.at({"second.depth": 1}):
        expected = run_model(model, (x,))
    torch.testing.assert_close(read.at(1), expected)


@pytest.mark.parametrize("depths", [(), (1.5,), (-1,)])
def test_settings_are_checked(depths):
    with pytest.raises(SettingError, match="depths"):
        SortedLlama(depths=depths)


@pytest.mark.slow
def test_a_llama_learns_at_all_depths_and_generates_at_each():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.arange(12)[None].repeat(2, 1)
    batch = {"input_ids": ids, "labels": ids}
    net = supple.elastic(model, kwargs=batch, axes=[supple.Depth()], verify=False)
    site = prefix_site(net)
    total = 0.0
    for n in site.choices:
        with net.at({site.name: n}):
            (model(**batch).loss / 3).backward()
            total += float(model(**batch).loss.detach()) / 3
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    run = SortedLlama(recompute=True).start(
        net,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss=lambda output, batch: output.loss,
    )
    assert run.step(batch)["depths"] == pytest.approx(total, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    for _ in range(60):
        run.step(batch)
    model.eval()
    for n in site.choices:
        with net.at({site.name: n}):
            inside = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
        outside = net.extract({site.name: n}).generate(
            ids[:1, :4], max_new_tokens=6, do_sample=False
        )
        assert inside.tolist() == outside.tolist() == [list(range(10))]
