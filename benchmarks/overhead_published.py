"""What a size costs beside the same network by itself, for five networks at published sizes.

The protocol is that of `benchmarks.overhead` (its words for what is timed hold here), at the
smallest size of half the widths, heads and blocks, on images of 96 x 96 or texts of 32 tokens:
eight of them, as in that protocol, and one. Entering a size and updating the full owners cost
the same whatever the input, so one input is the hardest case there is.

`python -m benchmarks.overhead_published` writes `benchmarks/results/overhead_published.json`.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks._pairs import against, alternate
from benchmarks.core import llama
from benchmarks.overhead import BATCH, LIMITS, PAIRS
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.cost.measure import device_name
from supple.errors import SuppleWarning
from supple.files import write_json
from supple.network import Elastic, elastic
from supple.space import Config
from supple.training.losses import Labels
from supple.training.step import SizesRun, WholeOnly

RESULT = Path(__file__).parent / "results" / "overhead_published.json"
PIXELS = 96
TOKENS = 32
BATCHES = (BATCH[PIXELS], 1)
Batch = dict[str, Tensor]


def models() -> dict[str, Callable[[], tuple[nn.Module, Batch]]]:
    """The networks, randomly initialised, each with one input."""
    t = transformers
    image = {"pixel_values": torch.randn(1, 3, PIXELS, PIXELS)}
    text = {"input_ids": torch.randint(5, 1000, (1, TOKENS))}
    return {
        "resnet-50": lambda: (t.ResNetForImageClassification(t.ResNetConfig()), image),
        "vit-b/16": lambda: (
            t.ViTForImageClassification(t.ViTConfig(image_size=PIXELS)),
            image,
        ),
        "swin-t": lambda: (
            t.SwinForImageClassification(t.SwinConfig(image_size=PIXELS, window_size=3)),
            image,
        ),
        "bert-base": lambda: (t.BertForSequenceClassification(t.BertConfig()), text),
        "llama, 32 layers": lambda: (llama(32)[0], text),
    }


def loss(output: Any, batch: Batch) -> Tensor:
    """Any loss: what is timed is the step."""
    result: Tensor = output.logits.float().square().mean()
    return result


def step(net: Elastic | nn.Module, module: nn.Module, batch: Batch, at: Config | None) -> Any:
    """Gives a function that does one training step."""
    module.train()
    optimizer = SGD(module.parameters(), lr=1e-5, momentum=0.9)
    run = SizesRun(net, optimizer, WholeOnly(at), Labels(loss))
    return lambda: run.step(batch)


def measure(make: Callable[[], tuple[nn.Module, Batch]], count: int) -> dict[str, Any]:
    """Measures one network on so many inputs."""
    module, one = make()
    batch = {name: torch.cat([value] * count) for name, value in one.items()}
    axes = [Width((0.5, 1.0)), Heads((0.5, 1.0)), Depth((0.5, 1.0))]
    net = elastic(module.eval(), kwargs=batch, axes=axes, verify=False)
    config = net.space.smallest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuppleWarning)
        subs = {name: net.extract(config).eval() for name in ("extracted", "again")}

    def forward(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                module(**batch)

        return run

    def entered() -> None:
        with net.at(config), torch.no_grad():
            module(**batch)

    runs = {name: forward(sub) for name, sub in subs.items()}
    with net.at(config):
        times = alternate({"active": forward(module), **runs}, PAIRS)
    row: dict[str, Any] = {
        "batch": count,
        "params": sum(p.numel() for p in module.parameters()),
        "extracted_params": sum(p.numel() for p in subs["extracted"].parameters()),
        "forward": against(times, "active", "extracted"),
        "forward_aa": against(times, "extracted", "again"),
    }
    times = alternate({"active": entered, "extracted": runs["extracted"]}, PAIRS)
    row["forward_entered"] = against(times, "active", "extracted")
    contenders = {name: step(sub, sub, batch, None) for name, sub in subs.items()}
    times = alternate({"active": step(net, module, batch, config), **contenders}, PAIRS)
    row["step"] = against(times, "active", "extracted")
    row["step_aa"] = against(times, "extracted", "again")
    return row


def main() -> None:
    """Measures all networks, prints and writes each."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "device": device_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.overhead_published",
        "limits": {kind: limits[PIXELS] for kind, limits in LIMITS.items()},
        "rows": [],
    }
    for count, (name, make) in itertools.product(BATCHES, models().items()):
        row = {"network": name} | measure(make, count)
        figures["rows"].append(row)
        write_json(RESULT, figures)
        kinds = ("forward", "forward_aa", "forward_entered", "step", "step_aa")
        said = ", ".join(f"{k} {row[k]['ratio']:.3f}" for k in kinds)
        print(f"{name}, batch {count}: {said}", flush=True)


if __name__ == "__main__":
    main()
