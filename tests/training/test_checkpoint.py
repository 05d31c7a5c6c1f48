"""Checkpoints: complete, checked, and exact."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from supple.errors import CheckpointError
from supple.training import checkpoint
from tests.training import stub


def module(seed: int = 0) -> nn.Module:
    return stub.cnn(seed).module


def saved(folder, step=1, **changes):
    given = {
        "module": module(),
        "shared": {"values": (1, 2.5, None), "tensor": torch.arange(3)},
        "own": {"random": torch.tensor([7])},
        "settings": {"threads": 1, "method": ["a", {"b": (1, 2)}]},
        **changes,
    }
    return checkpoint.save(folder, step, **given)


SETTINGS = {"threads": 1, "method": ["a", {"b": (1, 2)}]}


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, (2.5, "x")], 3: {None: True}},
        {(0, "exp_avg"): torch.ones(2, dtype=torch.bfloat16)},
        [torch.zeros(0), torch.tensor(3), float("1e-300"), -(2**70)],
        {"tensor": "not a mark", "map": [], "tuple": ()},
    ],
)
def test_nested_state_round_trips(value):
    packed, tensors = checkpoint.pack(value)
    back = checkpoint.unpack(json.loads(json.dumps(packed)), tensors)
    assert str(back) == str(value)
    assert type(back) is type(value)


def test_what_a_checkpoint_cannot_hold_is_named():
    with pytest.raises(CheckpointError, match="can't hold a set"):
        checkpoint.pack({"a": {1, 2}})


def test_everything_comes_back(tmp_path):
    path = saved(tmp_path)
    other = module(seed=1)
    shared, own = checkpoint.load(path, module=other, settings=SETTINGS)
    assert shared["values"] == (1, 2.5, None)
    assert shared["tensor"].tolist() == [0, 1, 2]
    assert own["random"].tolist() == [7]
    assert stub.equal(stub.weights(other), stub.weights(module()))


def test_the_last_two_are_kept_and_the_last_is_found(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (1, 12, 100):
        path = saved(tmp_path, step)
    assert checkpoint.latest(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012", "step-00000100"]


def test_a_half_written_checkpoint_is_not_found_and_is_overwritten(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_replace", killed)
        with pytest.raises(Killed):
            saved(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert saved(tmp_path, 2) == checkpoint.latest(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["run.json", "shared.json", "shared.safetensors", "rank-0.json", "rank-0.safetensors"],
)
@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_a_damaged_file_is_named_and_nothing_changes(tmp_path, name, harm):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2)
    if harm == "flip":
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    else:
        (path / name).unlink()
    other = module(seed=1)
    with pytest.raises(CheckpointError, match=name) as error:
        checkpoint.load(path, module=other, settings=SETTINGS)
    assert "step-00000001, is still there" in str(error.value)
    assert stub.equal(stub.weights(other), stub.weights(module(seed=1)))


def test_other_settings_are_refused_by_name(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="threads=1, this run has threads=2") as error:
        checkpoint.load(path, module=module(), settings={**SETTINGS, "threads": 2})
    assert "still there" not in str(error.value)


def test_another_network_is_refused_by_the_first_tensor_that_differs(tmp_path):
    path = saved(tmp_path)
    other = module()
    other.fc2 = nn.Linear(8, 5)
    before = stub.weights(other)
    with pytest.raises(CheckpointError, match=r"'fc2.weight' is torch.float32 \(3, 8\)"):
        checkpoint.load(path, module=other, settings=SETTINGS)
    assert stub.equal(stub.weights(other), before)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write to"):
        saved(tmp_path / "file" / "inside")
