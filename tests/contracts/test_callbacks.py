"""The contract "Callbacks": each test names the sentence that it holds to."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import supple
from supple.cost.count import count
from supple.errors import SettingError
from supple.network import Elastic
from supple.search.random_search import RandomSearch
from supple.supernet.bignas import BigNAS
from supple.training.batches import run_model
from tests.contracts.ranks import Batch, Net, batches, loss, made, trained
from tests.training.stub import equal, weights


class Named(nn.Module):
    """Takes its inputs by name only, and gives the loss with its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(norm=True)

    def forward(self, *, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def named(seed: int = 0) -> Elastic:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return supple.elastic(Named(), kwargs={"x": torch.ones(4, 5)}, verify=False)


def plain(seed: int = 0) -> Elastic:
    found: Elastic = made(seed, norm=True)
    return found


def mappings() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": labels} for x, labels in batches()]


def test_data_yields_tuples_or_mappings():
    """ "`data` yields tuples or mappings": the same examples, the same weights."""
    by_place, by_name = plain(), named()
    trained(by_place, batches())
    trained(by_name, mappings(), loss=lambda output, batch: output["loss"])  # type: ignore[arg-type]
    found = {k.removeprefix("net."): v for k, v in weights(by_name.module).items()}
    assert equal(found, weights(by_place.module))
    sizes = by_place.space.smallest(), by_name.space.smallest()
    one = supple.recalibrate(by_place, sizes[0], batches(2))
    two = supple.recalibrate(by_name, sizes[1], mappings()[:2])
    assert equal({k.removeprefix("net."): v for k, v in two.items()}, one)


def test_forward_has_a_default_by_type():
    """ "`forward(model, batch)` has a default by type": what the model is called with."""
    calls: list[Any] = []

    def model(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    x, labels = batches()[0]
    for batch in ((x, labels), [x, labels], {"x": x, "labels": labels}, x):
        run_model(model, batch)  # type: ignore[arg-type]
    assert calls == [((x,), {}), ((x,), {}), ((), {"x": x, "labels": labels}), ((x,), {})]
    with pytest.raises(SettingError, match=r"forward=\(model, batch\) -> output"):
        run_model(model, "text")  # type: ignore[arg-type]


def test_another_forward_may_be_given():
    """ "`forward(model, batch)`", in training and recalibration."""
    by_place, by_name = plain(), plain()
    trained(by_place, batches())
    trained(
        by_name,
        mappings(),  # type: ignore[arg-type]
        forward=lambda model, batch: model(batch["x"]),
        loss=lambda output, batch: loss(output, (batch["x"], batch["labels"])),
    )
    assert equal(weights(by_place.module), weights(by_name.module))
    config = by_place.space.smallest()
    one = supple.recalibrate(by_place, config, batches(2))
    two = supple.recalibrate(
        by_name, config, mappings()[:2], forward=lambda model, batch: model(batch["x"])
    )
    assert equal(one, two)


def test_loss_is_called_with_output_and_batch_and_gives_a_scalar():
    """ "`loss(output, batch) -> scalar`"."""
    seen: list[tuple[Any, Any]] = []

    def watched(output: Tensor, batch: Batch) -> Tensor:
        seen.append((output, batch))
        return loss(output, batch)

    data = batches(1)
    trained(plain(), data, loss=watched)
    assert seen
    assert all(output.shape == (6, 3) and batch is data[0] for output, batch in seen)
    for wrong in (lambda output, batch: output, lambda output, batch: 0.5):
        with pytest.raises(SettingError, match="must be a scalar tensor"):
            trained(plain(), data, loss=wrong)


@pytest.mark.parametrize("gives", ["dict", "float", "tensor"])
def test_evaluate_gives_a_mapping_or_a_number(gives):
    """ "`evaluate(module) -> dict | float`"."""

    def accuracy(module: nn.Module) -> Any:
        value = {"dict": {"accuracy": 0.5, "loss": 2.0}, "float": 0.5, "tensor": torch.ones(())}
        return value[gives]

    net = made()
    front = supple.pareto(
        net, accuracy, ["params"], evaluations=2, study=":memory:", progress=False
    )
    names = {"dict": {"accuracy", "loss"}}.get(gives, {"accuracy"})
    assert names <= front.evaluated[0].values.keys()


def test_evaluate_is_called_inside_at_after_recalibration():
    """ "is called inside `at`, after recalibration", with the network's own module."""
    net = plain()
    widths: list[int] = []

    def judge(module: nn.Module) -> float:
        assert module is net.module
        width = module.stem(torch.ones(1, 5)).shape[-1]
        size = next(c for c in (net._active,) if c is not None)
        widths.append(width)
        assert width == size["stem"]
        if size != net.space.largest():
            kept = net.statistics[size]["blocks.0.norm.running_mean"]
            assert torch.equal(module.blocks[0].norm.running_mean, kept)
        return 0.0

    supple.pareto(
        net,
        judge,
        ["params"],
        algorithm=RandomSearch(),
        evaluations=6,
        study=":memory:",
        data=batches(2),
        progress=False,
    )
    assert len(set(widths)) > 1
    assert net.module.stem(torch.ones(1, 5)).shape[-1] == 8


def test_everything_that_runs_a_model_takes_args_and_kwargs(tmp_path):
    """ "Everything that runs a model takes `args` and `kwargs`"."""
    for function in (supple.elastic, supple.measure, supple.export, count):
        assert {"args", "kwargs"} <= inspect.signature(function).parameters.keys(), function
    net = named()
    net.module.eval()
    kwargs = {"x": torch.ones(4, 5)}
    assert net.verify(1).ok
    supple.recalibrate(net, net.space.smallest(), mappings()[:1])
    small = net.extract(net.space.smallest())
    assert count(small, kwargs=kwargs)["macs"] == net.costs(net.space.smallest())["macs"][0]
    assert supple.measure(small, kwargs=kwargs, what=["latency"], repeats=1).latency is not None
    assert supple.export(small, tmp_path / "net.pt2", kwargs=kwargs).exists()


def test_quantities_are_texts_with_units_or_bare_si_numbers():
    """ "Quantities are strings with units or bare SI numbers": both mean the same."""
    net = made()
    front = supple.pareto(
        net,
        lambda module: 0.5,
        {"latency": lambda configs: [0.001 * config["stem"] for config in configs]},
        evaluations=6,
        study=":memory:",
        progress=False,
    )
    chosen = [
        front.best(where={"latency": text}, maximize="score")
        for text in ("<= 2 ms", "<= 0.002", "<= 2000 us", "<= 0.002 s")
    ]
    assert len(set(chosen)) == 1
    assert chosen[0]["stem"] == 2
    assert trained(net, batches(1), method=BigNAS()).keys()
