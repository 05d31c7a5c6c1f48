"""Tables of embeddings as codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import supple
from supple.errors import SettingError
from supple.layers.packed import PackedEmbedding
from supple.quantize._embeddings import Embeddings
from supple.testing.toys import generator

IDS = torch.tensor([[3, 0, 9, 9]])


def network(**settings: float) -> nn.Sequential:
    table = nn.Embedding(10, 24, **settings)  # type: ignore[arg-type]
    nn.init.normal_(table.weight, generator=generator())
    return nn.Sequential(table, nn.Linear(24, 10, bias=False))


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 8), (3, 12), (2, None)])
def test_codes_are_within_half_a_step_and_the_rest_stays(
    bits: int, group_size: int | None, tmp_path: Path
) -> None:
    model = network()
    small = Embeddings(bits=bits, group_size=group_size).apply(model)
    table = small[0]
    assert isinstance(table, PackedEmbedding)
    assert torch.equal(small[1].weight, model[1].weight)
    largest = model[0].weight.detach().abs().amax()
    step = largest / (2 ** (bits - 1) - 0.5) * 1.001
    assert (table(IDS) - model[0](IDS)).abs().max() <= step
    held = 10 * 24 * bits // 8 + 2 * 10 * (24 // (group_size or 24))
    assert table.nbytes == held
    rounded = Embeddings(bits=bits, group_size=group_size, packed=False).apply(model)
    torch.testing.assert_close(rounded[0](IDS), table(IDS), rtol=1e-3, atol=1e-3)
    supple.save(small, tmp_path / "small")
    loaded = supple.load(tmp_path / "small", model=network())
    assert torch.equal(loaded(IDS), small(IDS))


def test_a_shared_table_stays_and_is_named_where_it_is_the_only_one() -> None:
    model = network()
    model[1].weight = model[0].weight
    with pytest.raises(SettingError, match=r"no other layer shares .* \(which matches 0\)"):
        Embeddings().apply(model)
    both = nn.ModuleList([model, nn.Embedding(4, 2)])
    assert list(Embeddings().tables(both)) == ["1"]
    with pytest.raises(SettingError, match="limits no norms"):
        Embeddings().apply(network(max_norm=1.0))
    with pytest.raises(SettingError, match=r"got 'head'$"):
        Embeddings(layers="head").apply(network())


def test_inputs_are_not_rounded_and_16_bits_change_nothing() -> None:
    with pytest.raises(SettingError, match="leave activations=None, got 8"):
        Embeddings(activations=8)
    model = network()
    assert isinstance(Embeddings(bits=16).apply(model)[0], nn.Embedding)
