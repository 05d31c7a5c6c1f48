"""Costs counted on a network equal what is worked out by hand."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from supple.cost.count import (
    MacCounter,
    activation_bytes,
    count,
    inference,
    macs,
    params,
    weight_bytes,
)
from supple.errors import OperatorError, UnsupportedModelError
from tests.zoo import ZOO


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


# ------------------------------------------------------------------------------- macs


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 7), (11, 5), 11 * 5 * 7),
        (nn.Linear(5, 7, bias=False), (2, 3, 5), 6 * 5 * 7),
        (nn.Linear(5, 7), (5,), 5 * 7),
        (nn.Conv1d(3, 5, 3), (2, 3, 13), 2 * 11 * 5 * 3 * 3),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 11, 7), 2 * 6 * 4 * 5 * 3 * 9),
        (nn.Conv2d(6, 10, 3, groups=2), (2, 6, 7, 5), 2 * 5 * 3 * 10 * 3 * 9),
        (nn.Conv2d(7, 7, 3, padding=1, groups=7), (2, 7, 5, 5), 2 * 25 * 7 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 2 * 3 * 4 * 3 * 2 * 8),
        (nn.ConvTranspose2d(3, 5, 4, stride=2), (2, 3, 7, 5), 2 * 35 * 3 * 5 * 16),
        (nn.ConvTranspose2d(6, 10, 2, groups=2), (1, 6, 3, 5), 15 * 6 * 5 * 4),
        (nn.BatchNorm2d(3), (2, 3, 5, 7), 0),
        (nn.LayerNorm(7), (2, 3, 7), 0),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Softmax(1)), (2, 3, 4, 4), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_count_what_the_definition_says(layer, shape, expected):
    assert macs(layer, (torch.randn(shape),)) == expected


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, [(2, 3, 5, 7), (2, 3, 7, 11)], 6 * 5 * 7 * 11),
        (torch.matmul, [(3, 5, 7), (7,)], 15 * 7),
        (torch.mv, [(5, 7), (7,)], 35),
        (torch.addmv, [(5,), (5, 7), (7,)], 35),
        (torch.dot, [(7,), (7,)], 7),
        (torch.baddbmm, [(3, 5, 11), (3, 5, 7), (3, 7, 11)], 3 * 5 * 7 * 11),
        (torch.addbmm, [(5, 11), (3, 5, 7), (3, 7, 11)], 3 * 5 * 7 * 11),
        (lambda a, b: torch.einsum("bij,kj->bik", a, b), [(2, 3, 5), (7, 5)], 6 * 5 * 7),
    ],
)
def test_matrix_products_count_every_multiplication(function, shapes, expected):
    assert macs(Call(function), [torch.randn(shape) for shape in shapes]) == expected


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(-1)
    return weights @ value


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_fused_attention_counts_as_its_two_products(kv_heads):
    query = torch.randn(2, 4, 11, 6)
    key, value = torch.randn(2, 2, kv_heads, 13, 6).unbind(0)
    fused = Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    expected = 2 * 4 * 11 * 13 * 6 * 2
    with inference(fused), MacCounter() as counter:
        fused(query, key, value)
    assert counter.by_operator == {
        "aten._scaled_dot_product_flash_attention_for_cpu": expected
    } | {name: 0 for name, amount in counter.by_operator.items() if not amount}
    assert macs(Call(attention_by_hand), (query, key, value)) == expected


def test_a_causal_mask_gives_no_discount():
    inputs = torch.randn(3, 2, 4, 11, 6).unbind(0)
    causal = Call(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True))
    assert macs(causal, inputs) == 2 * 4 * 11 * 11 * 6 * 2


def test_attention_by_the_plain_kernel_counts_the_same():
    inputs = torch.randn(3, 2, 4, 11, 6).unbind(0)
    attend = Call(F.scaled_dot_product_attention)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert macs(attend, inputs) == 2 * 4 * 11 * 11 * 6 * 2


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_count_both_matrices_once_per_step(cell, bidirectional):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[cell]
    net = cell(5, 7, num_layers=2, bidirectional=bidirectional, batch_first=True)
    directions = 1 + bidirectional
    layers = (5 * 7 + 7 * 7) + (directions * 7 * 7 + 7 * 7)
    assert macs(net, (torch.randn(3, 11, 5),)) == 3 * 11 * directions * gates * layers


def test_a_recurrent_cell_counts_like_one_step_of_its_layer():
    assert macs(nn.LSTMCell(5, 7), (torch.randn(3, 5),)) == 3 * 4 * (5 * 7 + 7 * 7)


def test_look_ups_count_nothing():
    ids = torch.tensor([[1, 2, 3]])
    assert macs(nn.Embedding(11, 5), (ids,)) == 0
    assert macs(nn.EmbeddingBag(11, 5), (ids,)) == 0


def test_grouped_products_count_rows_and_not_experts():
    rows, matrices = torch.randn(13, 8), torch.randn(5, 8, 16)
    ends = torch.tensor([3, 3, 7, 12, 13], dtype=torch.int32)
    grouped = Call(lambda a, b: torch._grouped_mm(a, b, offs=ends))
    assert macs(grouped, (rows, matrices)) == 13 * 8 * 16


def test_routed_experts_count_tokens_times_experts_per_token():
    model, args, kwargs = ZOO["mixtral"]()
    tokens, hidden, ffn = 22, 48, 80
    attention = hidden * 48 + 2 * hidden * 24 + 48 * hidden
    scores = 2 * 4 * 11 * 11 * 12 * 2
    layer = tokens * (attention + hidden * 5 + 2 * 3 * hidden * ffn) + scores
    assert macs(model, args, kwargs) == 3 * layer + tokens * hidden * 97


@pytest.mark.parametrize(
    "name", ["resnet_bottleneck", "mobilenet_v3", "unet", "timm_vit", "mamba", "glu_mlp"]
)
def test_count_is_half_of_pytorchs_where_that_is_complete(name):
    model, args, kwargs = ZOO[name]()
    with inference(model), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    assert 2 * macs(model, args, kwargs) == counter.get_total_flops() > 0


def test_operators_inside_inference_mode_are_taken_apart():
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.linear(x, weight)

    assert macs(Call(forward), (torch.randn(3, 5), torch.randn(7, 5))) == 105


def test_a_transformer_encoder_counts_its_parts():
    model, args, kwargs = ZOO["transformer_encoder"]()
    layer = 22 * (4 * 48 * 48 + 2 * 48 * 80) + 2 * 4 * 11 * 11 * 12 * 2
    assert macs(model, args, kwargs) == 3 * layer + 2 * 48 * 7


def test_an_operator_without_a_rule_is_named():
    with pytest.raises(OperatorError, match="linalg_eig"):
        macs(Call(torch.linalg.eigvals), (torch.eye(3),))


def test_an_operator_of_somebody_elses_is_named():
    @torch.library.custom_op("supple_count_test::product", mutates_args=())
    def product(x: Tensor) -> Tensor:
        return x @ x

    with pytest.raises(OperatorError, match=r"supple_count_test\.product"):
        macs(Call(product), (torch.eye(3),))


# ----------------------------------------------------------------- parameters and weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.head = nn.Linear(5, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_tied_weights_count_once():
    assert params(Tied()) == 11 * 5 + 11
    assert weight_bytes(Tied()) == 4 * (11 * 5 + 11)


def test_a_transposed_view_of_a_weight_counts_once():
    first, second = nn.Linear(5, 7, bias=False), nn.Linear(7, 5, bias=False)
    second.weight = nn.Parameter(first.weight.data.t())
    assert params(nn.Sequential(first, second)) == 35


def test_parts_of_one_flat_memory_count_what_they_use():
    flat = torch.zeros(100)
    layer = nn.Linear(5, 7)
    layer.weight = nn.Parameter(flat[:35].view(7, 5))
    layer.bias = nn.Parameter(flat[35:42])
    assert params(layer) == 42


def test_buffers_are_weights_but_no_parameters():
    norm = nn.BatchNorm2d(5)
    assert params(norm) == 10
    assert weight_bytes(norm) == 4 * 20 + 8  # weight, bias, mean, variance and one int64


def test_buffers_that_are_not_saved_count_nowhere():
    layer = nn.Linear(3, 5)
    layer.register_buffer("mask", torch.zeros(1000), persistent=False)
    assert (params(layer), weight_bytes(layer)) == (20, 80)


def test_weight_bytes_follow_the_type():
    assert weight_bytes(nn.Linear(3, 5).bfloat16()) == 40


def test_counts_need_no_memory_for_weights():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        x = torch.empty(2, 5)
    assert count(net, (x,)) == {
        "params": 66,
        "macs": 2 * (35 + 21),
        "weight_bytes": 264,
        "activation_bytes": 4 * (10 + 14 + 14),
    }


# ---------------------------------------------------------------------------- activations


def test_a_chain_holds_input_and_two_neighbours():
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3))
    # Input 2x5 all along; the second layer has 2x7 in and 2x11 out, the third 2x11 and 2x3.
    assert activation_bytes(net, (torch.zeros(2, 5),)) == 4 * 2 * (5 + 7 + 11)


def test_a_function_in_place_needs_no_memory_of_its_own():
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 11), nn.ReLU(inplace), nn.Linear(11, 3))

    assert activation_bytes(net(True), (torch.zeros(2, 5),)) == 4 * 2 * (5 + 11 + 3)
    assert activation_bytes(net(False), (torch.zeros(2, 5),)) == 4 * 2 * (5 + 11 + 11)


def test_views_need_no_memory_and_keep_their_owner_alive():
    def forward(x: Tensor) -> Tensor:
        double = x * 2  # 40 bytes
        corner = double[:1, :1]
        del double
        return corner.expand(7, 7) + 1  # 196 bytes

    assert activation_bytes(Call(forward), (torch.zeros(2, 5),)) == 40 + 40 + 196


def test_what_is_dropped_is_free_again():
    def forward(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 2
        return x

    # The input, one result, and the next one while it is computed.
    assert activation_bytes(Call(forward), (torch.zeros(2, 5),)) == 3 * 40


def test_what_is_kept_stays():
    def forward(x: Tensor) -> list[Tensor]:
        return [x * i for i in range(5)]

    assert activation_bytes(Call(forward), (torch.zeros(2, 5),)) == 6 * 40


def test_a_residual_holds_its_shortcut():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 11), nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x))

    net = nn.Sequential(nn.Linear(3, 5), Block())
    # Input 2x3, shortcut 2x5, hidden 2x11, and the second layer's result 2x5.
    assert activation_bytes(net, (torch.zeros(2, 3),)) == 4 * 2 * (3 + 5 + 11 + 5)


def test_constants_that_existed_before_count_nothing():
    table = torch.zeros(1000)
    assert activation_bytes(Call(lambda x: x + table[:5]), (torch.zeros(2, 5),)) == 80


def test_tensors_written_down_in_the_forward_count():
    literal = Call(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert activation_bytes(literal, (torch.zeros(2, 5),)) == 40 + 20 + 40


def test_several_results_of_one_operator_all_count():
    split = Call(lambda x: torch.topk(x, 2)[0])
    # Values 2x2 of 4 bytes and positions 2x2 of 8 bytes, beside the input.
    assert activation_bytes(split, (torch.zeros(2, 5),)) == 40 + 16 + 32


def test_inputs_by_name_count_too():
    assert activation_bytes(Call(lambda *, x: x), (), {"x": torch.zeros(2, 5)}) == 40


def test_memory_in_reference_cycles_stays_until_the_end():
    def forward(x: Tensor) -> Tensor:
        for _ in range(3):
            cycle = [x * 2]
            cycle.append(cycle)
        return x * 1

    assert activation_bytes(Call(forward), (torch.zeros(2, 5),)) == 5 * 40


# ------------------------------------------------------------------------- the whole count


@pytest.mark.parametrize("name", list(ZOO))
def test_counting_twice_gives_the_same(name):
    model, args, kwargs = ZOO[name]()
    first = count(model, args, kwargs)
    assert first == count(model, args, kwargs)
    assert all(amount > 0 for amount in first.values())


def test_counting_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)).train()
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    count(net, (torch.randn(3, 5, generator=torch.Generator()),))
    assert [part.training for part in net] == [True, True, False]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert gc.isenabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_that_fails_says_why():
    net = nn.Linear(5, 7).train()
    with pytest.raises(UnsupportedModelError, match=r"Linear fails .*(shapes|mat1)"):
        count(net, (torch.zeros(2, 3),))
    assert net.training
    assert gc.isenabled()
