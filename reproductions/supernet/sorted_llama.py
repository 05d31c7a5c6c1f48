"""Sorted LLaMA: fine-tuning all depths at once makes half the network usable, for nothing.

Claim of the paper: a Llama that is fine-tuned at several depths in each step (SoFT) is better
at its middle layers than one that is fine-tuned as usual and then given exits there, and as
good at its full depth.

Arms: a small Llama (6 layers, 5.5 M parameters) that was pretrained as usual, on the last
twentieth of the Brown corpus, which it has not seen: 80 % of it to train, a tenth to choose by
and a tenth to report on, in blocks of 64 tokens, batch size 4, `STEPS` steps of AdamW with a
cosine. SoFT trains depths 3 to 6 in each step. Ordinary fine-tuning (SFT) makes as many steps
on the same batches; then its first 3 layers are frozen and an exit behind them, with a norm and
a head of its own, is trained for as many steps again. So the baseline has seen every token
twice, and has 1 M parameters that SoFT's shared head has not. Each arm has the best of four
learning rates by validation loss on a seed of its own (SoFT by the sum at half and full depth):
the `CHOSEN` ones, found beforehand. Seeds give the order of the batches.

Thresholds: at half depth any gain beyond the spread over seeds (the catalogue asks for less
than the baseline's perplexity); at full depth at most 2 % more perplexity than SFT, which is
0.0198 nats.

History: the catalogue names tiny Shakespeare, which turned out to be part of this Llama's
pretraining: fine-tuning on it with any of the rates made its held-out tenth worse (3.487 nats
before, 3.496 at best), so that the lowest rate won. Hence a text that it has not seen; the
thresholds are the same. The lowest rate was added to the grid when the second lowest had won.

Result: half of the claim. With half the layers SoFT is 0.08 nats per token better than an exit
that was trained for as many steps again, in each seed. The full network pays for it: 3.3 % more
perplexity than after ordinary fine-tuning, where 2 % were allowed. A likely reason: this
network has 6 layers, and depths 3 to 6 share its loss equally, so that three quarters of the
gradient are of depths that the ordinary fine-tuning does not train; the paper's have 40 layers,
and the shallowest of eight depths is 12.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from supple.axes.depth import Depth
from supple.data.base import Dataset, Splits, TensorSource, split
from supple.data.text import blocks
from supple.network import Elastic, elastic
from supple.space import Space
from supple.supernet.base import SupernetRule
from supple.supernet.sorted_llama import SortedLlama
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.step import Sampler, WholeOnly

__all__ = ["DATA", "OFF", "ON", "claims"]

DATA = ("llama-tiny/model.safetensors", "llama-tiny/tokenizer.json", "text/brown.txt")
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
CHOSEN = {"SortedLlama": 1e-4, "Ordinary": 3e-5, "exit": 3e-4}
TUNING_SEED = 1000
STEPS = 120
DEPTHS = (3, 4, 5, 6)
HALF, FULL = 3, 6
SITE = "model.layers.depth"


@dataclass(frozen=True, kw_only=True)
class Ordinary(SupernetRule):
    """Fine-tunes the full network; exits are trained afterwards."""

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return WholeOnly(space.largest())


ON = SortedLlama()
OFF = Ordinary()


def claims(method: SupernetRule, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities at half and full depth with ordinary fine-tuning and an exit."""
    scores = arms(tuple(seeds))
    ours, baseline = scores[method], scores[OFF]
    yield Claim(
        "half the layers do better than ordinary fine-tuning with a trained exit",
        [each[0] for each in ours],
        [each[0] for each in baseline],
        better="lower",
        unit="nats per token",
        details={"ours": ours, "ordinary": baseline, "columns": ["half depth", "full depth"]},
    )
    yield Claim(
        "the full network's perplexity is within 2 % of ordinary fine-tuning's",
        [each[1] for each in ours],
        [each[1] for each in baseline],
        threshold=-0.0198,
        better="lower",
        unit="nats per token",
    )


@cache
def arms(seeds: tuple[int, ...]) -> dict[SupernetRule, list[list[float]]]:
    """Gives the test losses at half and full depth for each arm and seed."""
    cases = [(method, seed) for seed in seeds for method in (ON, OFF)]
    found = dict(zip(cases, across(_test_losses, cases), strict=True))
    return {method: [found[method, seed] for seed in seeds] for method in (ON, OFF)}


def _test_losses(case: tuple[SupernetRule, int]) -> list[float]:
    method, seed = case
    net = tuned(method, CHOSEN[type(method).__name__], seed)
    half = net.extract({SITE: HALF})
    if isinstance(method, Ordinary):
        half = with_exit(half, CHOSEN["exit"], seed)
    return [loss_on(model, text().test) for model in (half, net.module)]


def tune() -> dict[str, float]:
    """Finds the learning rates of all arms, `CHOSEN`."""
    soft = across(_soft, RATES)
    plain = across(_plain, RATES)
    rate = RATES[plain.index(min(plain))]
    exits = across(partial(_exit, rate), RATES)
    return {
        "SortedLlama": RATES[soft.index(min(soft))],
        "Ordinary": rate,
        "exit": RATES[exits.index(min(exits))],
    }


def _soft(rate: float) -> float:
    net = tuned(ON, rate, TUNING_SEED)
    both = (net.extract({SITE: HALF}), net.module)
    return sum(loss_on(model, text().validation) for model in both)


def _plain(rate: float) -> float:
    return loss_on(tuned(OFF, rate, TUNING_SEED).module, text().validation)


def _exit(plain: float, rate: float) -> float:
    half = tuned(OFF, plain, TUNING_SEED).extract({SITE: HALF})
    return loss_on(with_exit(half, rate, TUNING_SEED), text().validation)


def tuned(method: SupernetRule, rate: float, seed: int) -> Elastic:
    """Fine-tunes the pretrained network at its sizes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_folder())
    model.config.use_cache = False
    data = text()
    net = elastic(model, kwargs=data.train.example(), axes=[Depth(DEPTHS)], verify=False)
    train(net, data.train, loss, method=method, **settings(rate, seed))
    return net


def with_exit(half: nn.Module, rate: float, seed: int) -> nn.Module:
    """Trains a norm and a head of their own behind frozen layers."""
    half.requires_grad_(False)
    half.lm_head.weight = nn.Parameter(half.lm_head.weight.detach().clone())  # tied before
    half.model.norm.requires_grad_(True)
    train(half, text().train, loss, **settings(rate, seed))
    return half


def settings(rate: float, seed: int) -> dict:
    """Gives what all arms have in common."""
    return {
        "steps": STEPS,
        "lr": rate,
        "schedule": "cosine",
        "clip": 1.0,
        "seed": seed,
        "log_every": STEPS,
        "progress": False,
    }


def loss(output, batch) -> Tensor:
    """Gives the mean loss of the next tokens, which the model computes."""
    return output.loss


@torch.no_grad()
def loss_on(model: nn.Module, data: Dataset) -> float:
    """Gives the mean loss per token on a set, in nats."""
    model.eval()
    total = sum(float(model(**b).loss) * len(b["input_ids"]) for b in data.batches())
    return total / data.examples


@cache
def text() -> Splits:
    """Loads the part of the Brown corpus that the network has not seen."""
    from transformers import AutoTokenizer

    whole = (_folder().parent / "text" / "brown.txt").read_text(encoding="utf-8")
    unseen = whole[int(0.95 * len(whole)) :]
    found = blocks(AutoTokenizer.from_pretrained(_folder())(unseen)["input_ids"], 64)
    first, second = int(0.8 * len(found)), int(0.9 * len(found))
    places = torch.arange(len(found))
    positions = {
        "train": places[:first],
        "validation": places[first:second],
        "test": places[second:],
    }
    source = TensorSource({"input_ids": found, "labels": found})
    return split(source, positions, batch_size=4, seed=0)


def _folder() -> Path:
    return Path(os.environ["SUPPLE_DATA"]) / "llama-tiny"
