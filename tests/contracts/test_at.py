"""`DESIGN.md`, section 4, `at`: what is not in `tests/test_network.py`."""

from __future__ import annotations

import threading

import pytest
import torch

from supple.errors import ConcurrencyError
from tests.graph.checks import assert_same, run
from tests.test_network import gradients, tower_net, zoo_net


def test_backward_may_run_inside_another_size() -> None:
    net = tower_net()
    small, other = net.space.smallest(), net.space.random(2)
    with net.at(small):
        net(*net.args).square().sum().backward()
    expected = gradients(net.module)
    net.module.zero_grad()
    with net.at(small):
        loss = net(*net.args).square().sum()
    with net.at(other):
        loss.backward()
    found = gradients(net.module)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_server_holds_one_extracted_view_per_size() -> None:
    """Extracted networks run side by side in threads while the elastic one refuses to."""
    net = tower_net()
    configs = [net.space.smallest(), net.space.random(1), net.space.largest()]
    views = [net.extract(config) for config in configs]
    expected = [run(view, net.args, {}) for view in views]
    found: dict[int, list[torch.Tensor]] = {}

    def serve(number: int) -> None:
        for _ in range(20):
            found[number] = run(views[number], net.args, {})

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(len(views))]
    with net.at(configs[0]):
        for thread in threads:
            thread.start()
        with pytest.raises(ConcurrencyError, match="extracted networks side by side"):
            net.at(configs[1]).__enter__()
        for thread in threads:
            thread.join()
    for number, outputs in enumerate(expected):
        assert_same(found[number], outputs)


def test_a_tied_parameter_is_one_member_in_costs_and_files(tmp_path: object) -> None:
    from supple.cost.count import count
    from supple.storage import load, save

    net = zoo_net("llama_tied")
    config = net.space.random(3)
    small = net.extract(config)
    assert net.costs(config)["params"][0] == count(small, net.args, net.kwargs)["params"]
    save(small, f"{tmp_path}/small")
    loaded = load(f"{tmp_path}/small")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
