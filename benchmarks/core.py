"""The elastic core itself: configs priced a second, seconds and memory to analyse a model.

Analysis (`supple.graph.couple.analyse`) runs the model itself on one example and works out what
can vary; it is what `supple.elastic` does before it verifies. Its memory is the peak of the
process above what it held with the model built, of the first of three repeats. Growth with
depth is that of the same decoder with more layers.

`python -m benchmarks.core` writes `benchmarks/results/core.json`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from supple.cost.measure import device_name
from supple.files import write_json
from supple.graph.couple import analyse
from supple.models.base import build
from supple.network import elastic

RESULT = Path(__file__).parent / "results" / "core.json"
CONFIGS = 1_000_000
REPEATS = 5


def priced_per_second() -> float:
    """Median rate over repeats, on a MobileNetV3-like space, all four costs."""
    net = elastic(build("mobilenet-v3"), (torch.randn(1, 3, 32, 32),), verify=False)
    rows = net.space.random_many(CONFIGS, 0)
    net.costs(rows[:10])
    return statistics.median(
        CONFIGS / _seconds(lambda: net.costs(rows)) for _ in range(REPEATS)
    )


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


#: Seconds that analysis may take, by model.
BUDGETS = {
    "resnet-50": 2, "vit-b/16": 3, "bert-base": 3, "llama, 32 layers": 5, "swin-t": 8,
    "mobilenet-v3-large": 3, "mixtral-like, 24 layers": 8,
}  # fmt: skip
LAYERS = (8, 16, 32, 64)
Made = tuple[nn.Module, dict[str, torch.Tensor]]


def models() -> dict[str, Callable[[], Made]]:
    """Models at their published sizes, randomly initialised; decoders of small width."""
    t = transformers
    return {
        "resnet-50": lambda: (t.ResNetForImageClassification(t.ResNetConfig()), image()),
        "vit-b/16": lambda: (t.ViTForImageClassification(t.ViTConfig()), image()),
        "bert-base": lambda: (t.BertForSequenceClassification(t.BertConfig()), tokens()),
        "llama, 32 layers": lambda: llama(32),
        "swin-t": lambda: (t.SwinForImageClassification(t.SwinConfig()), image()),
        "mobilenet-v3-large": lambda: (
            build("mobilenet-v3", variant="large", image_size=224, hidden=1280, classes=1000),
            {"x": image()["pixel_values"]},
        ),
        "mixtral-like, 24 layers": mixtral,
    }


def image() -> dict[str, torch.Tensor]:
    """Gives one image of 224 x 224."""
    return {"pixel_values": torch.randn(1, 3, 224, 224)}


def tokens() -> dict[str, torch.Tensor]:
    """Gives one text of 32 tokens."""
    return {"input_ids": torch.randint(5, 1000, (1, 32))}


def llama(layers: int) -> Made:
    """Builds a decoder of small width with this many layers."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=704, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokens()


def mixtral() -> Made:
    """Builds a mixture of experts with 24 layers of small width."""
    config = transformers.MixtralConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=448, num_local_experts=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), tokens()


def analysed(make: Callable[[], Made]) -> dict[str, float]:
    """Gives median seconds to analyse a model, and megabytes at the peak."""
    model, kwargs = make()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    held = _megabytes("VmRSS")
    seconds = [_seconds(lambda: analyse(model, (), kwargs))]
    peak = _megabytes("VmHWM") - held
    seconds += [_seconds(lambda: analyse(model, (), kwargs)) for _ in range(2)]
    return {"seconds": statistics.median(seconds), "megabytes": peak}


def _megabytes(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measure, print and write."""
    figures: dict[str, Any] = {
        "device": device_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.core",
        "configs_priced_per_second": priced_per_second(),
        "analysis": {},
        "growth": {},
    }
    print(f"{figures['configs_priced_per_second']:.3g} configs priced a second", flush=True)
    for name, make in models().items():
        row = figures["analysis"][name] = analysed(make) | {"budget": BUDGETS[name]}
        print(f"{name}: {row['seconds']:.2f} s, {row['megabytes']:.0f} MB", flush=True)
    for layers in LAYERS:
        row = figures["growth"][str(layers)] = analysed(lambda n=layers: llama(n))
        print(f"{layers} layers: {row['seconds']:.2f} s, {row['megabytes']:.0f} MB", flush=True)
    write_json(RESULT, figures)


if __name__ == "__main__":
    main()
