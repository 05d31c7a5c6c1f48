"""State-space models and linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.base import (
    BATCH,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    VOCAB,
    Entry,
    family,
    tokens,
)

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@family(
    sites={
        "width backbone.embeddings": 1,
        "width backbone.layers.*.mixer": 3,
        "width backbone.layers.*.mixer#2": 3,
        "width backbone.layers.*.mixer.x_proj": 3,
        "depth backbone.layers.depth": 1,
    },
    fixed={
        "backbone.embeddings.weight[0]": "the model's output",
        "backbone.layers.*.mixer.conv1d.weight[2]": "the kernel size",
    },
)
def mamba() -> Entry:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=6,
        conv_kernel=4,
        time_step_rank=9,
        **_IDS,
    )
    return MambaForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width backbone.embeddings": 1,
        "heads backbone.layers.*.mixer.heads": 3,
        "depth backbone.layers.depth": 1,
    },
    fixed={
        "backbone.embeddings.weight[0]": "looked up by index",
        "backbone.layers.*.mixer.conv1d.weight[2]": "the kernel size",
        "lm_head.weight[0]": "the model's output",
    },
)
def mamba2() -> Entry:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_heads=8,
        head_dim=12,
        n_groups=2,
        state_size=10,
        chunk_size=4,
        conv_kernel=4,
        **_IDS,
    )
    return Mamba2ForCausalLM(config), (), {"input_ids": tokens()}


@family(
    sites={
        "width rwkv.embeddings": 1,
        "width rwkv.blocks.*.feed_forward.key": 3,
        "depth rwkv.blocks.depth": 1,
    },
    fixed={
        "rwkv.embeddings.weight[0]": "looked up by index",
        "head.weight[0]": "the model's output",
        "rwkv.blocks.*": "only this block owns pre_ln.bias",
    },
)
def rwkv() -> Entry:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        attention_hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=FFN,
        **_IDS,
    )
    return RwkvForCausalLM(config), (), {"input_ids": tokens()}


class LinearAttention(nn.Module):
    """Attention with a positive feature map in place of the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
        memory = k.transpose(-1, -2) @ v
        total = q @ k.sum(-2).unsqueeze(-1)
        y = (q @ memory) / total
        return x + self.out(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@family(
    sites={
        "width 0": 1,
        "width *.*.up": 3,
        "heads *.*.heads": 3,
        "depth depth": 1,
    },
    fixed={
        "*.weight[1]": "an input dimension",
        "*.weight[0]": "the model's output",
        "*": "it changes the shape",
    },
)
def linear_attention() -> Entry:
    blocks = [
        nn.Sequential(LinearAttention(HIDDEN, HEADS), FeedForward(HIDDEN, FFN))
        for _ in range(LAYERS)
    ]
    model = nn.Sequential(nn.Linear(23, HIDDEN), *blocks, nn.Linear(HIDDEN, 7))
    return model, (torch.randn(BATCH, LENGTH, 23),), {}


class TimeMix(nn.Module):
    """RWKV's recurrence over time, with a decay per channel, written as a loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Parameter(torch.rand(3, width))
        self.decay = nn.Parameter(torch.rand(width))
        self.bonus = nn.Parameter(torch.rand(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
        k, v, r = (
            layer(y * mix + before * (1 - mix))
            for layer, mix in zip((self.key, self.value, self.gate), self.mix, strict=True)
        )
        above = torch.zeros_like(k[:, 0])
        below = torch.zeros_like(above)
        outputs = []
        for t in range(y.shape[1]):
            now = (self.bonus + k[:, t]).exp()
            outputs.append((above + now * v[:, t]) / (below + now))
            fade = (-self.decay.exp()).exp()
            above = fade * above + k[:, t].exp() * v[:, t]
            below = fade * below + k[:, t].exp()
        return x + self.out(r.sigmoid() * torch.stack(outputs, dim=1))


@family(
    sites={
        "width 0": 1,
        "width 1.0": 1,
        "width 2.0": 1,
        "width 3.0": 1,
        "width *.*.up": 3,
        "depth depth": 1,
    },
    fixed={
        "*.weight[1]": "an input dimension",
        "*.*.mix[0]": "it is unpacked into separate tensors",
        "*.weight[0]": "the model's output",
        "*": "it changes the shape",
    },
)
def rwkv_loop() -> Entry:
    blocks = [nn.Sequential(TimeMix(HIDDEN), FeedForward(HIDDEN, FFN)) for _ in range(LAYERS)]
    model = nn.Sequential(nn.Linear(23, HIDDEN), *blocks, nn.Linear(HIDDEN, 7))
    return model, (torch.randn(BATCH, LENGTH, 23),), {}
