"""What the tests of the elastic core share: weights that hide nothing, and comparisons."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from supple.errors import SuppleWarning
from supple.network import Elastic


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic a value of order one that is its own.

    At library initialisation zero biases and unit gains would hide a missed slice.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() >= 2:
                tensor.copy_(noise / (tensor[0].numel() ** 0.5))
            elif isinstance(tensor, nn.Parameter) or "running" in name:
                tensor.copy_(noise * 0.3 + (1.0 if "weight" in name else 0.1))
    return model


def tensors_in(output: Any) -> list[Tensor]:
    """The floating-point tensors of a network's output, in order."""
    return [
        leaf
        for leaf in tree_flatten(output)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def run(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(module(*args, **kwargs))


def quietly_extracted(net: Elastic, config: Mapping[str, int]) -> nn.Module:
    """`extract` without the warning about running statistics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuppleWarning)
        return net.extract(config)


def assert_same(left: list[Tensor], right: list[Tensor], what: str = "") -> None:
    assert left, "the network returns no tensor"
    for a, b in zip(left, right, strict=True):
        assert torch.isfinite(a).all(), f"{what}: not finite"
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m: f"{what}: {m}")


def assert_active_equals_extracted(net: Elastic, config: Mapping[str, int]) -> None:
    """`at` and `extract` compute the same, with outputs of the full network's shapes."""
    full = run(net, net.args, net.kwargs)
    with net.at(config):
        active = run(net, net.args, net.kwargs)
    standalone = run(quietly_extracted(net, config), net.args, net.kwargs)
    assert [t.shape for t in active] == [t.shape for t in full], f"output shape at {config}"
    assert_same(active, standalone, f"active and extracted at {config}")


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every module's own attributes, by path: names, order and identities."""
    state: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            kept = dict(value) if isinstance(value, dict) else value
            if isinstance(value, list):  # a recurrent layer renews its list of weak references
                kept = {
                    i: v() if isinstance(v, weakref.ref) else v for i, v in enumerate(value)
                }
            state.setdefault(path, {})[name] = kept
            inner = getattr(value, "__dict__", None)
            if isinstance(inner, dict) and not isinstance(value, nn.Module | Tensor | type):
                state[path][name + ".__dict__"] = dict(inner)
    return state


def assert_untouched(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """The attributes are the very same objects in the same order."""
    after = state_of(model)
    assert list(after) == list(before)
    for path, attributes in before.items():
        assert list(after[path]) == list(attributes), path
        for name, value in attributes.items():
            now = after[path][name]
            if isinstance(value, dict):
                assert list(now) == list(value), f"{path}.{name}"
                assert all(now[key] is value[key] for key in value), f"{path}.{name}"
            else:
                assert now is value, f"{path}.{name}"


def tensor_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in copy.copy(model).state_dict().items()}
