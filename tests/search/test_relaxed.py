"""Differentiable search: mixtures, the weights they run with, and the bilevel step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import (
    CheckpointError,
    ConcurrencyError,
    SettingError,
    UnsupportedModelError,
)
from supple.layers.choice import Choice
from supple.search._alphas import Alphas, Dirichlet, Gumbel, Sigmoid, Softmax
from supple.search._relaxed import (
    Halves,
    OutputMixture,
    RelaxedSearch,
    buffers_kept,
    halves,
)
from supple.testing import rules
from supple.testing.toys import global_random_untouched
from supple.training.schedule import Cosine
from supple.training.step import StepOptions

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
TRAIN, VALIDATION = (X[:3], Y[:3]), (X[3:], Y[3:])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


@pytest.fixture
def net():
    return RelaxedSearch.toy()


def source(seed=3):
    return torch.Generator().manual_seed(seed)


def sgd(net, **settings):
    return torch.optim.SGD(net.module.parameters(), lr=0.1, **settings)


def started(net, method=None, optimizer=None, **more):
    method = method or RelaxedSearch()
    return method.start(net, optimizer or sgd(net), loss=loss, generator=source(), **more)


def weights_of(net, *vectors):
    names = [site.name for site in OutputMixture().sites(net)]
    return dict(zip(names, map(torch.tensor, vectors), strict=True))


# ---------------------------------------------------------------------------------- mixtures


def by_hand(module, x, first, second):
    stem, one, relu, two, head = module
    x = stem(x)
    x = relu(first[0] * one.options[0](x) + first[1] * one.options[1](x))
    return head(second[0] * two.options[0](x) + second[1] * two.options[1](x))


def test_a_mixture_adds_up_the_options_outputs_and_leaves_nothing(net):
    whole = net.module(X)
    weights = weights_of(net, [0.25, 0.75], [0.5, 0.5])
    expected = by_hand(net.module, X, *weights.values())
    with OutputMixture().applied(net, weights):
        mixed = net.module(X)
    torch.testing.assert_close(mixed, expected)
    assert torch.equal(net.module(X), whole)
    assert not [name for m in net.module.modules() for name in vars(m) if name == "forward"]


def test_one_hot_weights_run_what_is_extracted(net):
    config = net.space.config({"1": 0, "3": 1})
    with OutputMixture().applied(net, weights_of(net, [1.0, 0.0], [0.0, 1.0])):
        mixed = net.module(X)
    torch.testing.assert_close(mixed, net.extract(config)(X))


def test_gradients_reach_weights_and_owners_after_the_block(net):
    weights = weights_of(net, [0.25, 0.75], [0.5, 0.5])
    for each in weights.values():
        each.requires_grad_()
    with OutputMixture().applied(net, weights):
        mixed = net.module(X)
    mixed.sum().backward()
    found = [each.grad for each in weights.values()]
    again = [each.detach().clone().requires_grad_() for each in weights.values()]
    by_hand(net.module, X, *again).sum().backward()
    for gradient, each in zip(found, again, strict=True):
        torch.testing.assert_close(gradient, each.grad)
    assert net.module[1].options[1].weight.grad is not None


def test_a_site_without_weights_is_full_and_a_zero_weight_runs_nothing(net):
    ran = []
    net.module[1].options[1].forward = lambda x: ran.append("dear") or x
    with OutputMixture().applied(net, {"1": torch.tensor([1.0, 0.0])}):
        net.module(X)
    assert not ran
    with OutputMixture().applied(net, {"1": torch.tensor([1.0, 0.0], requires_grad=True)}):
        net.module(X)
    assert ran == ["dear"]
    with OutputMixture().applied(net, {"1": torch.zeros(2)}):
        stem = net.module[4](net.module[3].options[1](torch.zeros(6, 7)))
        torch.testing.assert_close(net.module(X), stem)


def test_mixtures_nest_and_end_when_the_forward_raises(net):
    outer, inner = weights_of(net, [1.0, 0.0], [1.0, 0.0]), {"1": torch.tensor([0.0, 1.0])}
    mixture = OutputMixture()
    with mixture.applied(net, outer):
        before = net.module(X)
        with pytest.raises(RuntimeError), mixture.applied(net, inner):
            net.module(X[:, :2])
        assert torch.equal(net.module(X), before)


def test_options_with_several_outputs_are_mixed_one_by_one():
    class Pair(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x):
            return {"sum": self.factor * x, "name": "pair"}

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.choice = Choice(Pair(2.0), Pair(4.0))

        def forward(self, x):
            return self.choice(x)["sum"]

    net = supple.elastic(Reads(), torch.ones(2, 3), axes=[supple.Operator()], verify=False)
    with OutputMixture().applied(net, {"choice": torch.tensor([0.5, 0.25])}):
        assert torch.equal(net.module(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_weights_must_fit_the_sites(net):
    with (
        pytest.raises(SettingError, match=r"shape \(2,\), got \(3,\)"),
        OutputMixture().applied(net, {"1": torch.ones(3)}),
    ):
        pass
    with (
        pytest.raises(SettingError, match=r"'stem' can't be mixed \(these can: 1, 3\)"),
        OutputMixture().applied(net, {"stem": torch.ones(2)}),
    ):
        pass


def test_a_network_at_a_size_has_nothing_to_mix(net):
    weights = weights_of(net, [0.5, 0.5], [0.5, 0.5])
    with (
        net.at({"1": 0}),
        pytest.raises(ConcurrencyError, match="a size of this network is active"),
        OutputMixture().applied(net, weights),
    ):
        pass


def test_an_option_that_writes_to_its_input_is_named():
    module = nn.Sequential(nn.Linear(5, 5), Choice(nn.ReLU(inplace=True), nn.Linear(5, 5)))
    net = supple.elastic(module, X, axes=[supple.Operator()], verify=False)
    with (
        pytest.raises(UnsupportedModelError, match=r"option 0 \(ReLU\).*inplace=False"),
        OutputMixture().applied(net, {"1": torch.tensor([0.5, 0.5])}),
    ):
        net.module(X)


def test_checkpointed_blocks_recompute_the_mixture(net):
    class Checkpointed(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)

    gradients = []
    for module in (net.module, Checkpointed(copy.deepcopy(net.module))):
        own = supple.elastic(module, X, axes=[supple.Operator()], verify=False)
        weights = {s.name: torch.tensor([0.25, 0.75]) for s in own.space.sites}
        with OutputMixture().applied(own, weights):
            mixed = own.module(X)
        mixed.square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# ----------------------------------------------------------------------------------- weights


def test_softmax_by_hand():
    alpha = torch.tensor([0.0, 2.0])
    torch.testing.assert_close(Softmax().expected(alpha)[1], torch.tensor(0.880797))
    torch.testing.assert_close(Softmax(2.0).drawn(alpha, source())[1], torch.tensor(0.731059))


def test_hard_gumbel_draws_win_a_race_of_exponential_times():
    # The first of waiting times with rates p comes with the probabilities p.
    alpha = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    rates = torch.softmax(alpha.detach(), 0)
    random, twin = source(), source()
    winners = set()
    for _ in range(30):
        weights = Gumbel(hard=True).drawn(alpha, random)
        first = int((torch.empty(3).exponential_(generator=twin) / rates).argmin())
        assert weights.tolist() == F.one_hot(torch.tensor(first), 3).tolist()
        winners.add(first)
    assert winners == {0, 1, 2}
    weights[0].backward()
    assert alpha.grad.abs().sum() > 0


def test_soft_gumbel_draws_are_sharper_at_a_low_temperature():
    alpha = torch.zeros(4)
    sharp, soft = (Gumbel(t).drawn(alpha, source()) for t in (0.05, 20.0))
    assert sharp.max() > 0.95
    assert soft.max() < 0.4
    for each in (sharp, soft):
        torch.testing.assert_close(each.sum(), torch.tensor(1.0))


def test_dirichlet_draws_have_the_mean_of_their_concentrations():
    alpha = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    random, weighing = source(), Dirichlet()
    with global_random_untouched():
        drawn = torch.stack([weighing.drawn(alpha, random) for _ in range(500)])
    concentration = torch.tensor([1.0, 2.0, 0.367879])
    expected = concentration / concentration.sum()
    torch.testing.assert_close(weighing.expected(alpha), expected)
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.05, rtol=0)
    drawn[0, 0].backward()
    assert alpha.grad.abs().sum() > 0


def test_sigmoid_is_hard_forward_and_soft_backward():
    alpha = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    weights = Sigmoid().expected(alpha)
    assert weights.tolist() == [0.0, 1.0, 1.0]
    weights.sum().backward()
    p = torch.sigmoid(alpha.detach())
    torch.testing.assert_close(alpha.grad, p * (1 - p))


def test_a_temperature_must_be_above_0():
    with pytest.raises(SettingError, match="temperature must be above 0, got 0"):
        Softmax(0.0)
    with pytest.raises(SettingError, match="temperature must be above 0, got -1"):
        Gumbel(-1.0)


def test_alphas_have_stable_names_and_the_same_start_for_a_seed(net):
    sites = OutputMixture().sites(net)
    first, second = Alphas(sites, source()), Alphas(sites, source())
    assert list(first.state_dict()) == ["1/alpha", "3/alpha"]
    assert torch.equal(first["3"], second["3"])
    assert float(torch.cat([a.detach() for _, a in first.items()]).abs().max()) < 0.01


# -------------------------------------------------------------------------------------- steps


def test_a_batch_is_a_pair_or_is_split_in_the_middle():
    assert halves((TRAIN, VALIDATION)) == Halves(TRAIN, VALIDATION)
    assert halves([{"x": X}, {"x": Y}]) == Halves({"x": X}, {"x": Y})
    assert halves(Halves(X, Y)) == Halves(X, Y)
    assert [len(half[0]) for half in halves((X[:5], Y[:5]))] == [3, 2]
    assert [len(half) for half in halves(X)] == [3, 3]
    with pytest.raises(SettingError, match="one example can't be split"):
        halves((X[:1], Y[:1]))


def test_one_step_is_one_of_the_parameters_and_then_one_of_the_weights(net):
    twin, method = copy.deepcopy(net), RelaxedSearch(lr=0.05, weight_decay=0.1)
    run = started(net, method)
    alphas = [a.detach().clone().requires_grad_() for _, a in run.alphas.items()]
    adam = torch.optim.Adam(alphas, lr=0.05, betas=(0.5, 0.999), weight_decay=0.1)
    optimizer = sgd(twin)
    expected = {}
    for _ in range(2):
        mixture = [torch.softmax(a, 0) for a in alphas]
        adam.zero_grad()
        lost = loss(by_hand(twin.module, VALIDATION[0], *mixture), VALIDATION)
        lost.backward()
        adam.step()
        expected["alphas"] = float(lost.detach())
        optimizer.zero_grad()
        mixture = [torch.softmax(a.detach(), 0) for a in alphas]
        lost = loss(by_hand(twin.module, TRAIN[0], *mixture), TRAIN)
        lost.backward()
        optimizer.step()
        expected["weights"] = float(lost.detach())
        told = run.step((TRAIN, VALIDATION))
    assert told == pytest.approx(expected)
    for (_, alpha), other in zip(run.alphas.items(), alphas, strict=True):
        torch.testing.assert_close(alpha.detach(), other.detach())
    for name, p in twin.module.named_parameters():
        torch.testing.assert_close(net.module.get_parameter(name).detach(), p.detach())
    assert run.passes == 4


def test_the_second_order_gradient_is_that_through_one_step_of_the_weights(net):
    for layers in (net.module, net.module[3].options[1]):  # a kink has no second derivative
        layers[[type(layer) for layer in layers].index(nn.ReLU)] = nn.Tanh()
    net.module.double()
    train, validation = [(x.double(), y) for x, y in (TRAIN, VALIDATION)]
    method = RelaxedSearch(order="second")
    optimizer = sgd(net, momentum=0.9, weight_decay=0.02)
    run = method.start(net, optimizer, loss=loss, generator=source())
    run.alphas.double()
    run.step((train, validation))  # so that there is momentum
    owners = dict(net.module.named_parameters())
    before = {name: p.detach().clone() for name, p in owners.items()}

    def mixed(parameters, vectors, batch):
        with OutputMixture().applied(net, dict(zip(("1", "3"), vectors, strict=True))):
            return loss(torch.func.functional_call(net.module, parameters, (batch[0],)), batch)

    alphas = [a.detach().clone().requires_grad_() for _, a in run.alphas.items()]
    vectors = [torch.softmax(a, 0) for a in alphas]
    first = torch.autograd.grad(
        mixed(owners, vectors, train), list(owners.values()), create_graph=True
    )
    moved = {
        name: p - 0.1 * (g + 0.02 * p + 0.9 * optimizer.state[p]["momentum_buffer"])
        for (name, p), g in zip(owners.items(), first, strict=True)
    }
    unrolled = mixed(moved, vectors, validation)
    exact = torch.autograd.grad(unrolled, alphas)
    run.architecture.optimizer.zero_grad()
    found = run._architecture_loss(None, Halves(train, validation))
    got = torch.autograd.grad(found, [a for _, a in run.alphas.items()])
    torch.testing.assert_close(found.detach(), unrolled.detach())
    detached = {name: p.detach() for name, p in moved.items()}
    direct = torch.autograd.grad(
        mixed(
            detached,
            [torch.softmax(a, 0) for a in alphas],
            validation,
        ),
        alphas,
    )
    for one, other, near in zip(got, exact, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)
        assert (one - near).abs().max() > 10 * (one - other).abs().max()
    for name, p in owners.items():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_parameters_step_leaves_running_statistics_alone(order):
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Choice(nn.Identity(), nn.ReLU()))
    net = supple.elastic(module.train(), X, axes=[supple.Operator()], verify=False)
    run = started(net, RelaxedSearch(order=order))
    norm = module[1]
    run.architecture.step(Halves(TRAIN, VALIDATION))
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros(4))
    run.weights.step(TRAIN)
    assert int(norm.num_batches_tracked) == 1


def test_buffers_are_kept_when_the_block_raises():
    norm = nn.BatchNorm1d(5)
    with pytest.raises(RuntimeError), buffers_kept(norm):
        norm(norm(X)[:, :2])
    assert torch.equal(norm.running_mean, torch.zeros(5))


def test_frozen_parameters_stay_and_only_the_weights_learn(net):
    run = started(net, RelaxedSearch(frozen=True))
    before = {name: a.detach().clone() for name, a in run.alphas.items()}
    assert list(run.step((TRAIN, VALIDATION))) == ["weights"]
    assert all(torch.equal(a, before[name]) for name, a in run.alphas.items())


def test_decided_sites_run_one_choice_and_learn_no_more(net):
    run = started(net)
    run.fix("1", 0)
    before = run.alphas["1"].detach().clone()
    run.step((TRAIN, VALIDATION))
    assert torch.equal(run.alphas["1"], before)
    assert run.mixture()["1"].tolist() == [1.0, 0.0]
    assert net.module[1].options[1].weight.grad is None
    run.fix("3", 1)
    assert list(run.step((TRAIN, VALIDATION))) == ["weights"]
    assert dict(run.derive()) == {"1": 0, "3": 1}
    with pytest.raises(SettingError, match="site '1' must be one of"):
        run.fix("1", 2)


def test_the_config_has_the_largest_parameters_and_is_extracted(net):
    run = started(net)
    with torch.no_grad():
        run.alphas["1"].copy_(torch.tensor([0.2, 0.1]))
        run.alphas["3"].copy_(torch.tensor([0.1, 0.2]))
    config = run.derive()
    assert config == net.space.config({"1": 0, "3": 1})
    assert net.extract(config)(X).shape == (6, 3)


def test_a_penalty_joins_the_loss_of_the_parameters(net):
    class Cheap(RelaxedSearch):
        def penalty(self, run, weights):
            return 100 * sum(each[1] for each in weights.values())

    run = started(net, Cheap(lr=0.5))
    for _ in range(3):
        run.step((TRAIN, VALIDATION))
    assert dict(run.derive()) == {"1": 0, "3": 0}


def test_a_renewed_run_goes_on_with_a_lower_rate_and_no_momentum(net):
    optimizer = sgd(net, momentum=0.9)
    run = started(net, optimizer=optimizer, options=StepOptions(schedule=Cosine(), steps=2))
    for _ in range(2):
        run.step((TRAIN, VALIDATION))
    run.fix("3", 0)
    again = run.renewed(rate=0.5)
    assert not optimizer.state
    assert again.alphas is run.alphas
    again.step((TRAIN, VALIDATION))
    assert again.lr == pytest.approx(0.05)
    assert again.fixed == {"3": 0}


@pytest.mark.parametrize("check", rules.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("order", ["first", "second"])
def test_the_base_conforms(check, order):
    check(RelaxedSearch(order=order, lr=0.01))


def test_a_resumed_search_has_the_same_parameters(net):
    class Drawn(RelaxedSearch):
        def weighing(self):
            return Gumbel()

    twin, optimizer = copy.deepcopy(net), sgd(net, momentum=0.9)
    run = started(net, Drawn(lr=0.05), optimizer)
    run.step((TRAIN, VALIDATION))
    run.fix("1", 1)
    state = copy.deepcopy(run.state_dict())
    twin.module.load_state_dict(net.module.state_dict())
    other = sgd(twin, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = Drawn(lr=0.05).start(twin, other, loss=loss, generator=source(99))
    again.load_state_dict(state)
    assert run.step((TRAIN, VALIDATION)) == again.step((TRAIN, VALIDATION))
    assert all(torch.equal(a, again.alphas[name]) for name, a in run.alphas.items())
    state["alphas"] = {"9": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"search over \['9'\]"):
        again.load_state_dict(state)


def test_the_whole_search_in_one_call(net):
    data = [TRAIN, VALIDATION]
    config = RelaxedSearch(lr=0.1).search(
        net, data, data[:1], loss, optimizer=sgd(net), epochs=2
    )
    assert config in net.space
    assert net.extract(config)(X).shape == (6, 3)
    with pytest.raises(SettingError, match="epochs must be at least 1"):
        RelaxedSearch().search(net, data, data, loss, optimizer=sgd(net), epochs=0)
    with pytest.raises(SettingError, match="validation half has no batches"):
        RelaxedSearch().search(net, data, [], loss, optimizer=sgd(net), epochs=1)


def test_train_takes_a_search_as_its_method(net):
    history = supple.train(
        net, [(TRAIN, VALIDATION)], loss, method=RelaxedSearch(), epochs=2, progress=False
    )
    assert len(history.losses("alphas")[1]) == 2


def test_settings_are_checked(net):
    with pytest.raises(SettingError, match="lr must be above 0"):
        RelaxedSearch(lr=0.0)
    with pytest.raises(SettingError, match="order must be 'first' or 'second', got 'third'"):
        RelaxedSearch(order="third")
    with pytest.raises(SettingError, match="an elastic network, got a plain Sequential"):
        RelaxedSearch().start(net.module, sgd(net), loss=loss)
    plain = supple.elastic(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), X, verify=False)
    with pytest.raises(SettingError, match=r"finds nothing to mix: .* axes width"):
        RelaxedSearch().start(plain, sgd(plain), loss=loss)
