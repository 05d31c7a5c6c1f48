"""What all techniques that change a model do alike."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.rebuild import provenance_of
from supple.transforms import Given, ModelTransform, evaluating


@dataclass(frozen=True, kw_only=True)
class Scaled(ModelTransform):
    """Multiplies all weights."""

    factor: float = 2.0
    needs = ("calibration", "loss")
    key = "test/scaled"

    def change(self, model: nn.Module, given: Given) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(self.factor)
        if self.factor < 0:
            raise ValueError
        return model


def _loss(output: torch.Tensor, batch: object) -> torch.Tensor:
    return output.sum()


BATCHES = [(torch.ones(2, 3), torch.zeros(2))]


def test_the_model_stays_and_a_copy_changes_and_says_so() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    changed = Scaled().apply(model, calibration=iter(BATCHES), loss=_loss)
    assert torch.equal(model.weight, before)
    assert torch.equal(changed.get_parameter("weight"), 2 * before)
    (step,) = provenance_of(changed)["steps"]
    assert (step["key"], step["settings"]) == ("test/scaled", {"factor": 2.0})
    assert provenance_of(model)["steps"] == []


def test_the_model_stays_where_the_change_fails() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^$"):
        Scaled(factor=-1).apply(model, calibration=BATCHES, loss=_loss)
    assert torch.equal(model.weight, before)


def test_inplace_changes_the_model_itself() -> None:
    model = nn.Linear(3, 2)
    assert Scaled().apply(model, calibration=BATCHES, loss=_loss, inplace=True) is model


def test_what_is_missing_is_named() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(SettingError, match="Scaled needs calibration: pass calibration="):
        Scaled().apply(model, loss=_loss)
    with pytest.raises(SettingError, match="Scaled needs loss"):
        Scaled().apply(model, calibration=BATCHES)
    with pytest.raises(SettingError, match="without a batch"):
        Scaled().apply(model, calibration=[], loss=_loss)


def test_weights_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    with pytest.raises(SettingError, match=r"parameter '1.bias' has 1 of 2 values"):
        Scaled().apply(model, calibration=BATCHES, loss=_loss)


def test_inputs_leave_labels_out() -> None:
    x, y = BATCHES[0]
    assert Given(batches=((x, y),)).inputs() == ((x,), {})
    assert Given(batches=({"ids": x, "labels": y},)).inputs() == ((), {"ids": x})
    assert Given(batches=(x,)).inputs()[0][0] is x
    assert Given(batches=((x, y), x)).examples == 4
    with pytest.raises(SettingError, match="run on an example"):
        Given().inputs()


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
        assert not model[1].training
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_what_takes_a_place_gets_the_mode_that_was_there() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout(), nn.Dropout())
    model[1].eval()
    gone, kept = weakref.ref(model[0]), model[2]
    with evaluating(model):
        model[0] = nn.Sequential(nn.Dropout()).eval()
        model[1] = nn.Sequential(nn.Dropout()).eval()
        model[2] = nn.Sequential(kept).eval()
        assert gone() is None
    assert [one.training for one in model] == [True, False, True]
    assert (model[0][0].training, kept.training) == (True, True)
