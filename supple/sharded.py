"""Parameters that are sharded over processes (FSDP2 and other DTensors).

A share can't be sliced by itself: which part of it a size uses differs from rank to rank. So a
size slices the whole tensor, gathered for as long as the size or its backward need it.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from supple.errors import UnsupportedModelError

__all__ = ["gathered", "is_sharded", "refuse_sharded", "reshard"]


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether this process holds only its share of a tensor.

    Args:
        tensor: Any tensor.
    """
    loaded = sys.modules.get("torch.distributed.tensor")  # slow to import, and mostly not there
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Gives the whole of a tensor; all processes that hold shares of it call this together.

    Args:
        tensor: Sharded or not.

    Returns:
        The tensor itself, or what its shares make up. The gradient of the latter goes back to
        the shares as the mean over the processes.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    mean = [Partial("avg")] * tensor.device_mesh.ndim
    whole: Tensor = tensor.full_tensor(grad_placements=mean)
    return whole


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuses a model with sharded parameters.

    Args:
        model: The model.
        what: What needs the whole parameters: the subject of the message.

    Raises:
        UnsupportedModelError: A parameter is sharded; the message names it.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise UnsupportedModelError(
                f"{what} needs whole parameters, and '{name}' is sharded over processes: make "
                "the model elastic before fully_shard(net.module); afterwards take the whole "
                "weights with torch.distributed.checkpoint.state_dict.get_model_state_dict("
                "module, options=StateDictOptions(full_state_dict=True)) into a network "
                "that is not sharded"
            )


def reshard(model: nn.Module) -> None:
    """Lets go of whole parameters that FSDP2 keeps after a forward without a backward.

    Args:
        model: The model; nothing happens to one that is not sharded.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is not None:
        for part in model.modules():
            if isinstance(part, loaded.FSDPModule):
                part.reshard()
