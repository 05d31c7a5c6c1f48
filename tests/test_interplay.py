"""Sizes beside other parts of PyTorch: compilation, precision, hooks, copies, threads."""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, parametrizations
from torch.utils.checkpoint import checkpoint

from supple.axes.width import Width
from supple.errors import ConcurrencyError
from supple.network import Elastic, elastic
from supple.space import Config
from tests.graph.checks import (
    assert_active_equals_extracted,
    assert_same,
    assert_untouched,
    run,
    shake,
    state_of,
)
from tests.test_network import Tower, assert_same_gradients, conv_net, gradients, tower_net

# --- compilation -------------------------------------------------------------------------


class Counting:
    """A backend that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, examples: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward  # type: ignore[no-any-return]


@pytest.fixture
def backend() -> Iterator[Counting]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # the compiler looks at `grad` of every input, and slices of parameters are no leaves
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        yield Counting()
    torch._dynamo.reset()


def assert_compiled_equals_eager(net: Elastic, compiled: Any, config: Config) -> None:
    with net.at(config):
        assert_same(run(compiled, net.args, {}), run(net.module, net.args, {}), str(config))


@pytest.mark.parametrize("make", [tower_net, conv_net])
def test_a_compiled_module_is_compiled_once_a_size_and_never_again(
    make: Callable[[], Elastic], backend: Counting
) -> None:
    net = make()
    compiled = torch.compile(net.module, backend=backend)
    configs = list(dict.fromkeys([net.space.largest(), net.space.smallest()]))
    # more than PyTorch keeps of one code (`recompile_limit`)
    configs += [c for c in map(net.space.random, range(12)) if c not in configs]
    configs = list(dict.fromkeys(configs))[:10]
    assert len(configs) == 10
    for known, config in enumerate(configs, start=1):
        assert_compiled_equals_eager(net, compiled, config)
        assert backend.graphs <= known
    compiles = backend.graphs
    assert compiles == len(set(configs))
    for config in reversed(configs):
        assert_compiled_equals_eager(net, compiled, config)
    assert backend.graphs == compiles


def test_what_was_compiled_outside_does_not_run_inside(backend: Counting) -> None:
    net = tower_net()
    compiled = torch.compile(net.module, backend=backend)
    full = run(compiled, net.args, {})[0]
    for site in net.space.sites:
        with net.at({site.name: site.choices[0]}):
            assert not torch.allclose(run(compiled, net.args, {})[0], full), site.name
    assert torch.equal(run(compiled, net.args, {})[0], full)


def test_blocks_compiled_in_place_run_at_the_size(backend: Counting) -> None:
    net = tower_net()
    for block in net.module.blocks:
        block.compile(backend=backend)
    for _ in range(2):
        for config in ({}, {"blocks.0.up": 4}, {"blocks.0.up": 8, "blocks.1.up": 4}):
            with net.at(config):
                active = run(net, net.args, {})
            assert_same(active, run(net.extract(config), net.args, {}))


@pytest.mark.slow
def test_a_compiled_training_step_reaches_the_owners_after_exit(backend: Counting) -> None:
    net = tower_net()
    compiled = torch.compile(net.module, backend="aot_eager")
    for config in (net.space.largest(), net.space.smallest(), net.space.random(1)):
        found = []
        for module in (compiled, net.module):
            net.module.zero_grad()
            with net.at(config):
                loss = module(*net.args).square().sum()
            loss.backward()
            found.append(gradients(net.module))
        assert_same_gradients(*found)


def test_an_extracted_network_compiles_once(backend: Counting) -> None:
    net = tower_net()
    small = net.extract(net.space.smallest())
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    for _ in range(3):
        assert_same(run(compiled, net.args, {}), run(small, net.args, {}))
    assert backend.graphs == 1


# --- precision, checkpointing ------------------------------------------------------------


def test_autocast_at_a_size_equals_the_extracted_network_under_autocast() -> None:
    net = tower_net()
    config = net.space.smallest()
    small = net.extract(config)
    with torch.autocast("cpu", torch.bfloat16):
        with net.at(config):
            loss = net(*net.args)
        expected = small(*net.args)
    assert loss.dtype == torch.bfloat16
    assert torch.equal(loss, expected)
    loss.float().square().sum().backward()
    expected.float().square().sum().backward()
    grown = net.module.head.weight.grad
    kept = small.head.weight.grad
    assert grown.dtype == torch.float32
    assert torch.equal(grown[:, : kept.shape[1]], kept)
    assert not grown[:, kept.shape[1] :].any()


def test_a_size_entered_before_autocast_is_cast_like_the_others() -> None:
    net = tower_net()
    config = net.space.smallest()
    with net.at(config), torch.autocast("cpu", torch.bfloat16):
        first = net(*net.args)
    with net.at(net.space.largest()), torch.autocast("cpu", torch.bfloat16):
        net(*net.args)
    with torch.autocast("cpu", torch.bfloat16), net.at(config):
        assert torch.equal(net(*net.args), first)


class Thrifty(Tower):
    """Recomputes its blocks in backward, in the older way."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(x)


def test_reentrant_recomputation_after_exit_equals_no_checkpointing() -> None:
    plain = tower_net()
    thrifty = elastic(Thrifty(), plain.args, verify=False)
    thrifty.module.load_state_dict(plain.module.state_dict())
    for net in (plain, thrifty):
        losses = []
        for config in (net.space.smallest(), net.space.random(1)):
            with net.at(config):
                losses.append(net(*net.args).square().sum())
        for loss in losses:
            loss.backward()
    assert_same_gradients(gradients(thrifty.module), gradients(plain.module))


# --- hooks and parametrizations ----------------------------------------------------------


def test_forward_hooks_of_the_user_run_at_the_size() -> None:
    net = tower_net()
    seen: list[int] = []
    model = net.module
    handles = [
        model.stem.register_forward_hook(lambda m, a, out: seen.append(out.shape[-1])),
        model.stem.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
        model.register_forward_hook(lambda m, a, out: out + 1),
    ]
    config = {"stem": 3}
    with net.at(config):
        active = run(net, net.args, {})
    assert seen == [3]
    small = net.extract(config)
    for handle in handles:
        handle.remove()
    alone = run(small, net.args, {})
    assert_same(active, alone)
    plain = run(net.extract(config), net.args, {})[0]
    assert not torch.allclose(alone[0], plain), "the hooks are copied with the network"


def test_state_dict_hooks_see_the_owners() -> None:
    net = tower_net()
    shapes: list[tuple[int, ...]] = []
    net.module.stem._register_state_dict_hook(
        lambda m, state, prefix, local: shapes.append(tuple(state[prefix + "weight"].shape))
    )
    with net.at({"stem": 3}):
        net.module.state_dict()
    assert shapes == [(12, 5)]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_run_alike_active_and_extracted(norm: Any) -> None:
    model = shake(Tower())
    norm(model.blocks[0].up)
    net = elastic(model.eval(), torch.randn(4, 5), verify=False)
    for seed in range(4):
        assert_active_equals_extracted(net, net.space.random(seed))


# --- copies ------------------------------------------------------------------------------


def test_a_copy_of_an_elastic_network_is_one_of_its_own() -> None:
    net = conv_net()
    config = net.space.smallest()
    net.statistics[config] = {"bn1.running_mean": torch.ones(4)}
    twin = copy.deepcopy(net)
    assert twin.space == net.space
    assert twin.module is not net.module
    assert twin.statistics[config]["bn1.running_mean"] is not net.statistics[config]
    with net.at(config), twin.at(config):
        assert_same(run(twin, net.args, {}), run(net, net.args, {}))
    with torch.no_grad():
        twin.module.conv1.weight.zero_()
    assert net.module.conv1.weight.any()


def test_a_copy_made_inside_at_is_the_full_network() -> None:
    net = tower_net()
    full = run(net.module, net.args, {})
    before = state_of(net.module)
    with net.at(net.space.smallest()):
        small = run(net, net.args, {})
        copies = [copy.deepcopy(net.module), copy.deepcopy(net).module]
        assert_same(run(net, net.args, {}), small)
    for copied in copies:
        assert_same(run(copied, net.args, {}), full)
        assert not set(vars(copied)) & {"forward", "__deepcopy__"}
    assert_untouched(net.module, before)


# --- owners ------------------------------------------------------------------------------


def test_optimizers_and_vectors_made_inside_hold_the_owners() -> None:
    net = tower_net()
    outside = parameters_to_vector(net.module.parameters())
    with net.at(net.space.smallest()):
        assert torch.equal(parameters_to_vector(net.module.parameters()), outside)
        optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
        net(*net.args).square().sum().backward()
        optimizer.step()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in net.module.parameters()]
    assert not torch.equal(parameters_to_vector(net.module.parameters()), outside)


@pytest.mark.parametrize("change", ["double", "half", "bfloat16"])
def test_the_module_may_change_its_type_inside(change: str) -> None:
    net = conv_net()
    with net.at(net.space.smallest()):
        getattr(net.module, change)()
    kinds = {t.dtype for t in net.module.state_dict().values() if t.is_floating_point()}
    assert kinds == {getattr(torch, {"double": "float64"}.get(change, change))}


def test_sizes_of_a_module_moved_to_the_meta_device() -> None:
    net = tower_net()
    net.module.to("meta")
    with net.at(net.space.smallest()):
        output = net(net.args[0].to("meta"))
    assert output.is_meta
    assert net.extract(net.space.smallest()).stem.weight.is_meta


def test_frozen_parameters_get_no_gradient_at_a_size() -> None:
    net = tower_net()
    net.module.requires_grad_(False)
    net.module.head.requires_grad_(True)
    with net.at(net.space.smallest()):
        loss = net(*net.args).square().sum()
    loss.backward()
    assert set(gradients(net.module)) == {"head.weight", "head.bias"}


def test_inference_mode_at_a_size_leaves_nothing() -> None:
    net = tower_net()
    before = state_of(net.module)
    with torch.inference_mode(), net.at({"stem": 3}):
        active = net(*net.args)
    assert active.is_inference()
    assert_untouched(net.module, before)
    torch.testing.assert_close(active.clone(), net.extract({"stem": 3})(*net.args))
    with net.at({"stem": 3}):
        net(*net.args).sum().backward()
    assert net.module.stem.weight.grad is not None


def test_functional_calls_work_on_extracted_networks() -> None:
    net = tower_net()
    small = net.extract({"stem": 3})
    zeroed = {name: torch.zeros_like(p) for name, p in small.named_parameters()}
    assert not functional_call(small, zeroed, net.args).any()


# --- threads and odd ways out ------------------------------------------------------------


def test_of_many_threads_only_one_is_inside() -> None:
    net = tower_net()
    config = net.space.smallest()
    expected = run(net.extract(config), net.args, {})
    results: list[str] = []
    barrier = threading.Barrier(4)

    def enter() -> None:
        barrier.wait()
        try:
            with net.at(config):
                assert_same(run(net, net.args, {}), expected)
                barrier.wait()
                results.append("in")
        except ConcurrencyError:
            barrier.wait()
            results.append("refused")

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["in", "refused", "refused", "refused"]


def test_a_generator_that_is_closed_leaves_the_size() -> None:
    net = tower_net()
    before = state_of(net.module)

    def outputs() -> Iterator[Tensor]:
        with net.at(net.space.smallest()):
            while True:
                yield net(*net.args)

    running = outputs()
    next(running)
    with pytest.raises(ConcurrencyError), net.at({}):
        pass
    running.close()
    assert_untouched(net.module, before)
    with net.at({}):
        pass


def test_a_cancelled_task_leaves_the_size() -> None:
    net = tower_net()
    before = state_of(net.module)

    async def wait() -> None:
        with net.at(net.space.smallest()):
            await asyncio.sleep(60)

    async def cancel() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        with pytest.raises(ConcurrencyError), net.at({}):
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert_untouched(net.module, before)


def test_a_model_that_reads_its_own_parameter_dictionary_is_found_out() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.a._parameters["weight"], self.a._parameters["bias"]
            return self.b(torch.relu(x @ weight.t() + bias))

    from supple.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match="verification failed"):
        elastic(shake(Direct()), torch.randn(4, 5), axes=[Width()])
