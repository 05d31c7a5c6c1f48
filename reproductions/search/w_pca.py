"""W-PCA: components times parameters rank untrained language models better than other proxies.

Claim of the paper: without training and without gradients, the number of principal components
before the activations times the number of parameters orders transformers better by what they
become than the number of parameters, and than proxies from gradients do.

Per seed, 24 language models of width 64 on the characters of tiny Shakespeare (blocks of 32, 16
per batch): 12 with 1 to 4 layers and a feed-forward width of 16, 64, 128 or 256 in each, and 12
with the same number of parameters (within 3 %), which one layer puts into a wide feed-forward
network and four layers into attention. Each is scored with its first weights on two batches of
1,024 characters, then trained for `STEPS` steps (AdamW with cosine, one learning rate for all,
the same text) and judged by its loss on validation text. The figure is Spearman's correlation
of score and minus the loss.

Fair: all proxies see the same weights and the same two batches.

Thresholds: a higher correlation by any amount beyond the spread over seeds, as the catalogue of
techniques has it, than the number of parameters, the norm of the gradients and SynFlow; over
all models, and over those of one size, so that what merely counts parameters cannot do it.

History: the catalogue's 40 models became 24 for each of three seeds, for the time they take.
One run on a seed of its own, with 120 steps, showed how long it takes; now there are 100.

Result: no. It ranks worse than the number of parameters over all models, and backwards at one
size, about as gradient norm and SynFlow do. A guess at the reason: all models are far from
trained after 100 steps, and wide feed-forward layers, which score high, may pay later than
attention.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from supple import proxies
from supple.data.base import Splits
from supple.data.text import load
from supple.search._zero_cost import ZeroCostSearch
from supple.search.w_pca import WPCA
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.seeds import kept

__all__ = ["DATA", "OFF", "ON", "claims"]

DATA = ("text/tinyshakespeare.txt",)
ON = WPCA(layers="*.up")
OFF = ZeroCostSearch()
DIM, HEADS, LENGTH, BATCH = 64, 4, 32, 16
LAYERS, WIDTHS = (1, 2, 3, 4), (16, 64, 128, 256)
EACH = 12
SIZE = 90_000
"""Parameters of the blocks of those of one size."""
STEPS, RATE = 100, 3e-3
JUDGED = 12
"""Batches of validation text."""


def claims(method: ZeroCostSearch, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares rank correlations with those of other proxies, over all and at one size."""
    found = [arms(seed) for seed in seeds]
    ours = type(method).__name__
    for name in (type(OFF).__name__, "gradient norm", "SynFlow"):
        label = "the number of parameters" if name == type(OFF).__name__ else name
        for part, where in (
            ("over all models", slice(None)),
            ("at one size", slice(EACH, None)),
        ):
            yield Claim(
                f"{part} it ranks better than {label}",
                [correlation(each, ours, where) for each in found],
                [correlation(each, name, where) for each in found],
                unit="Spearman's correlation with minus the loss",
                details={"losses": [[one["loss"] for one in each] for each in found]},
            )


def correlation(models: list[dict[str, float]], name: str, where: slice) -> float:
    """Gives Spearman's correlation of a proxy and minus the loss, 0 for equal scores."""
    scores = [one[name] for one in models[where]]
    if len(set(scores)) == 1:
        return 0.0
    return float(spearmanr(scores, [-one["loss"] for one in models[where]]).statistic)


@cache
def arms(seed: int) -> list[dict[str, float]]:
    """Gives scores and losses of all models of a seed."""
    cases = [(widths, seed * 100 + place) for place, widths in enumerate(sampled(seed))]
    return across(measured, cases)


def sampled(seed: int) -> list[tuple[int, ...]]:
    """Draws models as feed-forward widths, one per layer: free ones, then such of one size."""
    random = np.random.default_rng(seed)
    free = [
        tuple(int(random.choice(WIDTHS)) for _ in range(random.choice(LAYERS)))
        for _ in range(EACH)
    ]
    same: list[tuple[int, ...]] = []
    while len(same) < EACH:
        layers = int(random.choice(LAYERS))
        left = (SIZE - layers * (4 * DIM * DIM + 9 * DIM)) // (2 * DIM + 1)
        shares = random.dirichlet(np.ones(layers))
        widths = tuple(max(8, round(share * left / 8) * 8) for share in shares)
        if abs(blocks(widths) / SIZE - 1) < 0.03:
            same.append(widths)
    return free + same


def blocks(widths: tuple[int, ...]) -> int:
    """Counts the parameters of the blocks."""
    return sum(4 * DIM * DIM + 9 * DIM + (2 * DIM + 1) * width for width in widths)


def measured(case: tuple[tuple[int, ...], int]) -> dict[str, float]:
    """Scores a model, trains it, and gives its loss on validation text beside the scores."""
    widths, seed = case
    with kept(seed):
        model = Model(widths)
    data = text()
    some = [data.train.source.take(places) for places in torch.arange(64).split(32)]
    found = {
        type(method).__name__: statistics.fmean(method.score(model, batch) for batch in some)
        for method in (ON, OFF)
    }
    found["gradient norm"] = statistics.fmean(
        proxies.gradient_norm(model, batch, loss) for batch in some
    )
    found["SynFlow"] = proxies.synflow(model, some[0])
    train(
        model,
        data.train,
        loss,
        steps=STEPS,
        lr=RATE,
        schedule="cosine",
        warmup=0.1,
        clip=1.0,
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    found["loss"] = judged(model)
    return found


@torch.no_grad()
def judged(model: nn.Module) -> float:
    """Gives the mean loss on validation text, in nats per character."""
    model.eval()
    batches = zip(text().validation.batches(), range(JUDGED), strict=False)
    return statistics.fmean(float(loss(model(**batch), batch)) for batch, _ in batches)


def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Gives the mean loss of the next characters."""
    return F.cross_entropy(output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@cache
def text() -> Splits:
    """Loads the text as blocks of characters."""
    path = Path(os.environ["SUPPLE_DATA"]) / DATA[0]
    return load(path, length=LENGTH, batch_size=BATCH)


class Block(nn.Module):
    """Attention and a feed-forward network, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.up = nn.Linear(DIM, width)
        self.down = nn.Linear(width, DIM)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """A small language model with one feed-forward width per layer."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, DIM)
        self.places = nn.Parameter(torch.randn(LENGTH, DIM) * 0.02)
        self.blocks = nn.Sequential(*(Block(width) for width in widths))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 256)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(input_ids) + self.places)))
