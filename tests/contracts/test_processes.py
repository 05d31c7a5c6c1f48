"""The contract "Several processes": each test names the sentence that it holds to.

No DDP wrapper: each rank runs all sizes of a step, then one flattened all-reduce of the owners'
gradients before clipping; configs come from a generator that is equal on all ranks. A
checkpoint holds owners, optimizer, scheduler, EMA, statistics, sampler state, per-rank RNG and
data position; resume is exact for the same world size and thread count, otherwise refused by
name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from supple.errors import CheckpointError
from supple.files import read_json
from supple.training import checkpoint
from tests.contracts import ranks
from tests.contracts.ranks import OPTIMIZERS, RANKS, STEPS, Left, joint, made, trained
from tests.recipe.small_recipe import SMALL
from tests.training.stub import equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(ranks.work, (ranks.free_port(), str(folder), sys.path), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def left(folder) -> list[Left]:
    return [ranks.left_by(folder, rank) for rank in range(RANKS)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_equal_one_with_the_joint_batch(left, name):
    """ "each rank runs all sizes of a step, then one all-reduce of the gradients"."""
    alone = made()
    expected = trained(alone, joint(), optimizer=name)
    start = made().module.state_dict()
    for one in left:
        found = one.of(name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    assert max((expected[k] - start[k]).abs().max() for k in start) > 1e-2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_clipped_after_they_are_averaged(left, name):
    """ "before clipping": clipping must matter for the test above to tell."""
    loose = trained(made(), joint(), optimizer=name, clip=None)
    found = left[0].of(name)
    assert max((found[k] - loose[k]).abs().max() for k in loose) > 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_has_one_flattened_all_reduce(left, name):
    """ "one flattened all-reduce of the owners' gradients"."""
    owners = list(made().module.parameters())
    whole = sum(p.numel() for p in owners) + len(owners)  # and a flag for each
    for one in left:
        assert one.facts[name]["all_reduce"] == [whole] * STEPS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sizes_are_equal_on_all_ranks(left, name):
    """ "configs come from a generator that is equal on all ranks"."""
    first, second = (one.facts[name]["configs"] for one in left)
    assert first == second
    assert len(first) == 4 * STEPS  # the largest, the smallest and two at random
    assert len(set(first)) > 4


@pytest.mark.parametrize("name", [*OPTIMIZERS, "norms", "whole"])
def test_ranks_end_with_bitwise_the_same_network(left, name):
    """Running statistics, averages of weights and rank 1's own start included."""
    assert equal(left[0].of(name), left[1].of(name))
    assert left[0].of(name)


def test_each_rank_draws_dropout_of_its_own(left):
    """ "per-rank RNG"."""
    first, second = (one.facts["drawn"] for one in left)
    assert first[0] != second[0]


def test_running_statistics_are_averaged_and_other_buffers_are_rank_0s(left):
    for one in left:
        buffers = one.of("buffers")
        assert buffers["running_mean"].item() == 0.5
        assert buffers["other"].item() == 5.0


def test_a_parameter_that_one_rank_used_gets_a_gradient_on_all(left):
    for one in left:
        assert one.facts["gradients"] == [2.0, 2.5, None]


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(left):
    """ "resume is exact for the same world size and thread count"."""
    for one in left:
        assert one.facts["left"] == ["step-00000004"] or one.facts["broken"][0]
        assert equal(one.of("resumed"), one.of("whole"))
    assert left[1].facts["broken"][:2] == ["ZeroDivisionError", "stopped"]
    assert left[0].facts["broken"][0] == "RankError"


def test_a_checkpoint_holds_everything_that_a_run_goes_on_from(folder):
    """ "owners, optimizer, scheduler, EMA, statistics, sampler state, per-rank RNG and data
    position"; schedules are functions of the step and have no state."""
    path = checkpoint.latest(folder / "whole")
    assert {p.name for p in path.iterdir()} == {
        *(f"rank-{rank}.{kind}" for rank in range(RANKS) for kind in ("json", "safetensors")),
        *("shared.json", "shared.safetensors", "run.json"),
    }
    tensors = load_file(path / "shared.safetensors")
    packed = read_json(path / "shared.json")["state"]
    state = checkpoint.unpack(packed, tensors)
    net = made(norm=True)
    assert state["tensors"].keys() == net.module.state_dict().keys()
    momenta = [one["momentum_buffer"] for one in state["optimizer"]["state"].values()]
    assert len(momenta) == len(list(net.module.parameters()))
    assert state["run"].keys() >= {"steps", "sampler", "generator", "average"}
    assert "blocks.0.norm.running_mean" in state["run"]["average"]["average"]
    assert (state["done"], state["epoch"], state["position"]) == (2 * STEPS, 2, 0)
    own = [
        checkpoint.unpack(
            read_json(path / f"rank-{rank}.json")["state"],
            load_file(path / f"rank-{rank}.safetensors"),
        )["random"]["torch"]
        for rank in range(RANKS)
    ]
    assert not torch.equal(*own)


def test_another_world_size_is_refused_by_name(folder):
    """ "otherwise refused by name"."""
    net = made(norm=True, dropout=0.3)
    with pytest.raises(CheckpointError, match="world_size=2, this run has world_size=1"):
        trained(
            net,
            joint(),
            epochs=2,
            ema=0.9,
            schedule="cosine",
            checkpoint=folder / "whole",
            checkpoint_every=4,
        )
    assert equal(net.module.state_dict(), made(norm=True, dropout=0.3).module.state_dict())


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("loss", "ZeroDivisionError", "rank 1 divides"),
        ("data", "OSError", "the disk of rank 1"),
        ("validate", "ZeroDivisionError", "division by zero"),
        ("settings", "SettingError", "clip must be above 0, got -1.0"),
    ],
)
def test_a_rank_that_fails_stops_the_others_with_its_words(left, name, error, words):
    found, own = (one.facts[name] for one in left)
    assert own[:2] == [error, words]
    assert found[0] == "RankError"
    assert f"rank 1 failed: {error}: {words}" in found[1]
    assert max(found[2], own[2]) < 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "uneven",
            ["rank 0 at step 2", "rank 1 at the end of epoch 0", "equally many batches"],
        ),
        ("seeds", ["rank 0 at step 0", "the same settings and seed"]),
        ("networks", ["a Net of 12 tensors", "a Net of 2"]),
    ],
)
def test_ranks_that_come_apart_are_told_where(left, name, words):
    for one in left:
        kind, message, seconds = one.facts[name]
        assert kind == "RankError"
        assert all(word in message for word in words), message
        assert seconds < 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_training_equals_training_unsharded(left, name):
    """FSDP2: each rank holds half of the weights, and sizes slice what is gathered."""
    expected = trained(made(), joint(), optimizer=name, ema=0.5)
    for one in left:
        assert equal(one.of(f"sharded-{name}"), left[0].of(f"sharded-{name}"))
        for key, tensor in expected.items():
            found = one.of(f"sharded-{name}")[key]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)
        held, whole = one.facts["shares"]
        assert abs(held / whole - 0.5) < 0.1


def test_sharded_sizes_may_wait_for_their_backward(left):
    net = made()
    weights = left[0].of("sharded-adamw")
    net.module.load_state_dict(weights)
    x, _ = ranks.batches()[0]
    for config in (net.space.smallest(), net.space.largest()):
        with net.at(config):
            net(x).square().mean().backward()
    for one in left:
        for name, p in net.module.named_parameters():
            torch.testing.assert_close(one.of("pending")[name], p.grad)


@pytest.mark.parametrize("name", ["extract", "save", "sort", "elastic", "checkpoint"])
def test_what_needs_whole_weights_refuses_sharded_ones(left, name):
    for one in left:
        kind, message, _ = one.facts[name]
        assert kind == "UnsupportedModelError"
        assert "'stem.weight' is sharded over processes" in message
        assert "before fully_shard" in message


@pytest.mark.slow
@pytest.mark.parametrize("killed", [[1], [0, 1]])
def test_a_killed_run_resumes_bitwise(tmp_path, killed):
    """ "resume is exact", after SIGKILL of one rank or of both."""

    def finished(folder: Path) -> list[dict[str, torch.Tensor]]:
        with ranks.pair(folder) as running:
            assert [one.wait(120) for one in running] == [0, 0]
        return [load_file(folder / f"{rank}.safetensors") for rank in range(RANKS)]

    with ranks.pair(tmp_path / "killed", seconds=0.02) as running:
        while checkpoint.latest(tmp_path / "killed" / "run") is None:
            assert all(one.poll() is None for one in running), "it ended by itself"
            time.sleep(0.01)
        for rank in killed:
            running[rank].kill()
        for rank in {0, 1} - set(killed):
            assert running[rank].wait(30) == 1
            told = running[rank].stderr.read()
            assert "RankError: the other ranks can't be reached" in told
    assert int(checkpoint.latest(tmp_path / "killed" / "run").name[5:]) < 3 * STEPS
    assert not (tmp_path / "killed" / "0.safetensors").exists()
    (tmp_path / "whole").mkdir()
    both = finished(tmp_path / "killed"), finished(tmp_path / "whole")
    assert all(equal(found, expected) for found, expected in zip(*both, strict=True))


def launched(folder: Path) -> subprocess.Popen[str]:
    """`torchrun` on a small recipe, up to its search."""
    root = Path(__file__).parents[2]
    recipe = folder / "small.yaml"
    folder.mkdir(exist_ok=True)
    recipe.write_text(SMALL, encoding="utf-8")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "supple", "search", str(recipe), "--quiet"),
            *("--output", str(folder), "train.steps=60", "search.evaluations=2"),
        ],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that `torchrun` started."""
    tasks = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    return [int(pid) for file in tasks for pid in file.read_text().split()]


@pytest.mark.slow
def test_a_recipe_runs_under_torchrun_and_resumes_bitwise_when_killed(tmp_path):
    """Both ranks train, rank 0 alone does and writes the rest, and a kill loses nothing."""
    running = launched(tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "small" / "train" / "checkpoint"
    try:
        while checkpoint.latest(checkpoints) is None:
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.02)
        held = {path.name for path in checkpoint.latest(checkpoints).iterdir()}
    finally:
        for pid in workers_of(running):
            os.kill(pid, signal.SIGKILL)
        running.communicate(timeout=60)
    assert running.returncode != 0
    assert {"rank-0.json", "rank-1.json"} <= held
    assert not (tmp_path / "killed" / "small" / "train" / "done.json").exists()
    found = []
    for name in ("killed", "whole"):
        output, _ = launched(tmp_path / name).communicate(timeout=200)
        folder = tmp_path / name / "small"
        assert output.count("train    supernet/bignas, 60 steps") == 1, output
        assert "2 of 2 configs on the front" in output, output
        assert not [path for path in folder.rglob("*") if "rank" in path.name]
        found.append(load_file(folder / "train" / "weights.safetensors"))
    assert equal(*found)


@pytest.mark.slow
def test_a_wrong_recipe_ends_all_ranks_with_one_message(tmp_path):
    """What only rank 0 finds out stops the others too."""
    (tmp_path / "small").write_text("this is no folder", encoding="utf-8")
    running = launched(tmp_path)
    output, _ = running.communicate(timeout=100)
    assert running.returncode != 0
    assert "can't write to the run's folder" in output
    assert "rank 0 failed: CheckpointError" in output
