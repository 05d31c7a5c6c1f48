"""Transformers and small networks on sequences, by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.base import (
    BATCH,
    CLASSES,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    VOCAB,
    Entry,
    family,
    image,
    tokens,
)


class EncoderClassifier(nn.Module):
    """Classifier on `nn.TransformerEncoder`, PyTorch's own stack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(1))


@family(
    sites={
        "width embed": 1,
        "width encoder.layers.*.linear1": 3,
        "depth encoder.layers.depth": 1,
    },
    fixed={
        "encoder.layers.*.heads": "the code computes a size as 48",
        "embed.weight[0]": "looked up by index",
        "head.weight[0]": "output",
    },
)
def transformer_encoder() -> Entry:
    return EncoderClassifier(), (tokens(),), {}


class TimmAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape  # noqa: N806 (as in timm)
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class TimmBlock(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TimmAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, HIDDEN) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 10, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(TimmBlock(HIDDEN, HEADS, FFN) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@family(
    sites={
        "width cls_token": 1,
        "width blocks.*.mlp.*": 3,
        "depth blocks.depth": 1,
    },
    fixed={
        "pos_embed[1]": "a spatial size",
        "patch.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
    },
)
def timm_vit() -> Entry:
    return TimmViT(), (image(24),), {}


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()  # noqa: N806 (as in nanoGPT)
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.attn = NanoAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.wpe = nn.Embedding(37, HIDDEN)
        self.h = nn.ModuleList(NanoBlock(HIDDEN, HEADS, FFN) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(HIDDEN, bias=False)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.wte(ids) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@family(
    sites={
        "width wte": 1,
        "width h.*.mlp.*": 3,
        "depth h.depth": 1,
    },
    fixed={
        "wte.weight[0]": "output",
        "wpe.weight[0]": "looked up by index",
    },
)
def nanogpt() -> Entry:
    return NanoGPT(), (tokens(),), {}


class GatedMLP(nn.Module):
    """Residual GLU block: one projection whose output is cut in two halves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(value * F.silu(gate))


@family(
    sites={
        "width 0": 1,
        "width *.up": 2,
        "depth depth": 1,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "3.weight[0]": "output",
        "*": "changes the shape",
    },
)
def glu_mlp() -> Entry:
    model = nn.Sequential(
        nn.Linear(23, HIDDEN), GatedMLP(HIDDEN, 36), GatedMLP(HIDDEN, 52), nn.Linear(HIDDEN, 7)
    )
    return model, (torch.randn(BATCH, LENGTH, 23),), {}
