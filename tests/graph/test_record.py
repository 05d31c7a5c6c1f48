"""One recorded run: what is seen, and that the model is left as it was."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from supple.errors import UnsupportedModelError
from supple.graph.integers import AttributeKey, Operation, Size, TracedInt
from supple.graph.record import Recording, record
from tests.graph.checks import assert_untouched, state_of, tensor_values
from tests.zoo import ZOO


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.heads = 4
        self.register_buffer("table", torch.arange(12.0), persistent=False)
        self.config = SimpleNamespace(width=12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).view(x.shape[0], self.heads, self.config.width // self.heads)
        return F.relu(y.flatten(1) + self.table)


def names(recording: Recording) -> list[str]:
    return [call.name.removeprefix("aten::") for call in recording.calls]


def inputs() -> tuple[Tensor, ...]:
    return (torch.randn(5, 12, generator=torch.Generator().manual_seed(0)),)


# --- what is seen ------------------------------------------------------------------------


def test_calls_are_recorded_in_order_with_their_module() -> None:
    recording = record(nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)), inputs())
    assert names(recording) == ["t", "addmm", "relu", "t", "addmm"]
    assert [call.module for call in recording.calls] == ["0", "0", "1", "2", "2"]


def test_tensors_keep_their_number_from_call_to_call() -> None:
    recording = record(nn.Sequential(nn.Linear(12, 7), nn.ReLU()), inputs())
    transpose, addmm, relu = recording.calls
    assert transpose.inputs == [recording.tensors["0.weight"]]
    assert addmm.inputs == [
        recording.tensors["0.bias"],
        recording.inputs[0],
        transpose.outputs[0],
    ]
    assert relu.inputs == addmm.outputs
    assert recording.outputs == relu.outputs
    assert recording.outputs[0].shape == (5, 7)


def test_views_share_their_storage() -> None:
    recording = record(Block(), inputs())
    by_name = {call.name: call for call in recording.calls}
    view, addmm = by_name["aten::view"], by_name["aten::addmm"]
    assert view.outputs[0].storage == addmm.outputs[0].storage
    assert addmm.outputs[0].storage != recording.inputs[0].storage
    assert addmm.outputs[0].nbytes == 5 * 12 * 4


def test_module_calls_are_seen_with_what_went_in_and_out() -> None:
    recording = record(nn.Sequential(Block(), Block()), inputs())
    paths = [call.path for call in recording.modules]
    assert paths == ["", "0", "0.linear", "1", "1.linear"]
    assert [call.depth for call in recording.modules] == [0, 1, 2, 1, 2]
    first, second = recording.modules[1], recording.modules[3]
    assert first.outputs == second.inputs
    assert first.last == second.first
    assert recording.modules[0].first == 0
    assert recording.modules[0].last == len(recording.calls)


def test_integers_of_the_code_are_kept_with_their_expressions() -> None:
    recording = record(Block(), inputs())
    view = next(call for call in recording.calls if call.function == "view")
    batch, heads, width = view.integers
    assert isinstance(batch, TracedInt)
    assert batch.expression == Size(recording.inputs[0].id, 0)
    assert heads.expression == AttributeKey("", ("heads",))  # type: ignore[union-attr]
    assert width.expression == Operation(  # type: ignore[union-attr]
        "//", AttributeKey("", ("config", "width")), AttributeKey("", ("heads",))
    )
    assert view.where.startswith("test_record.py:")


def test_equal_sizes_are_noted() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 12

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == self.width
            return x + 1

    recording = record(Checks(), inputs())
    expected = (Size(recording.inputs[0].id, 1), AttributeKey("", ("width",)))
    assert recording.equalities == [expected]


def test_a_size_that_equals_a_literal_is_noted() -> None:
    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 12:
                raise ValueError("twelve, please")
            return x + 1

    assert record(Checks(), inputs()).equalities != []


def test_tied_parameters_are_one_tensor_under_every_name() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(12, 12), nn.Linear(12, 12)
    model.b.weight = model.a.weight
    model.forward = lambda x: model.b(model.a(x))
    recording = record(model, inputs())
    assert recording.aliases["b.weight"] == "a.weight"
    assert "b.weight" not in recording.tensors
    first, second = (call for call in recording.calls if call.name == "aten::t")
    assert first.inputs == second.inputs == [recording.tensors["a.weight"]]


def test_a_module_under_two_paths_is_recorded_under_the_first() -> None:
    shared = nn.Linear(12, 12)
    recording = record(nn.Sequential(shared, nn.ReLU(), shared), inputs())
    assert [call.path for call in recording.modules] == ["", "0", "1", "0"]
    assert recording.aliases["2.weight"] == "0.weight"


def test_storages_are_freed_when_nothing_holds_them() -> None:
    recording = record(nn.Sequential(*[nn.Linear(12, 12) for _ in range(4)]), inputs())
    freed = [storage for call in recording.calls for storage in call.freed]
    inner = [call.outputs[0].storage for call in recording.calls if call.name == "aten::addmm"]
    assert [storage for storage in freed if storage in inner] == inner[:-2]
    held = {ref.storage for ref in (*recording.tensors.values(), *recording.inputs)}
    assert not held & set(freed)


def test_a_tensor_needed_later_is_not_freed_early() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(self.b(y)) + y

    recording = record(Skip(), inputs())
    addition = next(i for i, call in enumerate(recording.calls) if call.name == "aten::add")
    kept = recording.calls[1].outputs[0].storage
    assert recording.calls[1].name == "aten::addmm"
    assert not any(kept in call.freed for call in recording.calls[:addition])


def test_keyword_inputs_nested_inputs_and_outputs_are_seen() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Tensor]:
            return {"sum": pair[0] + pair[1], "scaled": pair[0] * scale}

    a, b = torch.ones(2, 3), torch.ones(2, 3)
    recording = record(Nested(), ((a, b),), {"scale": torch.ones(3)})
    assert [ref.shape for ref in recording.inputs] == [(2, 3), (2, 3), (3,)]
    assert [ref.shape for ref in recording.outputs] == [(2, 3), (2, 3)]


def test_the_same_input_twice_is_one_tensor() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    x = torch.ones(2, 3)
    recording = record(Add(), (x, x))
    assert recording.calls[0].inputs[0] == recording.calls[0].inputs[1]


def test_nested_outputs_that_nothing_uses_further_are_seen() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"features": {"last": x + 1}}

    assert len(record(Nested(), inputs()).outputs) == 1


def test_models_on_the_meta_device_are_recorded() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 7), nn.BatchNorm1d(7))
    recording = record(model, inputs())
    assert names(recording)[:2] == ["t", "addmm"]
    assert recording.outputs[0].shape == (5, 7)
    assert all(p.is_meta for p in model.parameters())


def test_control_flow_on_values_is_run_for_real() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > -1e9 else x

    recording = record(Branches(), inputs())
    assert not recording.fake
    assert "addmm" in names(recording)


def test_a_forward_that_fails_says_what_failed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear fails.*mat1 and mat2"):
        record(nn.Linear(11, 3), inputs())
    with pytest.raises(UnsupportedModelError, match="args and kwargs"):
        record(Block(), ())


def test_recording_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, args, kwargs = ZOO["mixtral"]()
    fakes = logging.getLogger("torch._subclasses.fake_tensor")
    fakes.addHandler(caplog.handler)
    try:
        record(model, args, kwargs)
    finally:
        fakes.removeHandler(caplog.handler)
    assert [entry for entry in caplog.records if entry.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("family", ["roberta", "resnet_basic", "t5", "swin", "glu_mlp"])
def test_a_run_on_fake_tensors_sees_what_a_real_run_sees(family: str) -> None:
    model, args, kwargs = ZOO[family]()
    real, fake = (record(model, args, kwargs, fake=choice) for choice in (False, True))
    assert (real.fake, fake.fake) == (False, True)
    assert names(real) == names(fake)
    assert [[r.shape for r in c.outputs] for c in real.calls] == [
        [r.shape for r in c.outputs] for c in fake.calls
    ]
    assert len(real.equalities) == len(fake.equalities)


# --- the model is left as it was ---------------------------------------------------------


def assert_nothing_patched(before: tuple[Any, ...]) -> None:
    assert before == patched()
    assert TracedInt.on_equal is None


def patched() -> tuple[Any, ...]:
    """What the recorder replaces while it runs."""
    return (
        nn.Module._call_impl,
        F.has_torch_function_unary,
        F.has_torch_function,
        F.has_torch_function_variadic,
        torch.functional.has_torch_function,
        torch._tensor.has_torch_function_unary,
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("family", ["bert", "t5", "swin", "resnet_basic", "mixtral", "mamba"])
def test_a_recorded_model_is_bitwise_as_it_was(family: str) -> None:
    model, args, kwargs = ZOO[family]()
    model.train()
    next(iter(model.children())).eval()
    with torch.no_grad():
        before, values, mode = state_of(model), tensor_values(model), patched()
    torch_state = torch.get_rng_state()
    record(model, args, kwargs)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    with torch.no_grad():
        assert_nothing_patched(mode)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_after_an_exception_the_model_is_as_it_was() -> None:
    class Fails(Block):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("on purpose")

    model = nn.Sequential(Block(), Fails()).train()
    handle = model[0].register_forward_hook(lambda *_: None)
    before, mode = state_of(model), patched()
    with pytest.raises(UnsupportedModelError, match="on purpose"):
        record(model, inputs())
    assert_untouched(model, before)
    assert_nothing_patched(mode)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    handle.remove()


def test_hooks_of_the_user_still_run_and_stay() -> None:
    model, seen = nn.Sequential(nn.Linear(12, 7)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    before = state_of(model)
    record(model, inputs())
    assert seen == [1]
    assert_untouched(model, before)
    handle.remove()


def test_no_mode_is_left_active() -> None:
    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            Counts.calls += 1
            return func(*args, **(kwargs or {}))

    record(Block(), inputs())
    with Counts():
        result = torch.ones(2) + 1
    assert Counts.calls >= 1
    assert not isinstance(result, FakeTensor)


def test_inputs_are_not_changed() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            return x

    (x,) = inputs()
    kept = x.clone()
    record(Writes(), (x,))
    assert torch.equal(x, kept)


def test_a_buffer_that_the_forward_counts_in_is_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    model = Counts()
    record(model, inputs())
    assert model.calls == 0


def test_the_random_state_stays_although_the_forward_draws() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape)

    before = torch.get_rng_state()
    record(Noisy(), inputs())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recording_keeps_no_tensors_alive() -> None:
    model = Block()
    recording = record(model, inputs())
    alive = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert all(reference() is None for reference in alive)
    assert recording.calls


def test_a_tensor_that_the_forward_remembers_is_not_a_fake_one() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 7)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.linear(x)
            return self.last

    model = Remembers()
    record(model, inputs())
    assert not isinstance(model.last, FakeTensor)


def test_an_integer_that_the_forward_remembers_is_not_traced() -> None:
    class Remembers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.shape[1]
            return x + self.seen

    model = Remembers()
    record(model, inputs())
    assert type(getattr(model, "seen", 0)) is int


def test_a_module_under_two_paths_keeps_its_parameters() -> None:
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    record(model, inputs(), fake=True)
    assert not isinstance(shared.weight, FakeTensor)


def test_a_recurrent_layer_keeps_its_flat_weights() -> None:
    model = nn.LSTM(12, 7)
    record(model, (torch.randn(3, 2, 12),))
    assert model._flat_weights[0] is model.weight_ih_l0
