"""Training in several processes: each rank runs all sizes, then gradients are averaged once.

Everything here does nothing where `torch.distributed` is not initialised or has one rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from supple.errors import ConcurrencyError
from supple.training.norms import running_statistics

__all__ = [
    "average_buffers",
    "average_gradients",
    "barrier",
    "broadcast",
    "rank",
    "world_size",
]

# Small enough that the sum over many ranks is exact in float32.
_FINGERPRINTS = 4096


def world_size() -> int:
    """Gives the number of processes that train together, 1 where there is no group."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Gives the number of this process, 0 where there is no group."""
    return dist.get_rank() if _together() else 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def broadcast(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0.

    Args:
        module: The network, of the same shape on all ranks.
    """
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(parameters: Sequence[nn.Parameter], sampled: Iterable[str] = ()) -> None:
    """Averages the gradients over all ranks in one flattened all-reduce (one per dtype).

    A parameter that has a gradient on some rank gets one on all, as experts do that only some
    ranks' tokens were routed to.

    Args:
        parameters: The owners, in the same order on all ranks.
        sampled: A description of what this rank trained on in the step, which must be the same
            on all ranks; it is compared without a message of its own.

    Raises:
        ConcurrencyError: The ranks have sampled different sizes.
    """
    ranks = world_size()
    if ranks == 1 or not parameters:
        return
    fingerprint = zlib.crc32("\n".join(sampled).encode()) % _FINGERPRINTS
    flags = [float(p.grad is not None) for p in parameters] + [float(fingerprint)]
    head = torch.tensor(flags, device=parameters[0].device)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        _sum_all([head, *gradients])
        for gradient in gradients:
            gradient.div_(ranks)
    *present, total = head.tolist()
    for parameter, seen in zip(parameters, present, strict=True):
        if not seen:
            parameter.grad = None
    if total != ranks * fingerprint:
        raise ConcurrencyError(
            "the ranks sampled different sizes in one step; give every rank the same seed, and "
            "a sampler that draws from the generator it is given only"
        )


def average_buffers(module: nn.Module) -> None:
    """Makes buffers equal on all ranks: running statistics their mean, others rank 0's.

    Args:
        module: The network.
    """
    ranks = world_size()
    if ranks == 1:
        return
    statistics = list(running_statistics(module).values())
    _sum_all(statistics)
    for buffer in statistics:
        buffer.div_(ranks)
    averaged = {id(buffer) for buffer in statistics}
    for buffer in module.buffers():
        if id(buffer) not in averaged:
            dist.broadcast(buffer, 0)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@torch.no_grad()
def _sum_all(tensors: Sequence[Tensor]) -> None:
    for _, group in groupby(sorted(tensors, key=_kind), key=_kind):
        members = list(group)
        flat = torch.cat([tensor.reshape(-1) for tensor in members])
        dist.all_reduce(flat)
        for tensor, part in zip(members, _parts(flat, members), strict=True):
            tensor.copy_(part.view_as(tensor))


def _parts(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    return iter(torch.split(flat, [tensor.numel() for tensor in like]))


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.device}"
