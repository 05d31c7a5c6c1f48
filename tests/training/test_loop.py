"""The training loop: what is trained, recorded, resumed, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from supple.data.base import Dataset, TensorSource
from supple.errors import CheckpointError, MissingExtraError, SettingError
from supple.supernet.bignas import BigNAS
from supple.supernet.sortednet import SortedNet
from supple.training import checkpoint
from supple.training.history import History
from supple.training.loop import make_optimizer, train
from tests.training import stub


def trained(net, data, **settings) -> History:
    return train(net, data, stub.loss, **{"lr": 0.01, "progress": False, **settings})


def without_seconds(history: History) -> dict:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    return {"rows": rows, "validation": history.validation}


def dataset(seed: int = 0) -> Dataset:
    x, y = stub.vectors(1, size=22, seed=seed)[0]
    return Dataset(source=TensorSource((x, y)), batch_size=6)


def test_a_plain_module_learns_and_is_recorded():
    net = stub.mlp().module
    history = trained(net, stub.vectors(), epochs=40)
    steps, losses = history.losses("largest")
    assert steps == list(range(160))
    assert losses[-1] < 0.5 * losses[0]
    assert history.rows[-1]["epoch"] == 39
    assert history.rows[-1]["passes"] == 160
    assert History.from_json(history.to_json()) == history


def test_without_a_method_an_elastic_network_is_trained_as_its_module_alone():
    net, module = stub.mlp(), stub.mlp().module
    trained(net, stub.vectors(), epochs=2)
    trained(module, stub.vectors(), epochs=2)
    assert stub.equal(stub.weights(net.module), stub.weights(module))
    assert set(net.active) == {net.space.largest()}


def test_the_result_depends_on_the_seed_and_not_on_global_randomness():
    results = []
    for seed, draws in ((0, 0), (0, 3), (1, 0)):
        torch.rand(draws)
        net = stub.mlp(dropout=0.5)
        before = torch.get_rng_state()
        history = trained(net, dataset(), method=BigNAS(), epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((stub.weights(net.module), without_seconds(history)))
    assert stub.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not stub.equal(results[0][0], results[2][0])


def test_modes_are_left_as_they_were():
    net = stub.cnn(dropout=0.5)
    net.module.eval()
    net.module.drop.train()
    trained(net, stub.images(), method=SortedNet(micro_steps=2))
    modes = {name: part.training for name, part in net.module.named_modules()}
    assert modes == {"": False, "fc1": False, "bn": False, "drop": True, "fc2": False}


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("method", [None, BigNAS(), SortedNet(micro_steps=2)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(tmp_path, method, optimizer, every):
    class StoppedError(Exception):
        pass

    def run(folder, stop=None):
        net, calls = stub.mlp(dropout=0.3), []

        def loss(output, batch):
            calls.append(1)
            if stop is not None and len(calls) == stop:
                raise StoppedError
            return stub.loss(output, batch)

        history = train(
            net,
            dataset(),
            loss,
            method=method,
            epochs=4,
            optimizer=optimizer,
            lr=0.01,
            schedule="cosine",
            ema=0.9,
            clip=1.0,
            checkpoint=tmp_path / folder,
            checkpoint_every=every,
            validate=lambda net: {"norm": net.module.fc1.weight.detach().norm()},
            progress=False,
        )
        return net, history

    expected, history = run("whole")
    with pytest.raises(StoppedError):
        run("broken", stop=22 if isinstance(method, SortedNet) else 11)
    assert 0 < int(checkpoint.latest(tmp_path / "broken").name[5:]) < 16
    net, resumed = run("broken")
    assert stub.equal(stub.weights(net.module), stub.weights(expected.module))
    assert without_seconds(resumed) == without_seconds(history)
    assert len(history.validation) == 4
    again, finished = run("broken", stop=1)  # nothing is left to do
    assert stub.equal(stub.weights(again.module), stub.weights(expected.module))
    assert finished == resumed


CHILD = """
    import sys, time
    from tests.training import stub
    from supple.supernet.bignas import BigNAS
    from supple.training.loop import train

    def loss(output, batch):
        time.sleep(float(sys.argv[2]))
        return stub.loss(output, batch)

    net = stub.cnn(dropout=0.4)
    train(net, stub.images(5), loss, method=BigNAS(), epochs=4, optimizer="sgd", lr=0.05,
          checkpoint=sys.argv[1], checkpoint_every=3, progress=False)
"""


def test_a_killed_run_resumes_bitwise(tmp_path):
    def finished(folder):
        net = stub.cnn(dropout=0.4)
        trained(
            net,
            stub.images(5),
            method=BigNAS(),
            epochs=4,
            optimizer="sgd",
            lr=0.05,
            checkpoint=tmp_path / folder,
            checkpoint_every=3,
        )
        return stub.weights(net.module)

    threads = torch.get_num_threads()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "killed"), "0.02"],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(threads)},
    )
    try:
        while checkpoint.latest(tmp_path / "killed") is None:
            assert child.poll() is None, "it ended by itself"
            time.sleep(0.01)
        time.sleep(0.1)
        assert child.poll() is None, "it ended before it was killed"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert int(checkpoint.latest(tmp_path / "killed").name[5:]) < 20
    assert stub.equal(finished("killed"), finished("whole"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer='adamw', this run has optimizer='sgd'"),
        ({"method": SortedNet()}, "method="),
        ({"method": BigNAS(random=1)}, "method="),
        ({"seed": 1}, "seed=0"),
        ({"ema": 0.9}, "ema=None"),
        ({"schedule": "cosine"}, "schedule="),
        ({"epochs": 2}, "steps=4"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_name(tmp_path, settings, message):
    given = {"checkpoint": tmp_path, "method": BigNAS(), "schedule": "constant"}
    trained(stub.mlp(), stub.vectors(), **given)
    net = stub.mlp()
    with pytest.raises(CheckpointError, match=message):
        trained(net, stub.vectors(), **{**given, **settings})
    assert stub.equal(stub.weights(net.module), stub.weights(stub.mlp().module))


def test_another_thread_count_is_refused_by_name(tmp_path, monkeypatch):
    trained(stub.mlp(), stub.vectors(), checkpoint=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(CheckpointError, match="threads=77"):
        trained(stub.mlp(), stub.vectors(), checkpoint=tmp_path)


def test_a_flipped_byte_is_reported_with_the_files_name(tmp_path):
    trained(stub.mlp(), stub.vectors(), checkpoint=tmp_path)
    file = checkpoint.latest(tmp_path) / "shared.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shared\.safetensors"):
        trained(stub.mlp(), stub.vectors(), checkpoint=tmp_path)


def test_validation_sees_the_average_and_the_network_holds_it_in_the_end():
    net, held = stub.mlp(), []
    trained(
        net,
        stub.vectors(),
        epochs=3,
        ema=0.95,
        validate=lambda net: held.append(stub.weights(net.module)) or {"loss": 1.0},
    )
    assert stub.equal(stub.weights(net.module), held[-1])
    raw = stub.mlp()
    trained(raw, stub.vectors(), epochs=3)
    assert not stub.equal(stub.weights(raw.module), held[-1])


def test_validation_changes_neither_modes_nor_what_training_draws():
    def evaluate(net):
        net.module.eval()
        torch.rand(7)
        return {"loss": torch.tensor(0.25)}

    a, b = stub.mlp(dropout=0.5), stub.mlp(dropout=0.5)
    history = trained(a, stub.vectors(), epochs=2, validate=evaluate)
    trained(b, stub.vectors(), epochs=2)
    assert stub.equal(stub.weights(a.module), stub.weights(b.module))
    expected = [{"step": 4 * n, "epoch": n - 1, "metrics": {"loss": 0.25}} for n in (1, 2)]
    assert history.validation == expected


def test_steps_may_end_in_the_middle_of_an_epoch_or_of_many():
    history = trained(stub.mlp(), stub.vectors(), steps=6, validate=lambda net: {})
    assert [row["epoch"] for row in history.rows] == [0, 0, 0, 0, 1, 1]
    assert [row["step"] for row in history.validation] == [4, 6]


def test_rows_are_logged_as_often_as_asked_and_at_the_end():
    history = trained(stub.mlp(), stub.vectors(), steps=7, log_every=3)
    assert [row["step"] for row in history.rows] == [2, 5, 6]


def test_the_methods_schedule_is_followed_unless_the_user_gives_one():
    rates = {
        name: trained(
            stub.mlp(), stub.vectors(), method=BigNAS(floor=0.1), steps=8, schedule=schedule
        ).rows
        for name, schedule in (("own", None), ("given", "constant"))
    }
    assert [row["lr"] for row in rates["own"]][-2:] == pytest.approx([0.001, 0.001])
    assert {row["lr"] for row in rates["given"]} == {0.01}


def test_mappings_are_keywords_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x, labels):
            return {
                "logits": self.fc(x),
                "loss": nn.functional.cross_entropy(self.fc(x), labels),
            }

    data = [{"x": x, "labels": y} for x, y in stub.vectors()]
    history = train(
        Model(),
        data,
        lambda output, batch: output["loss"],
        epochs=30,
        lr=0.05,
        progress=False,
    )
    losses = history.losses("largest")[1]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_loaders_over_streams_need_a_number_of_steps():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*stub.vectors(1)[0], strict=True)

    loader = DataLoader(Endless(), batch_size=2)
    assert len(trained(stub.mlp(), loader, steps=3).rows) == 3
    with pytest.raises(SettingError, match="pass steps="):
        trained(stub.mlp(), loader)


def test_a_resumed_shuffled_loader_goes_on_in_the_same_order(tmp_path):
    x, y = stub.vectors(1, size=20)[0]

    def run(stop):
        seen = []

        def loss(output, batch):
            if len(seen) == stop:
                raise ZeroDivisionError
            seen.append(batch[1].tolist())
            return stub.loss(output, batch)

        loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
        folder = tmp_path / ("broken" if stop else "whole")
        settings = {"epochs": 2, "checkpoint": folder, "checkpoint_every": 3}
        if stop == 8:
            with pytest.raises(ZeroDivisionError):
                train(stub.mlp(), loader, loss, progress=False, **settings)
        else:
            train(stub.mlp(), loader, loss, progress=False, **settings)
        return seen

    whole = run(None)
    assert run(8) == whole[:8]
    assert run(99) == whole[6:]


def test_tensorboard_files_hold_losses_and_metrics(tmp_path):
    tensorboard = pytest.importorskip("tensorboard")
    assert tensorboard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(
        stub.mlp(),
        stub.vectors(),
        method=BigNAS(),
        log_dir=tmp_path,
        validate=lambda net: {"accuracy": 0.5},
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    assert set(tags) == {
        "loss/largest",
        "loss/smallest",
        "loss/random",
        "lr",
        "validation/accuracy",
    }
    assert [event.step for event in events.Scalars("loss/largest")] == [0, 1, 2, 3]


def test_logs_without_tensorboard_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"supple\[tensorboard\]"):
        trained(stub.mlp(), stub.vectors(), log_dir=tmp_path)


def test_the_progress_bar_shows_the_losses(capsys):
    trained(stub.mlp(), stub.vectors(), progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "largest" in shown


def test_named_optimizers_leave_biases_out_of_weight_decay():
    optimizer = make_optimizer(stub.mlp().module, "adamw", lr=0.2, weight_decay=0.3)
    decay, rest = optimizer.param_groups
    assert {p.dim() for p in decay["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    assert (decay["weight_decay"], rest["weight_decay"], rest["lr"]) == (0.3, 0.0, 0.2)


def test_a_function_may_make_the_optimizer():
    made = []

    def make(parameters):
        made.append(torch.optim.Adagrad(parameters, lr=0.5))
        return made[0]

    history = trained(stub.mlp(), stub.vectors(), optimizer=make, lr=None)
    assert len(made) == 1
    assert history.rows[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamww"}, "did you mean 'adamw'"),
        ({"optimizer": torch.optim.SGD, "lr": 0.1}, "leave them out"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"method": "bignas"}, "method must be a training rule"),
        ({"schedule": "cos"}, "there is no schedule 'cos'"),
        ({"data": []}, "has no batches"),
        ({"data": iter(stub.vectors()), "steps": 9}, "data gave no batch in epoch 1"),
        ({"data": 3}, "no length"),
    ],
)
def test_settings_are_checked(settings, message):
    settings = dict(settings)
    data = settings.pop("data", stub.vectors())
    with pytest.raises(SettingError, match=message):
        trained(stub.mlp(), data, **settings)


def test_a_method_needs_an_elastic_network():
    with pytest.raises(SettingError, match=r"make one with supple\.elastic"):
        trained(stub.mlp().module, stub.vectors(), method=BigNAS())
