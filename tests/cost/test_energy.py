from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import supple
from supple.cost import energy
from supple.errors import SettingError


def _package(root: Path, number: int, name: str, microjoules: int, most: int) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def _counting(folder: Path, step: int, most: int) -> None:
    counter = folder / "energy_uj"
    counter.write_text(str((int(counter.read_text()) + step) % (most + 1)))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "ROOT", tmp_path)
    monkeypatch.setattr(energy, "SECONDS", 0.02)
    return tmp_path


def test_energy_is_the_sum_over_packages_per_call_also_past_the_end_of_a_counter(
    root: Path,
) -> None:
    first = _package(root, 0, "package-0", 5_000, most=10**9)
    second = _package(root, 1, "package-1", 10**6 - 100, most=10**6)
    _package(root, 2, "psys", 0, most=10**9)

    def run() -> None:
        _counting(first, 300, 10**9)
        _counting(second, 40, 10**6)

    assert energy.energy_of(run) == pytest.approx(340e-6)


def test_energy_is_a_cost_of_a_network(root: Path) -> None:
    folder = _package(root, 0, "package-0", 0, most=10**9)

    class Layer(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _counting(folder, 2_000, 10**9)
            return super().forward(x)

    found = supple.measure(Layer(4, 4), (torch.zeros(2, 4),), what=("energy",))
    assert found.energy == pytest.approx(2e-3)
    assert "energy 2 mJ" in str(found)


def test_without_counters_nothing_is_guessed(root: Path) -> None:
    with pytest.raises(SettingError, match=r"not measurable here.*no energy counters"):
        energy.energy_of(lambda: None)
    net = supple.elastic(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (torch.zeros(1, 4),))
    with pytest.raises(SettingError, match="not measurable here"):
        supple.pareto(net, lambda module: 1.0, ["energy"], evaluations=1, progress=False)


def test_a_counter_that_may_not_be_read_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _package(root, 0, "package-0", 0, most=10**9)

    def refuse(path: Path, *args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    name = (folder / "name").read_text()
    monkeypatch.setattr(
        Path, "read_text", lambda path: name if path.name == "name" else refuse(path)
    )
    assert "energy_uj may not be read" in str(energy.why_not_measurable())


def test_the_energy_of_other_devices_is_not_guessed() -> None:
    assert "on 'cuda'" in str(energy.why_not_measurable("cuda"))
