"""Two processes equal one with the joint batch."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

from supple.errors import RankError
from supple.supernet.bignas import BigNAS
from supple.training import checkpoint, processes
from supple.training.loop import train
from tests.training import stub

RANKS = 2


def joint() -> list:
    """What the two ranks see together: their batches, one after the other."""
    batches = stub.vectors(8, size=6)
    return [
        tuple(torch.cat(pair) for pair in zip(a, b, strict=True))
        for a, b in zip(batches[::2], batches[1::2], strict=True)
    ]


def worker(rank: int, port: int, folder: str, paths: list[str]) -> None:
    sys.path[:] = paths
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results = {}
    # Weights that differ at the start are made equal, and each rank takes its own batches.
    net = stub.mlp(seed=rank)
    train(
        net,
        stub.vectors(8, size=6)[rank::RANKS],
        stub.loss,
        method=BigNAS(),
        optimizer="sgd",
        lr=0.1,
        clip=0.5,
        checkpoint=f"{folder}/run",
        progress=False,
    )
    results.update({f"net.{k}": v for k, v in stub.weights(net.module).items()})

    # Experts that only one rank used have a gradient on both, unused ones on none.
    module = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
    module[rank].weight.grad = torch.full((1, 1), 4.0 + rank)
    processes.average_gradients(list(module.parameters()))
    grads = [p.grad for p in module.parameters()]
    assert grads[2] is None
    results["grads"] = torch.cat(grads[:2])

    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank)
    norm.register_buffer("other", torch.full((1,), float(5 + rank)))
    processes.average_buffers(norm)
    results["buffers"] = torch.cat([norm.running_mean, norm.other])

    try:
        processes.agree(f"sizes {rank}")
    except RankError as error:
        results["refused"] = torch.tensor(float("rank 1 at sizes 1" in str(error)))
    save_file(results, f"{folder}/rank-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(worker, (port, str(folder), sys.path), nprocs=RANKS)
    return folder, [load_file(folder / f"rank-{rank}.safetensors") for rank in range(RANKS)]


def test_two_ranks_equal_one_with_the_joint_batch(results):
    net = stub.mlp()
    train(
        net,
        joint(),
        stub.loss,
        method=BigNAS(),
        optimizer="sgd",
        lr=0.1,
        clip=0.5,
        progress=False,
    )
    start = stub.mlp().module
    for name, tensor in net.module.state_dict().items():
        for result in results[1]:
            torch.testing.assert_close(result[f"net.{name}"], tensor, rtol=0, atol=1e-6)
        assert (tensor - start.state_dict()[name]).abs().max() > 1e-3


def test_ranks_agree_bitwise_about_the_weights(results):
    a, b = ({k: v for k, v in r.items() if k.startswith("net.")} for r in results[1])
    assert stub.equal(a, b)


def test_a_parameter_that_one_rank_used_gets_a_gradient_on_all(results):
    for result in results[1]:
        assert result["grads"].flatten().tolist() == [2.0, 2.5]


def test_running_statistics_are_averaged_and_other_buffers_are_rank_0s(results):
    for result in results[1]:
        assert result["buffers"].tolist() == [0.5, 5.0]


def test_ranks_that_sampled_different_sizes_are_stopped(results):
    assert [result["refused"].item() for result in results[1]] == [1.0, 1.0]


def test_a_checkpoint_of_two_ranks_has_each_ranks_randomness(results):
    path = checkpoint.latest(results[0] / "run")
    assert {"rank-0.json", "rank-1.json", "shared.json"} <= {p.name for p in path.iterdir()}
