"""LightHuBERT: training the largest size first helps all sizes at masked prediction.

Claim of the paper: a transformer whose sizes predict a teacher's hidden states in masked places
is better at all of them if the largest size is trained alone first (stage 1) and random sizes
only then (stage 2).

Arms: the teacher is MiniLM (6 layers, 384 wide), which sees whole texts; the student is the
same architecture with new random weights, with elastic FFNs, heads and depth (the width of the
hidden states is fixed in this network). Both arms make `STEPS` steps of AdamW with a
cosine on the same blocks of 32 tokens of the WikiText-2 validation text, of which the last
tenth is held out (its second half is reported on), and one size per step. Two stages: the
first half of the steps trains the largest size. OFF: all steps train random sizes, from the
same first weights. Targets and masks are the same. The learning rate is the same for both arms
and was not tuned: `LR`, a usual value for small transformers; no other was tried.

Thresholds, set before the first run: any gain beyond the spread over seeds, in the mean
held-out loss of 10 random sizes and in the mean test accuracy of linear probes (ridge
regression on mean last hidden states of the beginnings of film reviews, unmasked) of the same
sizes. The loss may not be earned by a leak: the teacher is a module of its own that sees no
masks.

Result: not run yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import AutoModel

from reproductions._minilm import encoder, tokenizer
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.data.base import Splits, TensorSource, split
from supple.data.text import blocks
from supple.network import Elastic, elastic
from supple.space import Config
from supple.supernet.lighthubert import LightHuBERT, MaskedRegression
from supple.testing.reproduce import Claim, across
from supple.training.features import WithFeatures
from supple.training.loop import train
from supple.training.seeds import generator, kept

__all__ = ["DATA", "OFF", "ON", "claims"]

DATA = (
    "text/wikitext2-valid.txt",
    "movie-reviews/train.parquet",
    "movie-reviews/test.parquet",
)
SIZES, LENGTH, BATCH, STEPS, LR = 10, 32, 8, 80, 5e-4
READ, REVIEWS, RIDGE = 32, 200, 10.0
LAST = "encoder.layer.*"


def method(tune: float) -> LightHuBERT:
    """Gives an arm: `tune` is the share of the steps that stage 1 has."""
    return LightHuBERT(
        tune=tune,
        masked="embeddings.word_embeddings",
        layers=LAST,
        top=4,
        coverage=0.4,
        span=3,
    )


ON = method(0.5)
OFF = method(0.0)


def claims(method: LightHuBERT, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares held-out losses and linear probes with training in one stage."""
    scores = arms(tuple(seeds))
    ours, baseline = scores[method.tune], scores[OFF.tune]
    yield Claim(
        "ten sizes predict the teacher better after two stages than after stage 2 alone",
        [each[0] for each in ours],
        [each[0] for each in baseline],
        better="lower",
        unit="mean squared error",
        details={"ours": ours, "one stage": baseline, "columns": ["loss", "accuracy"]},
    )
    yield Claim(
        "linear probes of these sizes are better in the same order",
        [each[1] for each in ours],
        [each[1] for each in baseline],
        unit="accuracy",
    )


@cache
def arms(seeds: tuple[int, ...]) -> dict[float, list[list[float]]]:
    """Gives held-out loss and probe accuracy for each arm and seed."""
    cases = [(tune, seed) for seed in seeds for tune in (ON.tune, OFF.tune)]
    found = dict(zip(cases, across(_scores, cases), strict=True))
    return {tune: [found[tune, seed] for seed in seeds] for tune in (ON.tune, OFF.tune)}


def _scores(case: tuple[float, int]) -> list[float]:
    tune, seed = case
    teacher = encoder()
    with kept(seed):
        student = AutoModel.from_config(teacher.config, add_pooling_layer=False)
    data = text(seed)
    axes = [Width((0.5, 0.75, 1.0)), Heads((0.5, 0.75, 1.0)), Depth((3, 4, 5, 6))]
    net = elastic(student, kwargs=data.train.example(), axes=axes, verify=False)
    taught = LightHuBERT(**{**vars(method(tune)), "teacher": teacher})
    train(
        net,
        data.train,
        loss,
        method=taught,
        optimizer="adamw",
        lr=LR,
        schedule="cosine",
        clip=1.0,
        steps=STEPS,
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    net.eval()
    sizes = net.space.random_many(SIZES, generator(0, "sizes"))
    configs = net.space.decode_many(sizes)
    losses = [_held_out(net, taught, teacher, config, data) for config in configs]
    accuracies = [_probe(net, config) for config in configs]
    return [sum(losses) / SIZES, sum(accuracies) / SIZES]


def loss(output, batch) -> Tensor:
    """There are no labels; the weight of this loss is 0."""
    raise NotImplementedError


@torch.no_grad()
def _held_out(
    net: Elastic, taught: LightHuBERT, teacher: nn.Module, config: Config, data: Splits
) -> float:
    run = taught.prediction(net.module, generator(0, "masks"))
    score = MaskedRegression(loss, taught.distance)
    with net.at(config):
        each = [
            float(score.regression(run(net.module, batch), run(teacher, batch)))
            for batch in data.test.batches()
        ]
    return sum(each) / len(each)


@torch.no_grad()
def _probe(net: Elastic, config: Config) -> float:
    """Test accuracy of a ridge regression on what a size makes of film reviews."""
    with net.at(config):
        train_x, test_x = (_read(net.module, reviews(part)[0]) for part in ("train", "test"))
    mean, spread = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / spread, (test_x - mean) / spread
    signs = 2.0 * reviews("train")[1] - 1
    gram = train_x.T @ train_x + RIDGE * torch.eye(train_x.shape[1])
    weights = torch.linalg.solve(gram, train_x.T @ (signs - signs.mean()))
    right = ((test_x @ weights + signs.mean()) > 0) == reviews("test")[1].bool()
    return float(right.float().mean())


def _read(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    states = WithFeatures([])(model, batch).output.last_hidden_state
    where = batch["attention_mask"][..., None]
    return (states * where).sum(1) / where.sum(1)


@cache
def reviews(part: str) -> tuple[dict[str, Tensor], Tensor]:
    """Reads film reviews, every nth of them, and their labels, 0 or 1."""
    rows = pq.read_table(_data() / "movie-reviews" / f"{part}.parquet").to_pydict()
    step = max(1, len(rows["label"]) // REVIEWS)
    texts = [" ".join(one.split()[:READ]) for one in rows["text"][::step]]
    cut = tokenizer()(
        texts, truncation=True, max_length=READ, padding=True, return_tensors="pt"
    )
    batch = {name: cut[name] for name in ("input_ids", "attention_mask")}
    return batch, torch.tensor(rows["label"][::step])


@cache
def text(seed: int) -> Splits:
    """Loads blocks of tokens: nine tenths to train, the last twentieth to report on."""
    whole = (_data() / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    found = blocks(tokenizer()(whole, add_special_tokens=False)["input_ids"], LENGTH)
    first, second = int(0.9 * len(found)), int(0.95 * len(found))
    places = torch.arange(len(found))
    positions = {
        "train": places[:first],
        "validation": places[first:second],
        "test": places[second:][:64],
    }
    return split(TensorSource({"input_ids": found}), positions, batch_size=BATCH, seed=seed)


def _data() -> Path:
    return Path(os.environ["SUPPLE_DATA"])
