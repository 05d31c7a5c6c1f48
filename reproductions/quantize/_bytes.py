"""What reproductions of training with few bits share: a small Llama of bytes on Shakespeare.

The network is that of `reproductions.factor._lm` (0.46 M parameters, two layers of width 128),
trained from scratch on tiny Shakespeare in batches of 8 blocks of 64 bytes: AdamW without
weight decay, clipped at norm 1, a tenth of the steps to warm up, then a cosine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import supple
from reproductions.factor._lm import BLOCKS, model
from reproductions.prune._shakespeare import nats, text

__all__ = ["BLOCKS", "DATA", "model", "nats", "text", "trained"]

DATA = ("text/tinyshakespeare.txt",)
RATE = 3e-3


def trained(method: Any, seed: int, steps: int) -> Any:
    """Trains a new network by a rule; gives what was trained.

    Args:
        method: A rule, whose `wrap` makes what is trained.
        seed: Of weights, data and everything drawn.
        steps: Of the optimizer.
    """
    batch = next(iter(text(seed).train))
    net = method.wrap(model(seed).train(), (), {"input_ids": batch["input_ids"]})
    supple.train(
        net,
        text(seed).train,
        lambda output, batch: output.loss,
        method=method,
        steps=steps,
        optimizer=_adamw,
        schedule="cosine",
        warmup=0.1,
        clip=1.0,
        log_every=steps,
        progress=False,
        seed=seed,
    )
    return net


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
