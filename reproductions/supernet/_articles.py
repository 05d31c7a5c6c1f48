"""Passages of Wikipedia articles: a text to distil on, and a question for probes.

The WikiText-2 validation text, in passages of 32 word pieces. Some of the 20 longest articles'
passages are held out, ten of each to choose by and ten to report on, spread evenly. A probe
tells which of these articles a passage is from: 1 in 20 is chance.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reproductions._minilm import tokenizer
from supple.data.base import Dataset, TensorSource, split
from supple.data.text import blocks

__all__ = ["DATA", "held_out", "probe", "training"]

DATA = ("text/wikitext2-valid.txt",)
LENGTH, LONGEST, EACH, RIDGE, AT_ONCE = 32, 20, 10, 100.0, 50
TITLE = r"\n = [^=\n]+ = \n"


def training(batch_size: int, seed: int) -> Dataset:
    """Gives the passages that are not held out, in batches of `input_ids`."""
    ids, _, places = _passages()
    return split(
        TensorSource({"input_ids": ids}), places, batch_size=batch_size, seed=seed
    ).train


def held_out(part: str) -> tuple[Tensor, Tensor]:
    """Gives the passages of a part, shape (200, 32), and their articles' numbers, (200,).

    Args:
        part: `"validation"`, to choose by, or `"test"`, to report on.
    """
    ids, articles, places = _passages()
    numbers = articles[places[part]]
    return ids[places[part]], torch.unique(numbers, return_inverse=True)[1]


def probe(model: nn.Module) -> float:
    """Gives the accuracy of a linear probe of an encoder: which article is a passage from?

    It is a ridge regression on the mean last hidden state, fitted to the validation passages
    and tested on the test passages. The encoder runs in bfloat16.

    Args:
        model: Its output has `last_hidden_state`.
    """
    x, tested = (_read(model, held_out(part)[0]) for part in ("validation", "test"))
    labels = F.one_hot(held_out("validation")[1]).to(x)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, tested = (x - mean) / spread, (tested - mean) / spread
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (labels - labels.mean(0)))
    named = (tested @ weights + labels.mean(0)).argmax(1)
    return float((named == held_out("test")[1]).float().mean())


@torch.no_grad()
def _read(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        states = [model(part).last_hidden_state.float().mean(1) for part in ids.split(AT_ONCE)]
    return torch.cat(states)


@cache
def _passages() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """All passages, the number of each one's article, and the places of the three parts."""
    path = Path(os.environ["SUPPLE_DATA"]) / DATA[0]
    articles = re.split(TITLE, path.read_text(encoding="utf-8"))[1:]
    cut = [
        blocks(tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"], LENGTH)
        for text in articles
    ]
    counts = torch.tensor([len(each) for each in cut])
    numbers = torch.arange(len(cut)).repeat_interleave(counts)
    chosen = []
    for article in counts.argsort(descending=True)[:LONGEST]:
        of_it = (numbers == article).nonzero().flatten()
        chosen.append(of_it[torch.linspace(0, len(of_it) - 1, 2 * EACH).long()])
    validation, test = torch.cat(chosen)[::2], torch.cat(chosen)[1::2]
    trained = torch.ones(len(numbers), dtype=torch.bool)
    trained[torch.cat(chosen)] = False
    places = {"train": trained.nonzero().flatten(), "validation": validation, "test": test}
    return torch.cat(cut), numbers, places
