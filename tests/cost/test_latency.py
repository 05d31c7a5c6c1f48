"""A latency model finds what the time depends on, and tells how wrong it is."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import supple
from supple.cost import latency as module
from supple.cost.latency import LatencyModel, fit, fit_measured, measure_sizes
from supple.cost.operators import kind_of
from supple.cost.profile import DeviceProfile, OperatorTable
from supple.errors import CheckpointError, SettingError, SuppleWarning
from supple.models.base import build


@pytest.fixture(scope="module")
def net():
    model = build("digits-cnn", widths=(8, 12), blocks=(2, 2))
    axes = [supple.Width((0.25, 0.5, 0.75, 1.0)), supple.Depth()]
    return supple.elastic(model, torch.zeros(2, 1, 8, 8), axes=axes, verify=False)


def here(operators=None, **other):
    """A profile of this machine, with made-up operators."""
    from supple.cost.measure import device_name

    facts = {
        "device": device_name("cpu", 1),
        "torch_version": torch.__version__,
        "threads": 1,
        "date": "",
        "fast": True,
        "operators": operators or {},
        "divisors": {},
    }
    return DeviceProfile(**(facts | other))


def seconds_of(net, rows):
    """A device whose time is an overhead per layer and a time per multiply-accumulate."""
    costs = net.costs(rows)
    blocks = sum(
        (net.space.choices_of(rows)[:, net.space.column(name)])
        for name in net.space.names
        if name.endswith("depth")
    )
    return 1e-4 + 3e-5 * blocks + 2e-10 * costs["macs"] + 1e-10 * costs["params"]


def rows_of(net, count, seed=0):
    return np.unique(net.space.random_many(count, seed), axis=0)


# --- what it learns ---------------------------------------------------------------------------


def test_sizes_that_were_not_measured_are_predicted(net) -> None:
    rows = module._sampled(net.space, 40, 0)
    model = fit_measured(net, rows, seconds_of(net, rows))
    fresh = rows_of(net, 300, 1)
    errors = np.abs(model.predict(fresh) / seconds_of(net, fresh) - 1)
    assert np.median(errors) < 0.01
    assert model.error < 0.02
    assert model.samples == 40


def test_the_error_is_that_on_sizes_not_fitted_on(net) -> None:
    rows = rows_of(net, 60)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, len(rows)))
    model = fit_measured(net, rows, seconds_of(net, rows) * noise)
    # The median of |N(0, 0.1)| is 0.067: what can't be known is not claimed to be.
    assert 0.05 < model.error < 0.15
    assert model.error < model.error_high


def test_what_only_the_operator_table_knows_is_learned_from_it(net) -> None:
    """A device on which convolutions of 6 channels or more are much slower."""
    grid = ((1, 10**4), (5, 6), (1, 100), (1, 100))
    steps = np.broadcast_to(np.array([1e-5, 9e-5])[None, :, None, None], (2, 2, 2, 2))
    table = OperatorTable(("pixels", "inner", "outer", "taps"), grid, steps)
    profile = here({"conv": table})
    features = module._Features(net, profile)
    assert {"seconds", "seconds conv"} <= set(features._sums)
    rows = rows_of(net, 40)
    matrix, _ = features(rows)
    truth = 1e-5 + matrix[:, list(features._sums).index("seconds conv")]
    few, many = rows[:14], rows[14:]
    with_table = fit_measured(net, few, truth[:14], profile).predict(many) / truth[14:] - 1
    without = fit_measured(net, few, truth[:14]).predict(many) / truth[14:] - 1
    assert np.median(np.abs(with_table)) < 0.01 < np.median(np.abs(without))


def test_sums_over_operators_equal_those_of_the_extracted_network(net) -> None:
    """Calls and MACs by kind, by running each size."""
    from supple.graph.couple import propagate
    from supple.graph.record import record

    features = module._Features(net, None)
    names = list(features._sums)
    rows = rows_of(net, 6)
    matrix, physical = features(rows)
    for row, config in zip(matrix, net.space.decode_many(rows), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SuppleWarning)
            recording = record(net.extract(config), net.args)
        p = propagate(recording)
        kinds = [found[0] for call in recording.calls if (found := kind_of(call, p.of))]
        seen = dict(zip(names[:physical], row[:physical], strict=True))
        for kind in {name.removeprefix("calls ") for name in seen if name.startswith("calls ")}:
            if kind != "view":
                assert seen[f"calls {kind}"] == kinds.count(kind)
        macs = sum(value for name, value in seen.items() if name.startswith("macs "))
        assert macs == net.costs(config)["macs"][0]


def test_choices_count_only_where_the_site_exists(net) -> None:
    features = module._Features(net, None)
    rows = rows_of(net, 50)
    matrix, physical = features(rows)
    one_hot = net.space.one_hot(rows)
    assert one_hot.min() == 0
    assert (one_hot.sum(axis=1) < len(net.space)).any()
    np.testing.assert_array_equal(matrix[:, physical:], one_hot)


def test_the_tables_add_up_to_the_weighted_features(net) -> None:
    features = module._Features(net, None)
    rows = rows_of(net, 50)
    matrix, _ = features(rows)
    weights = np.random.default_rng(0).normal(size=matrix.shape[1])
    counts = net.space.counts.tolist()
    priced = module._Pricer(features.tables(weights), counts)(rows)
    np.testing.assert_allclose(priced, matrix @ weights)


def test_leave_one_out_by_formula_equals_leaving_each_out() -> None:
    random = np.random.default_rng(0)
    matrix, seconds = random.random((9, 4)), random.random(9) + 1
    weights, error = module._ridge(matrix, seconds, 2, 1e-3, 1e-2)
    rows = matrix / seconds[:, None]
    scale = np.sqrt((rows**2).mean(axis=0))
    rows = rows / scale
    penalty = 9 * np.array([1e-3, 1e-3, 1e-2, 1e-2])

    def solved(a):
        return np.linalg.solve(a.T @ a + np.diag(penalty), a.sum(axis=0))

    np.testing.assert_allclose(weights, solved(rows) / scale)
    left_out = [abs(1 - rows[i] @ solved(np.delete(rows, i, axis=0))) for i in range(9)]
    assert error == pytest.approx(np.mean(left_out))


def test_the_samples_hold_the_extremes_and_lean_both_ways(net) -> None:
    rows = module._sampled(net.space, 30, 0)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 30
    known = set(net.space.decode_many(rows))
    assert {net.space.smallest(), net.space.largest()} <= known
    macs, uniform = net.costs(rows)["macs"], net.costs(rows_of(net, 2000))["macs"]
    assert macs.std() > 1.2 * uniform.std()


def test_a_small_space_is_measured_whole(net) -> None:
    space = net.space.subspace(
        {name: net.space.site(name).full for name in net.space.names[2:]}
    )
    assert len(module._sampled(space, 500, 0)) == space.size()


# --- measuring --------------------------------------------------------------------------------


def test_a_model_is_fitted_by_measuring_this_device(net) -> None:
    steps = []
    model = fit(net, samples=12, rounds=2, seconds=0.0, progress=lambda *s: steps.append(s))
    assert steps[-1] == ("sizes", 24, 24)
    assert model.name == "latency[predicted]"
    predicted = model.predict(net.space.largest())
    assert 1e-6 < predicted[0] < 1
    found = model.compare(net, [net.space.largest()], rounds=2, seconds=0.0)
    assert found.predicted == predicted
    assert 1e-6 < found.measured[0] < 1
    assert "1 sizes measured" in str(found)


def test_drift_is_told_from_error() -> None:
    found = module.Comparison(np.array([1.0, 2.0]), np.array([1.1, 2.2]), 1.1)
    np.testing.assert_allclose(found.errors, 1 / 1.1 - 1)
    np.testing.assert_allclose(found.errors_without_drift, 0, atol=1e-12)


def test_sizes_are_measured_at_the_batch_and_threads_asked_for(net, monkeypatch) -> None:
    seen = []
    forward = type(net.module).forward

    def noted(self, x):
        seen.append((len(x), torch.get_num_threads(), self.training))
        return forward(self, x)

    monkeypatch.setattr(type(net.module), "forward", noted)
    measure_sizes(net, [net.space.smallest()], batch=5, threads=2, rounds=1, seconds=0.0)
    assert set(seen) == {(5, 2, False)}


def test_another_batch_size_is_another_number_of_pixels(net) -> None:
    rows = rows_of(net, 5)
    small, large = (module._Features(module.at_batch(net, batch), None) for batch in (1, 6))
    place = list(small._sums).index("macs conv")
    np.testing.assert_allclose(6 * small(rows)[0][:, place], large(rows)[0][:, place])


# --- using it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(net):
    rows = module._sampled(net.space, 40, 0)
    return fit_measured(net, rows, seconds_of(net, rows))


def test_configs_lists_and_rows_are_priced_alike(net, model) -> None:
    rows = rows_of(net, 20)
    configs = net.space.decode_many(rows)
    np.testing.assert_array_equal(model.predict(rows), model.predict(configs))
    np.testing.assert_array_equal(model(configs[:1]), model.predict(configs[0]))


def test_a_hundred_thousand_sizes_a_second(net, model) -> None:
    rows = net.space.random_many(100_000, 0)
    model.predict(rows[:10])
    start = time.process_time()
    model.predict(rows)
    assert time.process_time() - start < 1.0


def test_a_figure_comes_with_its_error(net, model) -> None:
    text = model.text(net.space.largest())
    assert text.startswith(("3", "4", "5", "2"))
    assert " ±" in text
    assert text.endswith(" %")
    assert "on sizes it was not fitted on" in str(model)


def test_a_model_is_read_back(net, model, tmp_path) -> None:
    model.save(tmp_path / "latency.json")
    read = LatencyModel.load(tmp_path / "latency.json")
    rows = rows_of(net, 50)
    np.testing.assert_array_equal(read.predict(rows), model.predict(rows))
    assert str(read) == str(model)
    assert read.anchors == model.anchors
    path = tmp_path / "latency.json"
    path.write_text(path.read_text().replace('"samples": 40', '"samples": 41'))
    with pytest.raises(CheckpointError, match="checksum"):
        LatencyModel.load(path)
    here().save(path)
    with pytest.raises(CheckpointError, match="no latency model"):
        LatencyModel.load(path)


def test_a_model_that_was_read_back_knows_its_network(net, model, tmp_path) -> None:
    model.save(tmp_path / "latency.json")
    read = LatencyModel.load(tmp_path / "latency.json")
    found = read.compare(net, [net.space.smallest()], rounds=1, seconds=0.0)
    assert found.predicted == model.predict(net.space.smallest())


def test_a_model_with_a_table_of_the_wrong_size_is_refused(model, tmp_path) -> None:
    from supple.files import read_json, write_json

    model.save(tmp_path / "a.json")
    content = read_json(tmp_path / "a.json")
    content["tables"][0]["seconds"].append(1.0)
    write_json(tmp_path / "b.json", content)
    with pytest.raises(CheckpointError, match=r"b\.json is a damaged latency model"):
        LatencyModel.load(tmp_path / "b.json")


def test_a_search_takes_a_model_and_its_front_tells_the_error(net, model, tmp_path) -> None:
    settings = {
        "evaluations": 2,
        "study": tmp_path / "a.db",
        "data": [(torch.zeros(4, 1, 8, 8), torch.zeros(4))],
        "progress": False,
    }
    front = supple.pareto(net, lambda module: 1.0, ["params", model], **settings)
    predicted = model.predict(net.space.largest())[0]
    assert front.values(net.space.largest())["latency[predicted]"] == predicted
    assert model.text(net.space.smallest()).split(" ±")[1] in front.table()
    assert type(front).from_json(front.to_json()).errors == {"latency[predicted]": model.error}
    rows = module._sampled(net.space, 40, 0)
    other = fit_measured(net, rows, 2 * seconds_of(net, rows))
    with pytest.raises(SettingError, match="by another model"):
        supple.pareto(net, lambda module: 1.0, ["params", other], **settings)


# --- what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"samples": 11}, {"samples": 20.0}, {"threads": 0}])
def test_wrong_settings_are_refused(net, settings) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        fit(net, **settings)


def test_a_profile_of_another_machine_is_refused_by_name(net) -> None:
    with pytest.raises(SettingError, match="it is of a toaster"):
        fit(net, here(device="a toaster"))


def test_a_profile_with_other_threads_is_refused(net) -> None:
    with pytest.raises(SettingError, match="1 thread, not 2"):
        fit(net, here(), threads=2)


def test_a_profile_of_another_torch_is_warned_about(net) -> None:
    rows = module._sampled(net.space, 12, 0)
    with pytest.warns(SuppleWarning, match=r"torch 1\.0"):
        fit_measured(net, rows, seconds_of(net, rows), here(torch_version="1.0"))


def test_a_model_is_not_compared_with_another_network(model) -> None:
    other = supple.elastic(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(1, 3))
    with pytest.raises(SettingError, match="can't be compared"):
        model.compare(other, [other.space.largest()])


def test_a_network_without_weights_has_no_latency() -> None:
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
        net = supple.elastic(bare, torch.zeros(1, 3))
    with pytest.raises(SettingError, match="meta device"):
        fit(net)
