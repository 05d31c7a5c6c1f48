"""One step of training: which gradients meet, and what moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from supple.errors import SettingError, SuppleError
from supple.training.losses import Distillation, Labels, soft_cross_entropy
from supple.training.step import Pass, Sampler, Seen, SizesRun, StepOptions, WholeOnly
from tests.training import stub


@dataclass(frozen=True)
class Fixed(Sampler):
    """The same passes in every step."""

    passes: tuple[Pass, ...]

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        return self.passes


class Watcher(Fixed):
    """Remembers what it observed."""

    def observe(self, told: Seen) -> None:
        seen.append((told.entry.role, told.loss.item(), told.net))


seen: list[tuple[str, float, object]] = []


def sgd(net: stub.Stub, **settings: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.module.parameters(), **{"lr": 0.1, **settings})


def started(net: stub.Stub, passes: Sequence[Pass], **settings: object) -> SizesRun:
    criterion = settings.pop("criterion", Labels(stub.loss))
    optimizer = settings.pop("optimizer", None) or sgd(net)
    return SizesRun(net, optimizer, Fixed(tuple(passes)), criterion, **settings)


def gradients(net: stub.Stub, configs: Sequence[dict[str, int]], batch: object) -> list[dict]:
    """What each size's own backward puts on the owners."""
    each = []
    for config in configs:
        net.module.zero_grad()
        with net.at(config):
            stub.loss(net.module(batch[0]), batch).backward()
        each.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in net.module.named_parameters()
            }
        )
    net.module.zero_grad()
    return each


FULL, HALF, THIN = {"width": 8, "depth": 1}, {"width": 4, "depth": 1}, {"width": 2, "depth": 0}


def passes(net: stub.Stub, *sizes: tuple[dict[str, int], str]) -> list[Pass]:
    return [Pass(net.space.config(size), role) for size, role in sizes]


@pytest.mark.parametrize(("aggregate", "scale"), [("sum", 1.0), ("mean", 1 / 3)])
def test_a_step_adds_up_the_gradients_of_all_sizes(aggregate, scale):
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    each = gradients(net, [FULL, HALF, THIN], batch)
    run = started(net, passes(net, (FULL, "a"), (HALF, "b"), (THIN, "c")), aggregate=aggregate)
    run.step(batch)
    for name, p in net.module.named_parameters():
        expected = before[name] - 0.1 * scale * sum(g[name] for g in each)
        torch.testing.assert_close(p.detach(), expected)


def test_masked_mean_divides_by_the_passes_that_used_an_element():
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    each = gradients(net, [FULL, HALF, THIN], batch)
    passes_ = passes(net, (FULL, "a"), (HALF, "b"), (THIN, "c"))
    started(net, passes_, aggregate="masked_mean").step(batch)
    used = torch.tensor([3.0, 3, 2, 2, 1, 1, 1, 1])
    total = sum(g["fc1.weight"] for g in each) / used[:, None]
    torch.testing.assert_close(
        net.module.fc1.weight.detach(), before["fc1.weight"] - 0.1 * total
    )
    block = torch.tensor([2.0, 2, 2, 2, 1, 1, 1, 1])  # the thin size skips the block
    total = sum(g["block.bias"] for g in each) / block
    torch.testing.assert_close(
        net.module.block.bias.detach(), before["block.bias"] - 0.1 * total
    )


def test_a_weight_scales_the_gradient_and_not_the_reported_loss():
    losses, moves = [], []
    for weight in (1.0, 0.25):
        net, batch = stub.mlp(), stub.vectors()[0]
        before = stub.weights(net.module)
        run = started(net, [Pass(net.space.largest(), "a", weight=weight)])
        losses.append(run.step(batch)["a"])
        moves.append(net.module.fc1.weight.detach() - before["fc1.weight"])
    assert losses[0] == losses[1]
    torch.testing.assert_close(moves[0] * 0.25, moves[1])


def test_passes_on_parts_see_the_batch_once_between_them():
    net, batch = stub.mlp(), stub.vectors(size=7)[0]
    before = stub.weights(net.module)
    largest = net.space.largest()
    run = started(net, [Pass(largest, "a", part=i, parts=3) for i in range(3)])
    run.step(batch)
    expected = stub.mlp()
    for rows in (slice(0, 3), slice(3, 5), slice(5, 7)):
        part = (batch[0][rows], batch[1][rows])
        stub.loss(expected.module(part[0]), part).backward()
    for name, p in expected.module.named_parameters():
        moved = net.module.get_parameter(name).detach() - before[name]
        torch.testing.assert_close(moved, -0.1 * p.grad)


def test_a_batch_with_fewer_examples_than_parts_runs_one_pass_each():
    net, batch = stub.mlp(), stub.vectors(size=2)[0]
    run = started(net, [Pass(net.space.largest(), "a", part=i, parts=4) for i in range(4)])
    run.step(batch)
    assert run.passes == 2


def test_students_learn_from_the_teachers_detached_output_of_the_same_step():
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    run = started(
        net,
        passes(net, (FULL, "largest"), (HALF, "random")),
        criterion=Distillation(stub.loss, temperature=2.0, labels=0.5),
    )
    losses = run.step(batch)
    other = stub.mlp()
    teacher = other.module(batch[0])
    stub.loss(teacher, batch).backward()
    with other.at(HALF):
        output = other.module(batch[0])
        soft = soft_cross_entropy(output, teacher, temperature=2.0)
        (soft + 0.5 * stub.loss(output, batch)).backward()
    assert losses["random"] == pytest.approx(
        (soft + 0.5 * stub.loss(output, batch)).item(), rel=1e-6
    )
    for name, p in other.module.named_parameters():
        torch.testing.assert_close(
            net.module.get_parameter(name).detach(), before[name] - 0.1 * p.grad
        )


def test_outputs_that_later_passes_see_hold_no_graph():
    net, held = stub.mlp(), []

    @dataclass(frozen=True)
    class Looking(Labels):
        teachers: frozenset[str] = frozenset({"a"})

        def __call__(self, entry, output, batch, earlier):
            held.append({role: [z.requires_grad for z in zs] for role, zs in earlier.items()})
            return self.loss(output, batch)

    sizes = passes(net, (FULL, "a"), (HALF, "b"), (THIN, "a"), (THIN, "c"))
    started(net, sizes, criterion=Looking(stub.loss)).step(stub.vectors()[0])
    assert held == [{}, {"a": [False]}, {"a": [False]}, {"a": [False, False]}]


def test_a_student_before_its_teacher_is_refused():
    net = stub.mlp()
    run = started(
        net,
        passes(net, (HALF, "random"), (FULL, "largest")),
        criterion=Distillation(stub.loss),
    )
    with pytest.raises(SettingError, match="'largest', which has not run"):
        run.step(stub.vectors()[0])


def test_a_frozen_teacher_gives_its_output_under_its_role():
    net, batch = stub.mlp(), stub.vectors()[0]
    teacher = stub.mlp(seed=7, dropout=0.5).module
    run = SizesRun(
        net,
        sgd(net),
        Fixed(tuple(passes(net, (HALF, "random")))),
        Distillation(stub.loss, teacher="teacher"),
        teachers={"teacher": teacher},
    )
    with net.at(HALF):
        expected = soft_cross_entropy(net.module(batch[0]), teacher.eval()(batch[0]))
    assert run.step(batch)["random"] == pytest.approx(expected.item(), rel=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_dropout_is_off_in_passes_that_are_not_regularised():
    net, batch = stub.mlp(dropout=0.5), stub.vectors()[0]
    net.module.train()
    with net.at(HALF):
        net.module.eval()
        plain = stub.loss(net.module(batch[0]), batch).item()
        net.module.train()
    half = net.space.config(HALF)
    run = started(net, [Pass(half, "off", regularise=False), Pass(half, "on")])
    losses = run.step(batch)
    assert losses["off"] == pytest.approx(plain, rel=1e-6)
    assert losses["on"] != pytest.approx(plain, rel=1e-3)
    assert all(part.training for part in net.module.modules())


def test_batch_norm_keeps_batch_statistics_in_passes_that_are_not_regularised():
    net, batch = stub.cnn(), stub.images()[0]
    net.module.train()
    largest = net.space.largest()
    run = started(net, [Pass(largest, "off", regularise=False), Pass(largest, "on")])
    losses = run.step(batch)
    assert losses["off"] == pytest.approx(losses["on"], rel=1e-6)
    assert net.module.bn.num_batches_tracked == 2


def test_weight_decay_is_off_in_steps_without_a_regularised_pass():
    net, batch = stub.mlp(), stub.vectors()[0]
    optimizer = sgd(net, weight_decay=0.5)
    run = started(
        net, [Pass(net.space.config(THIN), "a", regularise=False)], optimizer=optimizer
    )
    before = stub.weights(net.module)
    run.step(batch)
    assert torch.equal(net.module.fc1.weight[2:], before["fc1.weight"][2:])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_parameter_that_no_size_ever_used_is_left_to_itself():
    net = stub.mlp()
    net.module.spare = nn.Parameter(torch.ones(3))
    run = started(net, passes(net, (FULL, "a")), optimizer=sgd(net, weight_decay=0.5))
    run.step(stub.vectors()[0])
    assert torch.equal(net.module.spare.detach(), torch.ones(3))


def test_clipping_bounds_the_joint_gradient():
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    options = StepOptions(clip=0.01)
    started(net, passes(net, (FULL, "a"), (HALF, "b")), options=options).step(batch)
    moved = [p.detach() - before[name] for name, p in net.module.named_parameters()]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(
        1e-3, rel=1e-3
    )


def test_bf16_computes_outputs_in_bfloat16_and_keeps_float32_weights():
    net, batch = stub.mlp(), stub.vectors()[0]
    dtypes = []

    def forward(model, batch):
        output = model(batch[0])
        dtypes.append(output.dtype)
        return output

    run = started(
        net,
        passes(net, (FULL, "largest"), (HALF, "random")),
        criterion=Distillation(stub.loss),
        forward=forward,
        options=StepOptions(precision="bf16"),
    )
    run.step(batch)
    assert dtypes == [torch.bfloat16] * 2
    assert net.module.fc1.weight.dtype == torch.float32


def test_the_schedule_sets_each_groups_rate_from_its_own_peak():
    net = stub.mlp()
    groups = [
        {"params": net.module.fc1.parameters(), "lr": 0.5},
        {"params": net.module.fc2.parameters(), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    options = StepOptions(schedule=lambda step, steps: 1 / (1 + step), steps=4)
    run = started(net, passes(net, (FULL, "a")), optimizer=optimizer, options=options)
    for _ in range(2):
        run.step(stub.vectors()[0])
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.1]


def test_the_sampler_observes_each_pass():
    net = stub.mlp()
    seen.clear()
    run = SizesRun(
        net,
        sgd(net),
        Watcher(tuple(passes(net, (FULL, "a"), (THIN, "b")))),
        Labels(stub.loss),
    )
    losses = run.step(stub.vectors()[0])
    assert [(role, loss) for role, loss, _ in seen] == list(losses.items())
    assert seen[0][2] is net


def test_losses_are_averaged_by_role():
    net, batch = stub.mlp(), stub.vectors()[0]
    run = started(net, passes(net, (FULL, "a"), (HALF, "b"), (THIN, "b")))
    with torch.no_grad():
        each = []
        for size in (HALF, THIN):
            with net.at(size):
                each.append(stub.loss(net.module(batch[0]), batch).item())
    assert run.step(batch)["b"] == pytest.approx(sum(each) / 2, rel=1e-6)


def test_a_step_forgets_recalibrated_statistics():
    net = stub.mlp()
    net.statistics[net.space.smallest()] = {}
    started(net, passes(net, (FULL, "a"))).step(stub.vectors()[0])
    assert not net.statistics


def test_a_loss_that_is_not_finite_names_role_and_leaves_the_weights():
    net, batch = stub.mlp(), stub.vectors()[0]
    before = stub.weights(net.module)
    run = started(
        net,
        passes(net, (FULL, "a"), (HALF, "tail")),
        criterion=Labels(lambda output, batch: output.sum() / (len(net.active) % 2)),
    )
    with pytest.raises(SuppleError, match=r"'tail' is (inf|-inf|nan) at step 0 \(Config"):
        run.step(batch)
    assert stub.equal(stub.weights(net.module), before)


@pytest.mark.parametrize("value", [torch.zeros(3, requires_grad=True), 0.5, torch.tensor(1.0)])
def test_a_loss_that_is_no_scalar_of_the_weights_is_refused(value):
    net = stub.mlp()
    run = started(net, passes(net, (FULL, "a")), criterion=Labels(lambda o, b: value))
    with pytest.raises(SettingError, match="must be a scalar tensor"):
        run.step(stub.vectors()[0])


def test_a_plain_module_trains_alone_and_has_no_sizes():
    module = stub.mlp().module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    run = SizesRun(module, optimizer, WholeOnly(), Labels(stub.loss))
    assert set(run.step(stub.vectors()[0])) == {"largest"}
    sized = SizesRun(
        module, optimizer, WholeOnly(stub.mlp().space.largest()), Labels(stub.loss)
    )
    with pytest.raises(SettingError, match="no sizes"):
        sized.step(stub.vectors()[0])


def test_an_optimizer_over_other_parameters_is_refused():
    with pytest.raises(SettingError, match="none of the network's parameters"):
        started(stub.mlp(), (), optimizer=sgd(stub.mlp(seed=1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"schedule": lambda step, steps: 1.0}, "number of steps"),
    ],
)
def test_options_are_checked(settings, message):
    with pytest.raises(SettingError, match=message):
        StepOptions(**settings)


def test_a_restart_forgets_moments_and_the_average():
    net, batches = stub.mlp(), stub.vectors()
    optimizer = sgd(net, momentum=0.9)
    options = StepOptions(ema=0.5)
    run = started(net, passes(net, (FULL, "a")), optimizer=optimizer, options=options)
    for batch in batches[:2]:
        run.step(batch)
    assert optimizer.state
    run.restart()
    assert not optimizer.state
    assert run.average.updates == 0
    # as a run with a new optimizer goes on from these weights
    other = stub.mlp()
    other.module.load_state_dict(net.module.state_dict())
    fresh = started(other, passes(net, (FULL, "a")), optimizer=sgd(other, momentum=0.9))
    for batch in batches[2:]:
        run.step(batch)
        fresh.step(batch)
    assert stub.equal(stub.weights(net.module), stub.weights(other.module))


def test_adagrad_is_not_restarted():
    net = stub.mlp()
    adagrad = torch.optim.Adagrad(net.module.parameters())
    run = started(net, passes(net, (FULL, "a")), optimizer=adagrad)
    with pytest.raises(SettingError, match="Adagrad can't be restarted"):
        run.restart()


def test_a_kept_teacher_is_the_network_as_it_was_and_is_saved():
    net, batches = stub.cnn(dropout=0.5), stub.images()
    criterion = Distillation(stub.loss, "old", labels=1.0, taught=frozenset({"small"}))
    small = [Pass(net.space.config(width=4), "small")]

    def begun(net: stub.Stub) -> SizesRun:
        return started(net, small, criterion=criterion)

    run = begun(net)
    run.keep_teacher("old")
    before = stub.weights(net.module)
    run.step(batches[0])
    teacher = stub.cnn(dropout=0.5)
    teacher.module.load_state_dict(before)
    teacher.module.eval()
    again = begun(net)
    again.load_state_dict(run.state_dict())
    for one in (run, again):
        kept = one._teachers["old"]
        assert not kept.training
        assert not any(p.requires_grad for p in kept.parameters())
        assert torch.equal(kept(batches[1][0]), teacher.module(batches[1][0]))
    assert not stub.equal(stub.weights(net.module), before)


@dataclass(frozen=True)
class Halving(Fixed):
    """Halves the rate from step to step."""

    def rate(self, step: int, steps: int | None) -> float:
        return 0.5**step


def test_a_samplers_rate_multiplies_the_schedule_and_needs_no_number_of_steps():
    net = stub.mlp()
    sampler = Halving(tuple(passes(net, (FULL, "a"))))
    run = SizesRun(net, sgd(net), sampler, Labels(stub.loss))
    rates = []
    for batch in stub.vectors():
        run.step(batch)
        rates.append(run.lr)
    assert rates == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    options = StepOptions(schedule=lambda step, steps: 1 - step / steps, steps=4)
    run = SizesRun(net, sgd(net), sampler, Labels(stub.loss), options=options)
    run.step(stub.vectors()[0])
    run.step(stub.vectors()[1])
    assert run.lr == pytest.approx(0.1 * 0.75 * 0.5)
    # a run that goes on with the same optimizer knows the rate that it began with
    again = SizesRun(net, run.optimizer, sampler, Labels(stub.loss), options=options)
    again.load_state_dict(run.state_dict())
    again.step(stub.vectors()[2])
    assert again.lr == pytest.approx(0.1 * 0.5 * 0.25)


def test_the_sampler_may_begin_each_step():
    class Beginning(Fixed):
        def begin(self, run: SizesRun) -> None:
            begun.append((run.steps, run.options.steps))

    begun: list[tuple[int, int | None]] = []
    net = stub.mlp()
    sampler = Beginning(tuple(passes(net, (FULL, "a"))))
    run = SizesRun(net, sgd(net), sampler, Labels(stub.loss), options=StepOptions(steps=7))
    for batch in stub.vectors()[:2]:
        run.step(batch)
    assert begun == [(0, 7), (1, 7)]


def test_gradients_of_one_pass_change_nothing():
    net, batch = stub.mlp(), stub.vectors()[0]
    entry = Pass(net.space.smallest(), "a", weight=2.0)
    run = started(net, [entry])
    first = next(net.module.parameters())
    first.grad = torch.ones_like(first)
    before = stub.weights(net.module)
    found = run.gradients(entry, batch)
    assert torch.equal(first.grad, torch.ones_like(first))
    for name, value in stub.weights(net.module).items():
        assert torch.equal(value, before[name])
    run.optimizer.zero_grad()
    with net.at(entry.config):
        (2 * stub.loss(net.module(batch[0]), batch)).backward()
    for name, p in net.module.named_parameters():
        assert (name in found) == (p.grad is not None)
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)
