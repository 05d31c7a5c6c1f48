"""Once-for-all's own layers by the protocol of `benchmarks.overhead`, in a process of its own.

`overhead` starts it with the package `ofa` on the path. The package's loaders of images import
torchvision, `torch._six` and gdown, which its layers don't need: empty modules stand in.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import torch
from torch import nn

from benchmarks._pairs import against, alternate
from benchmarks.overhead import forward, images, step

KERNELS, EXPANSIONS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)


class _Empty(types.ModuleType):
    """A module of which any name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in() -> None:
    """Puts empty modules where the loaders of images look for packages."""
    vision = "torchvision"
    names = [vision, f"{vision}.transforms", f"{vision}.transforms.functional"]
    for name in [*names, f"{vision}.datasets", "torch._six", "gdown"]:
        module = sys.modules[name] = _Empty(name)
        module.__path__ = []
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)


def networks(position: int, elastic_kernel: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Gives the supernet with a size active, and that size by itself, twice."""
    from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

    kernels = list(KERNELS) if elastic_kernel else [5]
    net: Any = OFAMobileNetV3(
        ks_list=kernels,
        expand_ratio_list=list(EXPANSIONS),
        depth_list=list(DEPTHS),
        dropout_rate=0,
    )
    kernel = kernels[position] if elastic_kernel else 5
    net.set_active_subnet(kernel, EXPANSIONS[position], DEPTHS[position])
    return net, net.get_active_subnet(), net.get_active_subnet()


def measure(pixels: int, position: int, elastic_kernel: bool, pairs: int) -> dict[str, Any]:
    """Measures one size: forward and step."""
    batch = images(pixels)
    net, sub, again = networks(position, elastic_kernel)
    row: dict[str, Any] = {}
    for module in (net, sub, again):
        module.eval()
    names = ("active", "extracted", "again")
    modules = dict(zip(names, (net, sub, again), strict=True))
    times = alternate({n: forward(m, batch) for n, m in modules.items()}, pairs)
    row["forward"] = against(times, "active", "extracted")
    row["forward_aa"] = against(times, "extracted", "again")
    times = alternate({n: step(m, m, batch) for n, m in modules.items()}, pairs)
    row["step"] = against(times, "active", "extracted")
    row["step_aa"] = against(times, "extracted", "again")
    return row


def main() -> None:
    """Measures the case that the command line names, and prints it as JSON."""
    torch.set_num_threads(1)
    stand_in()
    pixels, position, kernel, pairs = map(int, sys.argv[1:5])
    print(json.dumps(measure(pixels, position, bool(kernel), pairs)))


if __name__ == "__main__":
    main()
