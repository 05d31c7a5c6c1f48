"""Train one network, deploy it at every size.

The public names below are loaded when first used, so `import supple` stays fast and needs
no PyTorch. One exception: `supple.technique` is the function that looks a technique up,
although the file `supple/technique.py` exists. Import from that module with
`from supple.technique import register`, never with `import supple.technique as ...`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from supple.technique import technique, techniques

if TYPE_CHECKING:
    from supple.axes.depth import Depth
    from supple.axes.exit import Exit
    from supple.axes.experts import Experts
    from supple.axes.heads import Heads
    from supple.axes.kernel import Kernel
    from supple.axes.operator import Operator
    from supple.axes.patch_size import PatchSize
    from supple.axes.rank import Rank
    from supple.axes.resolution import Resolution
    from supple.axes.scale_depth import ScaleDepth
    from supple.axes.tokens import Tokens
    from supple.axes.width import Width
    from supple.cost.measure import measure
    from supple.deploy.export import export
    from supple.network import elastic
    from supple.space import Config, Space
    from supple.storage import load, save
    from supple.study.growing import Batchwise, Estimate
    from supple.study.pareto import pareto
    from supple.training.loop import train
    from supple.training.recalibrate import recalibrate

__version__ = "0.1.0"

__all__ = [
    "Batchwise",
    "Config",
    "Depth",
    "Estimate",
    "Exit",
    "Experts",
    "Heads",
    "Kernel",
    "Operator",
    "PatchSize",
    "Rank",
    "Resolution",
    "ScaleDepth",
    "Space",
    "Tokens",
    "Width",
    "__version__",
    "elastic",
    "export",
    "load",
    "measure",
    "pareto",
    "recalibrate",
    "save",
    "technique",
    "techniques",
    "train",
]

_HOME = {
    "Batchwise": "supple.study.growing",
    "Estimate": "supple.study.growing",
    "Config": "supple.space",
    "Depth": "supple.axes.depth",
    "Heads": "supple.axes.heads",
    "Tokens": "supple.axes.tokens",
    "PatchSize": "supple.axes.patch_size",
    "Rank": "supple.axes.rank",
    "Operator": "supple.axes.operator",
    "Exit": "supple.axes.exit",
    "Experts": "supple.axes.experts",
    "Kernel": "supple.axes.kernel",
    "Resolution": "supple.axes.resolution",
    "ScaleDepth": "supple.axes.scale_depth",
    "Space": "supple.space",
    "Width": "supple.axes.width",
    "elastic": "supple.network",
    "export": "supple.deploy.export",
    "load": "supple.storage",
    "measure": "supple.cost.measure",
    "pareto": "supple.study.pareto",
    "recalibrate": "supple.training.recalibrate",
    "save": "supple.storage",
    "train": "supple.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'supple' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
