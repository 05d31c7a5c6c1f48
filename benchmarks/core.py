"""The elastic core itself: configs priced a second, seconds to analyse and verify a model.

`python -m benchmarks.core` writes `benchmarks/results/core.json`.
"""

from __future__ import annotations

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


def models() -> dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]]:
    """Models at their published sizes, randomly initialised."""
    image = torch.randn(1, 3, 224, 224)
    tokens = torch.randint(5, 1000, (1, 32))
    t = transformers
    llama = t.LlamaConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=32, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=704, pad_token_id=0,
    )  # fmt: skip
    return {
        "resnet-50": lambda: (
            t.ResNetForImageClassification(t.ResNetConfig()),
            {"pixel_values": image},
        ),
        "vit-b/16": lambda: (
            t.ViTForImageClassification(t.ViTConfig()),
            {"pixel_values": image},
        ),
        "bert-base": lambda: (
            t.BertForSequenceClassification(t.BertConfig()),
            {"input_ids": tokens},
        ),
        "swin-t": lambda: (
            t.SwinForImageClassification(t.SwinConfig()),
            {"pixel_values": image},
        ),
        "llama, 32 layers": lambda: (t.LlamaForCausalLM(llama), {"input_ids": tokens}),
    }


def main() -> None:
    """Measure, print and write."""
    figures: dict[str, Any] = {"device": device_name(), "analysis_seconds": {}}
    figures["configs_priced_per_second"] = priced_per_second()
    print(f"{figures['configs_priced_per_second']:.3g} configs priced a second")
    for name, make in models().items():
        model, kwargs = make()
        seconds = [_seconds(lambda m=model, k=kwargs: analyse(m, (), k)) for _ in range(3)]
        figures["analysis_seconds"][name] = statistics.median(seconds)
        print(f"{name}: analysed in {statistics.median(seconds):.2f} s")
    write_json(RESULT, figures)


if __name__ == "__main__":
    main()
