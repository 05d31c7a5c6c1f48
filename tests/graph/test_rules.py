"""Rules written by hand, checked against what PyTorch's own meta kernels say.

Each operator is called on a small sample. Where its meta kernel, run with a fresh symbol for
every dimension, says that an output dimension is an input dimension or that two input
dimensions must be equal, the rule says so too (or pins both, which is the careful answer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map

from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.errors import UnsupportedModelError
from supple.graph.dims import Atom, Dim, atoms, find, same
from supple.graph.learned import learn, learned_rule
from supple.graph.record import Call, Ref
from supple.graph.rules import RULES, Propagation, pointwise
from supple.network import Elastic, elastic
from tests.graph.checks import assert_active_equals_extracted, assert_same, run, shake

aten = torch.ops.aten
Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


def bug(reason: str) -> pytest.MarkDecorator:
    """A defect of the elastic core that is known; the test passes once it is mended."""
    return pytest.mark.xfail(strict=True, reason=reason)


def t(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(high: int, *shape: int) -> Tensor:
    return torch.arange(high).repeat(64)[: torch.Size(shape).numel()].reshape(shape)


def op(packet: Any, *args: Any, **kwargs: Any) -> Sample:
    return packet, args, kwargs


def batch_norm_sample(packet: Any, *tail: Any) -> Sample:
    return op(packet, t(2, 5, 3, 7), t(5), t(5), t(5), t(5).abs(), *tail)


def pools(packet: Any, *args: Any) -> Sample:
    return op(packet, t(2, 5, 7, 11), *args)


SAMPLES: list[Sample] = [
    # copies and fills
    *(op(p, t(2, 3)) for p in (aten.clone.default, aten.detach.default, aten.alias.default)),
    *(
        op(p, t(2, 3))
        for p in (aten.lift_fresh.default, aten.lift.default, aten.detach_.default)
    ),
    op(aten._to_copy.default, t(2, 3), dtype=torch.float64),
    *(
        op(p, t(2, 3))
        for p in (
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.empty_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.zero_.default,
        )
    ),
    op(aten.full_like.default, t(2, 3), 1.0),
    op(aten.fill_.Scalar, t(2, 3), 1.0),
    op(aten.native_dropout.default, t(2, 3), 0.5, True),
    op(aten.copy_.default, t(5, 3), t(3)),
    # views
    op(aten.view.default, t(2, 3, 5), [6, 5]),
    op(aten.view.default, t(6, 5), [6, 5]),
    op(aten._unsafe_view.default, t(2, 3, 5), [2, 15]),
    op(aten._reshape_alias.default, t(2, 3), [2, 3], [3, 1]),
    op(aten.view_copy.default, t(2, 3, 5), [2, 3, 5]),
    op(aten.permute.default, t(2, 3, 5), [2, 0, 1]),
    op(aten.transpose.int, t(2, 3, 5), 0, -1),
    op(aten.transpose_.default, t(2, 3, 5), 0, 2),
    op(aten.t.default, t(2, 3)),
    op(aten.unsqueeze.default, t(2, 3), 1),
    op(aten.unsqueeze.default, t(2, 3), -1),
    op(aten.unsqueeze_.default, t(2, 3), -2),
    op(aten.squeeze.default, t(2, 1, 3)),
    op(aten.squeeze.dim, t(2, 1, 3), 1),
    op(aten.squeeze.dim, t(2, 1, 3), 0),
    op(aten.squeeze.dims, t(1, 2, 1, 3), [0, 2]),
    op(aten.squeeze_.dim, t(2, 1, 3), -2),
    op(aten.expand.default, t(2, 1, 3), [2, 5, 3]),
    op(aten.expand.default, t(3), [2, 5, -1]),
    op(aten.expand_copy.default, t(2, 3), [7, 2, 3]),
    # parts
    op(aten.as_strided.default, t(2, 3), [2, 3], [3, 1]),
    op(aten.as_strided.default, t(2, 3), [3, 2], [1, 3]),
    op(aten.as_strided_.default, t(2, 3), [2, 3], [3, 1]),
    op(aten.slice.Tensor, t(2, 7, 3), 1, 2, 5),
    op(aten.slice.Tensor, t(2, 7, 3), 1, 0, 9223372036854775807),
    op(aten.slice.Tensor, t(2, 7, 3), 1, -3, 9223372036854775807),
    op(aten.slice.Tensor, t(2, 7, 3), 2, 0, 9, 2),
    op(aten.select.int, t(2, 7, 3), 1, -1),
    op(aten.unbind.int, t(2, 3, 5), 1),
    op(aten.split.Tensor, t(2, 6), 3, 1),
    op(aten.unsafe_split.Tensor, t(2, 6), 3, 1),
    op(aten.split_copy.Tensor, t(2, 6), 3, 1),
    op(aten.split_with_sizes.default, t(2, 7), [3, 4], -1),
    op(aten.split_with_sizes_copy.default, t(2, 7), [3, 4], -1),
    op(aten.unsafe_split_with_sizes.default, t(2, 7), [3, 4], 1),
    op(aten.cat.default, [t(2, 3), t(2, 5)], 1),
    op(aten.cat.default, [t(0), t(2, 5), t(3, 5)]),
    op(aten.stack.default, [t(2, 3), t(2, 3), t(2, 3)], 1),
    op(aten.stack.default, [t(2, 3), t(2, 3)], -1),
    op(aten.constant_pad_nd.default, t(2, 3, 5), [1, 2, 0, 0], 0.0),
    op(aten.constant_pad_nd.default, t(2, 3, 5), [0, 0, 1, 1], 0.0),
    op(aten.constant_pad_nd.default, t(2, 3, 5), [-1, 0], 0.0),
    op(aten.flip.default, t(2, 3, 5), [1]),
    op(aten.roll.default, t(2, 3, 5), [1], [1]),
    op(aten.roll.default, t(2, 3), [1], []),
    *(
        op(p, t(2, 3, 5), 1)
        for p in (
            aten.cumsum.default,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten.cummax.default,
            aten.cummin.default,
            aten.sort.default,
        )
    ),
    op(aten.topk.default, t(2, 7), 3, -1),
    op(aten.kthvalue.default, t(2, 7, 3), 2, 1, True),
    op(aten.repeat.default, t(2, 3), [5, 1, 2]),
    # looking up
    op(aten.embedding.default, t(7, 3), ids(7, 2, 5)),
    op(aten.index_select.default, t(2, 7, 3), 1, ids(7, 5)),
    op(aten.gather.default, t(2, 7), 1, ids(7, 2, 3)),
    op(aten.index.Tensor, t(2, 7, 3), [None, ids(7, 5)]),
    op(aten.index.Tensor, t(2, 7, 3), [ids(2, 5), None, ids(3, 5)]),
    op(aten.index.Tensor, t(2, 7, 3), [ids(2, 5), ids(7, 5)]),
    op(aten._unsafe_index.Tensor, t(2, 7, 3), [None, ids(7, 5, 1), ids(3, 4)]),
    op(aten.index_put.default, t(7, 3), [ids(7, 5)], t(5, 3)),
    op(aten.index_put_.default, t(7, 3), [ids(7, 5)], t(5, 3)),
    *(
        op(p, t(2, 7), 1, ids(7, 2, 5), t(2, 5))
        for p in (
            aten.scatter.src,
            aten.scatter_.src,
            aten.scatter_add.default,
            aten.scatter_add_.default,
        )
    ),
    *(
        op(p, t(7, 3), 0, ids(7, 5), t(5, 3))
        for p in (
            aten.index_add.default,
            aten.index_add_.default,
            aten.index_copy.default,
            aten.index_copy_.default,
        )
    ),
    op(aten.masked_scatter.default, t(2, 3), t(2, 3) > 0, t(6)),
    op(aten.masked_scatter_.default, t(2, 3), t(2, 3) > 0, t(6)),
    # contractions
    op(aten.mm.default, t(2, 3), t(3, 5)),
    op(aten.addmm.default, t(5), t(2, 3), t(3, 5)),
    op(aten.addmm.default, t(2, 5), t(2, 3), t(3, 5)),
    op(aten.addmm_.default, t(2, 5), t(2, 3), t(3, 5)),
    op(aten.bmm.default, t(7, 2, 3), t(7, 3, 5)),
    op(aten.baddbmm.default, t(7, 2, 5), t(7, 2, 3), t(7, 3, 5)),
    op(aten.baddbmm_.default, t(7, 2, 5), t(7, 2, 3), t(7, 3, 5)),
    op(aten.mv.default, t(2, 3), t(3)),
    op(aten._grouped_mm.default, t(7, 8), t(2, 8, 4), torch.tensor([3, 7], dtype=torch.int32)),
    *(
        op(aten.convolution.default, *c)
        for c in (
            (t(2, 3, 8, 8), t(5, 3, 3, 3), t(5), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
            (t(2, 6, 9), t(4, 3, 3), None, [2], [0], [1], False, [0], 2),
            (t(2, 6, 8, 8), t(6, 5, 3, 3), t(10), [2, 2], [1, 1], [1, 1], True, [0, 0], 2),
            (t(2, 3, 8), t(3, 5, 3), None, [1], [0], [1], True, [0], 1),
        )
    ),
    op(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        *(t(2, 4, 7, 8), t(2, 4, 5, 8), t(2, 4, 5, 8)),
    ),
    # normalization and reduction
    batch_norm_sample(aten.native_batch_norm.default, False, 0.1, 1e-5),
    batch_norm_sample(aten._native_batch_norm_legit_no_training.default, 0.1, 1e-5),
    batch_norm_sample(aten._native_batch_norm_legit.default, True, 0.1, 1e-5),
    batch_norm_sample(aten._native_batch_norm_legit_functional.default, True, 0.1, 1e-5),
    batch_norm_sample(aten._batch_norm_with_update.default, 0.1, 1e-5),
    batch_norm_sample(aten._batch_norm_no_update.default, 0.1, 1e-5),
    op(aten.native_layer_norm.default, t(2, 3, 5), [5], t(5), t(5), 1e-5),
    op(aten.native_layer_norm.default, t(2, 3, 5), [3, 5], t(3, 5), None, 1e-5),
    op(aten.native_group_norm.default, t(2, 6, 7), t(6), t(6), 2, 6, 7, 3, 1e-5),
    op(aten._softmax.default, t(2, 3, 5), -1, False),
    op(aten._log_softmax.default, t(2, 3, 5), 1, False),
    op(aten._safe_softmax.default, t(2, 3, 5), -1),
    *(
        op(p, t(2, 3, 5), [1], keep)
        for keep in (False, True)
        for p in (
            aten.sum.dim_IntList,
            aten.mean.dim,
            aten.amax.default,
            aten.amin.default,
            aten.nansum.default,
            aten.logsumexp.default,
            aten.var.dim,
            aten.std.dim,
            aten.var_mean.dim,
            aten.std_mean.dim,
            aten.any.dims,
            aten.all.dims,
        )
    ),
    op(aten.sum.default, t(2, 3)),
    op(aten.mean.default, t(2, 3)),
    op(aten.var.correction, t(2, 3, 5), [0, -1], correction=0, keepdim=True),
    op(aten.var_mean.correction, t(2, 3, 5), [1], correction=0, keepdim=True),
    op(aten.std.correction, t(2, 3, 5), [1]),
    *(
        op(p, t(2, 3, 5), 1)
        for p in (
            aten.argmax.default,
            aten.argmin.default,
            aten.max.dim,
            aten.min.dim,
            aten.median.dim,
            aten.prod.dim_int,
            aten.any.dim,
            aten.all.dim,
        )
    ),
    op(aten.max.other, t(2, 3), t(3)),
    op(aten.max.default, t(2, 3)),
    op(aten.norm.ScalarOpt_dim, t(2, 3, 5), 2, [1]),
    op(aten.linalg_vector_norm.default, t(2, 3, 5), 2, [1], True),
    op(aten.count_nonzero.dim_IntList, t(2, 3, 5), [1]),
    op(aten.aminmax.default, t(2, 3, 5), dim=1),
    # pooling and resizing
    pools(aten.max_pool2d_with_indices.default, [2, 2]),
    pools(aten.avg_pool2d.default, [2, 2]),
    op(aten.avg_pool2d.default, t(5, 7, 11), [2, 2]),
    op(aten.avg_pool1d.default, t(2, 5, 7), [2]),
    op(aten.adaptive_avg_pool1d.default, t(2, 5, 7), [3]),
    op(aten.avg_pool3d.default, t(2, 3, 5, 7, 4), [2, 2, 2]),
    op(aten.max_pool3d_with_indices.default, t(2, 3, 5, 7, 4), [2, 2, 2]),
    pools(aten._adaptive_avg_pool2d.default, [3, 3]),
    op(aten._adaptive_avg_pool3d.default, t(2, 3, 5, 7, 4), [2, 2, 2]),
    pools(aten.adaptive_max_pool2d.default, [3, 3]),
    op(aten.upsample_nearest1d.default, t(2, 5, 7), [14]),
    op(aten.upsample_linear1d.default, t(2, 5, 7), [14], False),
    pools(aten.upsample_nearest2d.default, [14, 22]),
    pools(aten.upsample_bilinear2d.default, [14, 22], False),
    pools(aten.upsample_bicubic2d.default, [14, 22], False),
    pools(aten._upsample_nearest_exact2d.default, [14, 22]),
    pools(aten._upsample_bilinear2d_aa.default, [14, 22], False),
    pools(aten._upsample_bicubic2d_aa.default, [14, 22], False),
    op(aten.upsample_nearest3d.default, t(2, 3, 5, 7, 4), [6, 8, 8]),
    op(aten.upsample_trilinear3d.default, t(2, 3, 5, 7, 4), [6, 8, 8], False),
    op(aten.reflection_pad1d.default, t(2, 5, 7), [1, 2]),
    op(aten.replication_pad1d.default, t(2, 5, 7), [1, 2]),
    pools(aten.reflection_pad2d.default, [1, 2, 3, 1]),
    pools(aten.replication_pad2d.default, [1, 2, 3, 1]),
    op(aten.tril.default, t(3, 5)),
    op(aten.triu.default, t(3, 5)),
    op(aten.tril_.default, t(3, 5)),
    op(aten.triu_.default, t(3, 5)),
    op(aten.channel_shuffle.default, t(2, 6, 5, 7), 2),
    op(aten.rot90.default, t(3, 5, 2)),
    op(aten.pixel_shuffle.default, t(2, 12, 5, 7), 2),
    op(aten.pixel_shuffle.default, t(12, 5, 7), 2),
    op(aten.pixel_unshuffle.default, t(2, 3, 4, 6), 2),
    op(aten.im2col.default, t(2, 3, 4, 6), [2, 2], [1, 1], [0, 0], [2, 2]),
    op(aten.col2im.default, t(2, 12, 6), [4, 6], [2, 2], [1, 1], [0, 0], [2, 2]),
    op(aten._weight_norm_interface.default, t(5, 3, 2), t(5, 1, 1)),
    op(aten._weight_norm_interface.default, t(3, 2, 5), t(1, 1, 5), 2),
    op(
        aten.mkldnn_rnn_layer.default,
        *(t(6, 2, 5), t(28, 5), t(28, 7), t(28), t(28), t(2, 7), t(2, 7)),
        *(False, [], 2, 7, 1, True, False, False, False),
    ),
]

#: Rules without a sample, and why.
UNSAMPLED = {
    "_conj": "makes a lazy view that meta kernels do not need",
    "view_as_real_copy": "complex tensors only",
    "cudnn_batch_norm": "runs on GPUs only",
    "mkldnn_convolution": "what convolution becomes in inference mode",
    "_convolution": "the variant of scripted models; decomposes into convolution",
    "_scaled_dot_product_efficient_attention": "runs on GPUs only",
    "_scaled_dot_product_flash_attention": "runs on GPUs only",
    "_scaled_dot_product_fused_attention_overrideable": "for backends outside PyTorch",
    "_scaled_dot_product_cudnn_attention": "runs on GPUs only",
    "_scaled_dot_product_attention_math_for_mps": "runs on Apple GPUs only",
    "softmax": "decomposes into _softmax",
    "log_softmax": "decomposes into _log_softmax",
    "native_batch_norm_legit": "no operator has this name",
    "empty.memory_format": "no operator has this name",
    "histc": "which bins there are depends on values; tests/axes/test_experts.py",
    "bincount": "which bins there are depends on values; tests/axes/test_experts.py",
}
#: Rules for operators without dimensions among their inputs: there is nothing to learn.
MAKERS = {
    *("zeros", "ones", "empty", "full", "rand", "randn", "randint", "empty_strided"),
    *("arange", "linspace", "eye", "tril_indices", "triu_indices"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
}
#: Where the meta kernel's answer is not the truth about positions.
EXCEPTIONS = {
    "rot90": "it reverses a dimension, which sizes cannot show",
    "_scaled_dot_product_flash_attention_for_cpu": (
        "the kernel gives the output the queries' last dimension; it is chosen only where the "
        "values' is as long, and the values are what is summed"
    ),
}
#: Operators whose meta kernel refuses symbols (on some sample): the rule is all there is.
NOT_LEARNED = {
    *("_grouped_mm", "split_copy", "split_with_sizes_copy", "constant_pad_nd", "_unsafe_index")
}


def call_of(sample: Sample) -> Call:
    """One operator call as the recorder would write it down."""
    packet, args, kwargs = sample
    numbers: dict[int, Ref] = {}
    kept: list[Any] = []

    def ref(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in numbers:
            kept.append(value)
            shape = tuple(value.shape)
            numbers[id(value)] = Ref(len(numbers), shape, value.dtype, len(numbers), 0)
        return numbers[id(value)]

    known_args, known_kwargs = tree_map(ref, (args, kwargs))
    copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    output = packet(*copied[0], **copied[1])
    outputs = [ref(o) for o in tree_flatten(output)[0] if isinstance(o, Tensor)]
    return Call(packet, known_args, known_kwargs, outputs, "", "", [], "")


def started(call: Call) -> Propagation:
    p = Propagation()
    for ref in call.inputs:
        p.dims.setdefault(ref.id, [Atom(n) for n in ref.shape])
    return p


def fully_pinned(dim: Dim) -> bool:
    return all(atom.pinned for atom in atoms(dim))


def agree(a: Dim, b: Dim) -> bool:
    return same(a, b) or (fully_pinned(a) and fully_pinned(b))


def title(sample: Sample) -> str:
    packet, args, _ = sample
    shapes = [tuple(a.shape) for a in tree_flatten(args)[0] if isinstance(a, Tensor)]
    return f"{packet.name().removeprefix('aten::')}{shapes}".replace(" ", "")


def name_of(sample: Sample) -> str:
    return str(sample[0]._schema.name).removeprefix("aten::")


@pytest.mark.parametrize("sample", SAMPLES, ids=title)
def test_the_rule_agrees_with_the_meta_kernel(sample: Sample) -> None:
    call = call_of(sample)
    learned = learn(call)
    if name_of(sample) in EXCEPTIONS:
        return
    p = started(call)
    results = RULES[call.name](p, call)
    assert [[d.size for d in dims] for dims in results] == [
        list(ref.shape) for ref in call.outputs
    ]
    if learned is None:
        assert name_of(sample) in NOT_LEARNED
        return
    inputs = [p.of(ref) for ref in call.inputs]
    for dims, places, ref in zip(results, learned.outputs, call.outputs, strict=True):
        for dim, place, size in zip(dims, places, ref.shape, strict=True):
            if place is None or inputs[place[0]][place[1]].size != size:
                continue
            source = inputs[place[0]][place[1]]
            assert agree(dim, source), f"{dim} is not input {place}: {source}"
    for (i, a), (j, b) in learned.equal:
        assert agree(inputs[i][a], inputs[j][b]), f"inputs {i, a} and {j, b} differ"


def unlearned() -> set[str]:
    return {name_of(sample) for sample in SAMPLES if learn(call_of(sample)) is None}


def test_the_list_of_operators_that_cannot_be_learned_is_exact() -> None:
    assert unlearned() == NOT_LEARNED


def composite(name: str) -> bool:
    """Whether PyTorch takes an operator apart before the recorder could see it."""
    packet = getattr(aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, o).name() for o in packet.overloads()]
    known = [o for o in overloads if torch._C._dispatch_has_kernel(o)]
    key = "CompositeImplicitAutograd"
    return bool(known) and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(o, key) for o in known
    )


def test_every_rule_is_sampled_or_says_why_not() -> None:
    sampled = {name_of(sample) for sample in SAMPLES}
    names = {name.removeprefix("aten::") for name in RULES}
    seen = {name for name in names if not composite(name)}
    assert seen - sampled - set(UNSAMPLED) - MAKERS == set()
    assert sampled <= names
    assert not sampled & set(UNSAMPLED)


def test_every_rule_is_named_after_an_operator() -> None:
    missing = [n for n in RULES if getattr(aten, n.removeprefix("aten::"), None) is None]
    assert missing == []


# --- by hand -----------------------------------------------------------------------------


def propagated(sample: Sample, rule: Callable[..., Any] | None = None) -> Any:
    call = call_of(sample)
    p = started(call)
    return p, [p.of(r) for r in call.inputs], (rule or RULES[call.name])(p, call)


def test_a_view_that_splits_gives_a_product() -> None:
    _, [[batch, width]], [[out_batch, heads, inner]] = propagated(
        op(aten.view.default, t(2, 15), [2, 3, 5])
    )
    assert same(batch, out_batch)
    assert [atom.size for atom in atoms(width)] == [3, 5]
    assert [find(heads), find(inner)] == list(atoms(width))


def test_a_view_that_merges_and_splits_again_meets_itself() -> None:
    _, [[a, b, c]], [[ab, same_c]] = propagated(op(aten.view.default, t(2, 3, 5), [6, 5]))
    assert same(c, same_c)
    assert list(atoms(ab)) == [a, b]


def test_a_concatenation_is_a_sum_in_order() -> None:
    _, [[r1, a], [r2, b]], [[rows, both]] = propagated(
        op(aten.cat.default, [t(2, 3), t(2, 5)], 1)
    )
    assert same(r1, r2)
    assert same(rows, r1)
    assert list(atoms(both)) == [a, b]


def test_a_grouped_convolution_couples_groups_only() -> None:
    _, [[_, channel, _], [out, inner, _]], [[_, result, _]] = propagated(
        op(aten.convolution.default, t(2, 6, 9), t(4, 3, 3), None, [2], [0], [1], False, [0], 2)
    )
    group, inside = atoms(channel)
    assert (group.size, inside.size) == (2, 3)
    assert find(inner) is inside
    assert next(atoms(out)) is group
    assert same(result, out)


def test_a_grouped_transposed_convolution_gives_groups_times_columns() -> None:
    arguments = (t(2, 6, 8), t(6, 5, 3), None, [2], [1], [1], True, [0], 2)
    _, [[_, channel, _], [rows, columns, _]], [[_, result, _]] = propagated(
        op(aten.convolution.default, *arguments)
    )
    assert same(channel, rows)
    group, _ = atoms(rows)
    assert list(atoms(result)) == [group, columns]


def test_a_group_norm_has_the_groups_outside() -> None:
    p, [[_, channel, _], [weight], [_]], _ = propagated(
        op(aten.native_group_norm.default, t(2, 6, 7), t(6), t(6), 2, 6, 7, 2, 1e-5)
    )
    group, inner = atoms(channel)
    assert (group.size, inner.size) == (2, 3)
    assert same(channel, weight)
    assert inner in {atom for dim in p.reduced for atom in atoms(dim)}
    assert group not in {atom for dim in p.reduced for atom in atoms(dim)}


def test_a_repetition_has_the_copies_outside() -> None:
    _, [[a, b]], [[five, rows, columns]] = propagated(
        op(aten.repeat.default, t(2, 3), [5, 1, 2])
    )
    assert five.size == 5
    assert find(rows) is a
    assert [atom.size for atom in atoms(columns)] == [2, 3]
    assert list(atoms(columns))[1] is b


def test_a_pad_adds_parts_before_and_after() -> None:
    _, [[_, c, _]], [[_, padded, _]] = propagated(
        op(aten.constant_pad_nd.default, t(2, 3, 5), [0, 0, 1, 2], 0.0)
    )
    assert [atom.size for atom in atoms(padded)] == [3, 2]  # a part of size 1 has no atom
    assert padded.size == 6
    assert next(atoms(padded)) is c


def test_a_broadcast_couples_only_what_is_wide() -> None:
    _, [[a, b, c], [d, e]], [[x, y, z]] = propagated(
        op(aten.add.Tensor, t(2, 1, 5), t(3, 5)), pointwise
    )
    assert same(c, e)
    assert (find(x), find(y)) == (a, d)
    assert same(z, c)
    assert b.size == 1


def test_an_operator_nobody_understands_pins_all_it_touches() -> None:
    p, inputs, [dims] = propagated(
        op(
            aten._trilinear.default,
            t(2, 1, 3, 1),
            t(1, 7, 3, 5),
            t(2, 1, 1, 5),
            [1],
            [0],
            [2],
            [3],
        ),
        learned_rule,
    )
    assert "aten::_trilinear" in p.unknown
    for dim in (*dims, *(d for row in inputs for d in row)):
        assert fully_pinned(dim) or dim.size == 1


# --- whole models: what is offered works -------------------------------------------------


class Function(nn.Module):
    """A forward given as a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.run = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def everything(model: nn.Module, *inputs: Tensor) -> Elastic:
    axes = [Width(None, head_dim=True), Heads(None), Depth()]
    return elastic(shake(model).eval(), inputs, axes=axes, verify=False)


def assert_offers_only_what_works(model: nn.Module, *inputs: Tensor) -> None:
    """Every offered size runs, and reordering units changes nothing; or nothing is offered."""
    try:
        net = everything(model, *inputs)
    except UnsupportedModelError:
        return
    for config in (net.space.smallest(), *(net.space.random(i) for i in range(4))):
        assert_active_equals_extracted(net, config)
    before = run(net, inputs, {})
    generator = torch.Generator().manual_seed(0)
    net.sort(
        {
            site.name: torch.rand(site.full, generator=generator)
            for site in net.space.sites
            if site.axis in ("width", "heads")
        }
    )
    assert_same(run(net, inputs, {}), before)


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


class DepthwiseByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 1, 3, 3))
        self.channels = 16

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, groups=self.channels, padding=1)


class RepeatedKeyValues(nn.Module):
    """Grouped-query attention as in the original Llama code."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)
        self.o = nn.Linear(24, 24)
        self.heads, self.kv_heads, self.repeats, self.width = 4, 2, 2, 6

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        k = k.repeat_interleave(self.repeats, dim=1)
        v = v.repeat_interleave(self.repeats, dim=1)
        out = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))


class TwoCuts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(8, 3)
        self.first, self.second = 8, 8

    def forward(self, x: Tensor) -> Tensor:
        outer = self.a(x)[:, :, None] * self.b(x)[:, None, :]
        corner = outer[:, : self.first, : self.second]
        rest = outer[:, self.first :, self.second :]
        return self.c((corner.sum(1) + rest.sum(1)).relu())


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(16, 3)
        self.half = 8

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 2 * self.half)
        out[:, : self.half] = self.a(x)
        out[:, self.half :] = self.b(x)
        return self.c(out)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 16), nn.Linear(10, 3)
        self.w = nn.Parameter(torch.randn(16, 4, 6))
        self.o = nn.Parameter(torch.randn(4, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btc,chd->bthd", self.a(x), self.w)
        scores = torch.einsum("bthd,bshd->bhts", h, h).softmax(-1)
        return self.c(torch.einsum("bhts,bshd,hde->bte", scores, h, self.o))


class ComplexRotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.heads = nn.Linear(5, 24), nn.Linear(24, 3), 4
        self.register_buffer(
            "turn", torch.polar(torch.ones(7, 3), torch.arange(21.0).view(7, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.a(x).view(batch, length, self.heads, -1)
        pairs = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * self.turn[None, :, None]).flatten(3)
        return self.o(turned.reshape(batch, length, -1))


def sums(bound: nn.Module) -> nn.Module:
    return Function(lambda s, x: s.c(s.a(x) + bound.run(s, x)), **linears(a=(5, 16), c=(16, 3)))


IMAGE = (2, 3, 8, 8)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "einsum": (Einsum, (2, 6, 5), ""),
    "complex rotary": (ComplexRotary, (2, 7, 5), ""),
    "in-place halves": (Scattered, (4, 5), ""),
    "multi-head attention of torch": (
        lambda: Function(
            lambda s, x: s.c(s.g(s.a(x), s.b(x), s.b(x))[0]),
            **linears(a=(5, 16), b=(5, 12), c=(16, 3)),
            g=nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True),
        ),
        (2, 6, 5),
        "",
    ),
    "prelu and instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.PReLU(8),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.Conv2d(8, 3, 1),
        ),
        IMAGE,
        "",
    ),
    "maxout": (
        lambda: Function(
            lambda s, x: s.c(s.a(x).view(x.shape[0], -1, s.k).amax(-1)),
            **linears(a=(5, 16), c=(8, 3)),
            k=2,
        ),
        (4, 5),
        "",
    ),
    "distances to prototypes": (
        lambda: Function(
            lambda s, x: s.c(torch.cdist(s.a(x), s.p)),
            **linears(a=(5, 16), c=(9, 3)),
            p=nn.Parameter(torch.randn(9, 16)),
        ),
        (4, 5),
        "",
    ),
    "fourier transform of features": (
        lambda: Function(
            lambda s, x: s.c(torch.fft.fft(s.a(x)).real), **linears(a=(5, 16), c=(16, 3))
        ),
        (4, 5),
        "",
    ),
    "reversed features": (
        lambda: Function(lambda s, x: s.c(s.a(x).flip(-1)), **linears(a=(5, 16), c=(16, 3))),
        (4, 5),
        "",
    ),
    "channel attention by convolution": (
        lambda: Function(
            lambda s, x: s.c((s.a(x) * s.e(s.a(x)[:, None]).sigmoid()[:, 0]).relu()),
            **linears(a=(5, 16), c=(16, 3)),
            e=nn.Conv1d(1, 1, 3, padding=1),
        ),
        (4, 5),
        "",
    ),
    "patch mixing": (
        lambda: Function(
            lambda s, x: s.c(s.t(s.n(s.p(x).flatten(2).transpose(1, 2)).mT).relu().mean(2)),
            p=nn.Conv2d(3, 16, 4, 4),
            n=nn.LayerNorm(16),
            **linears(t=(4, 10), c=(16, 3)),
        ),
        IMAGE,
        "",
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PixelShuffle(2), nn.Conv2d(4, 3, 3)
        ),
        IMAGE,
        "",
    ),
    "patches unfolded and folded": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Unfold(2, stride=2),
            nn.Fold((8, 8), 2, stride=2),
            nn.Conv2d(16, 3, 1),
        ),
        IMAGE,
        "",
    ),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
            nn.Tanh(),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 3, 3)),
        ),
        IMAGE,
        "",
    ),
    "a convolution of one place": (
        lambda: Function(
            lambda s, x: s.b(s.e(s.a(x))), **linears(a=(5, 16), b=(16, 3)), e=nn.Conv1d(6, 6, 1)
        ),
        (4, 6, 5),
        "",
    ),
    "pixel unshuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(32, 3, 1)
        ),
        IMAGE,
        "",
    ),
    "channel shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ChannelShuffle(2), nn.ReLU(), nn.Conv2d(16, 3, 1)
        ),
        IMAGE,
        "",
    ),
    "gated linear unit of torch": (
        lambda: nn.Sequential(nn.Linear(5, 16), nn.GLU(), nn.Linear(8, 3)),
        (4, 5),
        "",
    ),
    "selection by a mask": (
        lambda: Function(
            lambda s, x: s.c(s.n(s.a(x))[s.m]),
            **linears(a=(5, 16), c=(16, 3)),
            n=nn.LayerNorm(16),
            m=torch.tensor([True, False, True, True]),
        ),
        (4, 5),
        "",
    ),
    "convolution over features": (
        lambda: Function(
            lambda s, x: s.c(s.b(s.a(x).relu()[:, None]).flatten(1)),
            **linears(a=(5, 16), c=(56, 3)),
            b=nn.Conv1d(1, 4, 3),
        ),
        (4, 5),
        "",
    ),
    "pooling over features": (
        lambda: Function(
            lambda s, x: s.c(F.avg_pool1d(s.a(x), 2)), **linears(a=(5, 16), c=(8, 3))
        ),
        (4, 6, 5),
        "",
    ),
    "the largest few": (
        lambda: Function(
            lambda s, x: s.c(s.a(x).topk(6, -1).values), **linears(a=(5, 16), c=(6, 3))
        ),
        (4, 5),
        "",
    ),
    "lower triangle of features": (
        lambda: Function(
            lambda s, x: s.c(torch.tril(s.a(x)).sum(1)), **linears(a=(5, 16), c=(16, 3))
        ),
        (2, 9, 5),
        "",
    ),
    "a constant of integers": (
        lambda: sums(Function(lambda s, x: torch.full((x.shape[0], 16), 1))),
        (4, 5),
        "",
    ),
    "a new constant of integers": (
        lambda: sums(Function(lambda s, x: x.new_full((x.shape[0], 16), 1))),
        (4, 5),
        "",
    ),
    "random integers": (
        lambda: sums(Function(lambda s, x: torch.randint(1, 2, (x.shape[0], 16)))),
        (4, 5),
        "",
    ),
    "groups before padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), DepthwiseByKeyword(), nn.Conv2d(16, 3, 1)),
        IMAGE,
        "",
    ),
    "repeat_interleave of key-value heads": (
        RepeatedKeyValues,
        (2, 7, 24),
        "",
    ),
    "two cuts of equal size": (
        TwoCuts,
        (4, 5),
        "",
    ),
    "a size asserted as a literal": (
        lambda: Function(_asserts, **linears(a=(5, 16), c=(16, 3))),
        (4, 5),
        "",
    ),
    "nested outputs": (
        lambda: Function(
            lambda s, x: {"features": {"last": s.c(s.a(x).relu())}},
            **linears(a=(5, 16), c=(16, 13)),
        ),
        (4, 5),
        "",
    ),
    "parameters read from the dictionary": (
        lambda: Function(
            lambda s, x: s.c(F.linear(x, s.a._parameters["weight"])),
            **linears(a=(5, 16), c=(16, 3)),
        ),
        (4, 5),
        "modules that read _parameters see no slice",
    ),
    "strides of the code's own": (
        lambda: Function(
            lambda s, x: s.b(s.a(x).relu().as_strided((4, 16), (1, 4))),
            **linears(a=(5, 16), b=(16, 3)),
        ),
        (4, 5),
        "",
    ),
    "a transpose in place": (
        lambda: Function(
            lambda s, x: s.b(s.a(x).relu().transpose_(0, 1).transpose(0, 1)),
            **linears(a=(5, 16), b=(16, 3)),
        ),
        (4, 6, 5),
        "",
    ),
    "recurrent layer without biases": (
        lambda: Function(
            lambda s, x: s.c(s.g(s.a(x))[0]),
            **linears(a=(5, 16), c=(12, 3)),
            g=nn.LSTM(16, 12, bias=False),
        ),
        (2, 6, 5),
        "",
    ),
    "recurrent layer with a projection": (
        lambda: Function(
            lambda s, x: s.c(s.g(s.a(x))[0]),
            **linears(a=(5, 16), c=(8, 3)),
            g=nn.LSTM(16, 12, proj_size=8),
        ),
        (2, 6, 5),
        "PyTorch itself takes a projection that is as wide as the hidden state for none",
    ),
    "gated recurrent unit": (
        lambda: Function(
            lambda s, x: s.c(s.g(s.a(x))[0]),
            **linears(a=(5, 16), c=(12, 3)),
            g=nn.GRU(16, 12, batch_first=True),
        ),
        (2, 6, 5),
        "",
    ),
}


def _asserts(s: Any, x: Tensor) -> Tensor:
    hidden = s.a(x)
    assert hidden.shape[-1] == 16
    return s.c(hidden)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[bug(m[2])] if m[2] else []) for n, m in MODELS.items()]
)
def test_what_is_offered_works(name: str) -> None:
    build, shape, _ = MODELS[name]
    generator = torch.Generator().manual_seed(2)
    assert_offers_only_what_works(build(), torch.randn(shape, generator=generator))


def test_the_models_that_have_no_known_defect_offer_something() -> None:
    offered = {"einsum", "complex rotary", "in-place halves", "maxout", "patch mixing"}
    offered |= {"pixel shuffle", "pixel unshuffle", "gated recurrent unit", "weight norm"}
    offered |= {"patches unfolded and folded"}
    offered |= {"a convolution of one place", "a transpose in place"}
    for name in offered:
        build, shape, reason = MODELS[name]
        assert not reason
        assert everything(build(), torch.randn(shape)).space.sites, name


class StandardizedConv(nn.Conv2d):
    """Every filter has mean 0 and variance 1 over the input channels and its window."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


def test_filters_standardized_over_their_inputs_are_not_compared_with_masked_ones() -> None:
    model = nn.Sequential(StandardizedConv(3, 16, 3), nn.ReLU(), StandardizedConv(16, 3, 1))
    net = elastic(shake(model), torch.randn(2, 3, 6, 6))
    assert [site.name for site in net.space.sites] == ["0"]
