"""Training in several processes: each rank runs all sizes, then gradients are averaged once.

Everything here does nothing where `torch.distributed` is not initialised or has one rank.

No rank may wait for one that has failed. So every exchange of tensors begins with `agree`, in
which each rank says what it is about to do, and a rank that fails joins the next one, whichever
it is, with the words of its error. One that is killed closes its connections, at which the
others' exchanges fail.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from supple.errors import RankError
from supple.sharded import is_sharded
from supple.training.norms import running_statistics

__all__ = [
    "agree",
    "average",
    "average_buffers",
    "average_gradients",
    "barrier",
    "broadcast",
    "failing_together",
    "rank",
    "told",
    "world_size",
]

_FAILED, _FINE = "!", "."
_TOLD = "_told_to_all_ranks"
_BYTES = 512  # of what a rank says, a checksum of the whole of it included


def world_size() -> int:
    """Gives the number of processes that train together, 1 where there is no group."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Gives the number of this process, 0 where there is no group."""
    return dist.get_rank() if _together() else 0


def agree(what: str) -> None:
    """Waits until all ranks are here, about to do the same.

    Args:
        what: What comes next, in words.

    Raises:
        RankError: Another rank has failed (the message has its error), is about to do
            something else, or is gone.
    """
    if world_size() == 1:
        return
    said = _said(_FINE, what)
    failed = [f"rank {n} failed: {one[1:]}" for n, one in enumerate(said) if one[0] == _FAILED]
    if failed:
        raise RankError(
            f"{'; '.join(failed)}; this rank has stopped because of it, before {_short(what)}"
        )
    if len(set(said)) > 1:
        places = [f"rank {n} at {_short(one[9:])}" for n, one in enumerate(said)]
        raise RankError(
            f"the ranks came apart: {', '.join(places)}; give all of them the same settings "
            "and seed, equally many batches, and a sampler that draws only from the generator "
            "it is given"
        )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Tells the other ranks of an exception inside, so that they stop too.

    The last thing inside must be an `agree`, so that nobody has left who should be told.

    Yields:
        Nothing.
    """
    try:
        yield
    except RankError:  # they know, or can't be reached
        raise
    except Exception as error:
        if world_size() > 1 and not getattr(error, _TOLD, False):
            setattr(error, _TOLD, True)  # nobody waits to hear it twice
            with contextlib.suppress(RankError):
                _said(_FAILED, f"{type(error).__name__}: {error}")
        raise


def barrier() -> None:
    """Waits for all ranks.

    Raises:
        RankError: Another rank has failed or is gone.
    """
    agree("a barrier")


def broadcast(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0, but for sharded ones.

    Args:
        module: The network, of the same shape on all ranks.

    Raises:
        RankError: Another rank has a network of other shapes, has failed or is gone.
    """
    if world_size() == 1:
        return
    owned = [p for p in module.parameters() if not is_sharded(p)]
    tensors = [tensor.detach() for tensor in (*owned, *module.buffers())]
    shapes = [f"{tensor.dtype}{tuple(tensor.shape)}" for tensor in tensors]
    agree(f"the start, with a {type(module).__name__} of {len(shapes)} tensors {shapes}")
    with _reaching():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def told(words: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gives every rank what rank 0 says.

    Args:
        words: What JSON can hold; only rank 0's count.

    Returns:
        Rank 0's words.

    Raises:
        RankError: Another rank has failed, is elsewhere or is gone.
    """
    if world_size() == 1:
        return dict(words or {})
    agree("what rank 0 says")
    text = bytearray(json.dumps(dict(words or {})).encode())
    length = torch.tensor([len(text)], device=_device())
    with _reaching():
        dist.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if rank() == 0:
            content = torch.frombuffer(text, dtype=torch.uint8)
        content = content.to(_device())
        dist.broadcast(content, 0)
    said: dict[str, Any] = json.loads(bytes(content.tolist()))
    return said


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients over all ranks in one flattened all-reduce (one per dtype).

    A parameter that has a gradient on some rank gets one on all, as experts do that only some
    ranks' tokens were routed to. Gradients of sharded parameters were averaged in backward.

    Args:
        parameters: The owners, in the same order on all ranks.

    Raises:
        RankError: A rank is gone.
    """
    ranks = world_size()
    parameters = [p for p in parameters if not is_sharded(p)]
    if ranks == 1 or not parameters:
        return
    flags = [float(p.grad is not None) for p in parameters]
    head = torch.tensor(flags, device=parameters[0].device)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        _sum_all([head, *gradients])
        for gradient in gradients:
            gradient.div_(ranks)
    for parameter, seen in zip(parameters, head.tolist(), strict=True):
        if not seen:
            parameter.grad = None


def average(tensors: Sequence[Tensor]) -> None:
    """Gives every rank the mean over ranks of what each of them saw, in place.

    Args:
        tensors: The same shapes on all ranks.

    Raises:
        RankError: Another rank has failed, is elsewhere or is gone.
    """
    ranks = world_size()
    if ranks == 1:
        return
    agree(f"the mean of {len(tensors)} tensors")
    _sum_all(tensors)
    for tensor in tensors:
        tensor.div_(ranks)


def average_buffers(module: nn.Module) -> None:
    """Makes buffers equal on all ranks: running statistics their mean, others rank 0's.

    Args:
        module: The network.

    Raises:
        RankError: Another rank has failed, is elsewhere or is gone.
    """
    if world_size() == 1:
        return
    statistics = list(running_statistics(module).values())
    average(statistics)
    averaged = {id(buffer) for buffer in statistics}
    with _reaching():
        for buffer in module.buffers():
            if id(buffer) not in averaged:
                dist.broadcast(buffer, 0)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _said(mark: str, text: str) -> list[str]:
    """Gives what each rank says now: its mark, a checksum where all is fine, and its words."""
    sum_ = f"{zlib.crc32(text.encode()):08x}" if mark == _FINE else ""
    words = f"{mark}{sum_}{text}".encode()[:_BYTES].ljust(_BYTES, b"\0")
    own = torch.frombuffer(bytearray(words), dtype=torch.uint8).to(_device())
    every = [torch.empty_like(own) for _ in range(world_size())]
    with _reaching():
        dist.all_gather(every, own)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="ignore") for one in every]


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _device() -> torch.device:
    """Where the group's backend wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"the other ranks can't be reached ({error}): one has ended or was killed, or took "
            "longer than the timeout of the process group; start all ranks again, and with "
            "checkpoint= they go on from the last one"
        ) from error


@torch.no_grad()
def _sum_all(tensors: Sequence[Tensor]) -> None:
    for _, group in groupby(sorted(tensors, key=_kind), key=_kind):
        members = list(group)
        flat = torch.cat([tensor.reshape(-1) for tensor in members])
        with _reaching():
            dist.all_reduce(flat)
        for tensor, part in zip(members, _parts(flat, members), strict=True):
            tensor.copy_(part.view_as(tensor))


def _parts(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    return iter(torch.split(flat, [tensor.numel() for tensor in like]))


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.device}"
