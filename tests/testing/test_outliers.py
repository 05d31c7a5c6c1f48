"""The outlier twin: same function, outliers where its norms give them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.testing.outliers import outlier_twin
from supple.testing.toys import generator
from tests.test_feeds import Block


def test_the_twin_computes_the_same_with_outliers_after_each_norm() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 12, generator=generator())
    twin = outlier_twin(model, (x,), channels=3, factor=30.0, generator=generator())
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)
    for name in ("norm.weight", "norm_2.weight", "norm_2.bias"):
        before, after = model.get_parameter(name), twin.get_parameter(name)
        assert int((after != before).sum()) in (0, 3)
        larger = after != before
        torch.testing.assert_close(after[larger], 30 * before[larger])
    assert int((twin.norm.weight != model.norm.weight).sum()) == 3
    assert torch.equal(twin.v.bias, model.v.bias)


def test_networks_without_norms_have_no_twin() -> None:
    with pytest.raises(SettingError, match="Sequential has no norm"):
        outlier_twin(nn.Sequential(nn.Linear(3, 2)), (torch.ones(1, 3),))
    with pytest.raises(SettingError, match="channels must be at most 12"):
        outlier_twin(Block(), (torch.ones(1, 2, 12),), channels=13)
