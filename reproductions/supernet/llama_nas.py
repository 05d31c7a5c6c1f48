"""LLaMA-NAS: fine-tuned once at all sizes, a language model is searched instead of halved.

Claim of the paper: one fine-tuning run makes a pretrained Llama elastic in its layers and FFN
widths; a search on predictors (LINAS) then finds smaller networks that lose little, better ones
than uniform cuts, without training any of them.

Set-up: a small Llama (6 layers, 5.5 M parameters) that was pretrained as usual, fine-tuned for
`STEPS` steps of AdamW with a cosine on the last twentieth of the Brown corpus, which it has not
seen: 80 % of it to train, a tenth to choose by and a tenth to report on. Elastic are the number
of layers (4, 5 or 6, the first ones stay) and each layer's FFN width (half or full): 112 sizes.
Each size is evaluated once, on `BLOCKS` blocks of 64 tokens of the validation set; what a
search sees is that loss and the closed-form number of parameters. One network, five seeds of
the searches.

Arms: LINAS and random search, with `EVALUATIONS` evaluations each; with a seed, both begin with
the same random sizes. The catalogue of techniques has 60 evaluations, which would be more than
half of this space whatever the search. The figure is the hypervolume up to the loss of the
smallest size and the full number of parameters, as a share of that of all 112 sizes.

- At most as many parameters as all FFN halved (70 % of the full network's): of what LINAS
  evaluated, the size with the lowest validation loss, against the network with all layers and
  each FFN halved, by the test loss, both from the same weights.
- The same size cut from a network that was fine-tuned as usual, with as many steps on the same
  batches, its units sorted by the same rule. The learning rates are those that
  `supernet/sorted-llama` found by validation loss, with the same data and steps: for ordinary
  fine-tuning its own best of four, for LLaMA-NAS that of training several depths at once, so
  that the tuning favours the baseline.

With the idea switched off, sizes are searched at random and cut from ordinary fine-tuning.

Thresholds: any difference beyond the spread over seeds, as the catalogue has it.

Result: reproduced. LINAS reaches 98.9 % of the best hypervolume, random search 93.3 %. At most
as many parameters as with all FFN halved, the size it finds has 4.760 nats per token on the
mean, halving 5.157 and the same size cut from the ordinarily fine-tuned network 4.833 (the full
networks: 4.502 and 4.479). Halving keeps all layers; the sizes found have 4 or 5, with wide
FFN first. That they beat halving would be so without LLaMA-NAS' training as well (switched off:
+0.39 nats); the search and the training gain by the other two claims.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import cache, partial

import numpy as np
import torch

from reproductions.supernet.sorted_llama import (
    DATA,
    Ordinary,
    _folder,
    loss,
    loss_on,
    settings,
    text,
)
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.data.base import Dataset
from supple.network import Elastic, elastic
from supple.search.base import SearchAlgorithm
from supple.search.hardware_aware_search import HardwareAwareSearch
from supple.search.random_search import RandomSearch
from supple.space import Config
from supple.study.indicators import hypervolume
from supple.supernet.base import SupernetRule
from supple.supernet.llama_nas import LlamaNas
from supple.testing.reproduce import Claim, across
from supple.training.loop import train

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2, 3, 4)
SEED = 0
STEPS = 120
CHOSEN = {"LlamaNas": 1e-4, "Ordinary": 3e-5}
LAYERS, WIDTHS = (4, 5, 6), (0.5, 1.0)
BLOCKS = 64
EVALUATIONS, POPULATION, CANDIDATES = 24, 8, 400

ON = LlamaNas(tune=0.25)
OFF = Ordinary()
Weights = dict[str, np.ndarray]
LINAS = HardwareAwareSearch(population=POPULATION, candidates=CANDIDATES)
RANDOM = RandomSearch()


def claims(method: SupernetRule, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares searches, the size found with uniform halving, and the two fine-tunings."""
    found = [searches(seed) for seed in seeds]
    search = "LINAS" if isinstance(method, LlamaNas) else "random"
    sizes = [each[search]["best"] for each in found]
    tested = test_losses(tuple(each[name]["best"] for each in found for name in each))
    yield Claim(
        "LINAS finds more hypervolume than random search",
        [each[search]["hypervolume"] for each in found],
        [each["random"]["hypervolume"] for each in found],
        unit="share of the best",
        details={"sizes": len(table()[0]), "evaluations": EVALUATIONS},
    )
    yield Claim(
        "the size found loses less than halving every FFN",
        [tested[size][0] for size in sizes],
        [tested[halved()][0] for _ in sizes],
        better="lower",
        unit="nats per token",
        details={
            "sizes": [dict(size) for size in sizes],
            "full network": tested[full()],
            "columns": ["LLaMA-NAS", "ordinary fine-tuning"],
        },
    )
    column = 0 if isinstance(method, LlamaNas) else 1
    yield Claim(
        "it loses less than the same size cut from an ordinarily fine-tuned network",
        [tested[size][column] for size in sizes],
        [tested[size][1] for size in sizes],
        better="lower",
        unit="nats per token",
        details={"mean": [statistics.fmean(tested[size][i] for size in sizes) for i in (0, 1)]},
    )


@cache
def searches(seed: int) -> dict[str, dict]:
    """Runs both searches on the table; gives their hypervolumes and best sizes of 70 %."""
    return {"LINAS": searched(LINAS, seed), "random": searched(RANDOM, seed)}


def searched(method: SearchAlgorithm, seed: int) -> dict:
    """Runs a search on the table."""
    sizes, losses, params = table()
    space = network().space
    places = {config: i for i, config in enumerate(sizes)}
    known = np.array([losses, params]).T

    def price(rows: np.ndarray) -> np.ndarray:
        return np.array([params[places[config]] for config in space.decode_many(rows)])

    run = method.start(space, ["loss", "params"], seed, exact={"params": price})
    asked: list[int] = []
    while len(asked) < EVALUATIONS:
        (config,) = run.ask(1)
        asked.append(places[config])
        run.tell([config], known[asked[-1:]])
    limit = params[places[halved()]]
    small = [place for place in asked if params[place] <= limit]
    reference = (losses[places[space.smallest()]] + 1e-9, max(params) + 1.0)
    return {
        "hypervolume": hypervolume(known[asked], reference) / hypervolume(known, reference),
        "best": sizes[min(small, key=lambda place: losses[place])],
    }


@cache
def table() -> tuple[list[Config], list[float], list[float]]:
    """Gives all sizes with their validation losses, each evaluated once, and parameters."""
    net = network()
    rows = net.space.every()
    sizes = net.space.decode_many(rows)
    weights, _ = fine_tuned()
    first, second = across(partial(_validated, weights), (sizes[::2], sizes[1::2]))
    losses = dict(zip(sizes[::2] + sizes[1::2], first + second, strict=True))
    return sizes, [losses[size] for size in sizes], net.costs(rows)["params"].tolist()


@cache
def test_losses(sizes: tuple[Config, ...]) -> dict[Config, tuple[float, float]]:
    """Gives the test losses of sizes, elastic and ordinarily fine-tuned."""
    wanted = sorted({*sizes, halved(), full()}, key=lambda size: size.digest)
    columns = across(partial(_tested, wanted), fine_tuned())
    return dict(zip(wanted, zip(*columns, strict=True), strict=True))


@cache
def fine_tuned() -> tuple[Weights, Weights]:
    """Gives the weights after LLaMA-NAS and after ordinary fine-tuning."""
    ours, ordinary = across(_weights, (ON, OFF))
    return ours, ordinary


def _weights(method: SupernetRule) -> Weights:
    net = tuned(method, CHOSEN[type(method).__name__], SEED)
    return {name: p.detach().numpy() for name, p in net.module.named_parameters()}


def _validated(weights: Weights, sizes: list[Config]) -> list[float]:
    net = _elastic(weights)
    return [loss_at(net, size, text().validation.first(BLOCKS)) for size in sizes]


def _tested(sizes: list[Config], weights: Weights) -> list[float]:
    net = _elastic(weights)
    return [loss_at(net, size, text().test) for size in sizes]


def loss_at(net: Elastic, size: Config, data: Dataset) -> float:
    """Gives the mean loss per token of a size."""
    with net.at(size):
        return loss_on(net.module, data)


def halved() -> Config:
    """Gives the size with all layers and each FFN halved."""
    space = network().space
    return space.config({s.name: s.choices[0] for s in space.sites if s.axis == "width"})


def full() -> Config:
    """Gives the full size."""
    return network().space.largest()


@cache
def network() -> Elastic:
    """Gives the pretrained network, elastic; it is never trained."""
    return _elastic()


def tuned(method: SupernetRule, rate: float, seed: int) -> Elastic:
    """Fine-tunes the pretrained network; the ordinary one is sorted afterwards."""
    net = _elastic()
    train(net, text().train, loss, method=method, **(settings(rate, seed) | {"steps": STEPS}))
    if isinstance(method, Ordinary):
        net.sort("l1")
    return net


def _elastic(weights: Weights | None = None) -> Elastic:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_folder())
    model.config.use_cache = False
    axes = [Depth(LAYERS), Width(WIDTHS, where="*mlp*")]
    net = elastic(model, kwargs=text().train.example(), axes=axes, verify=False)
    with torch.no_grad():
        for name, values in (weights or {}).items():
            model.get_parameter(name).copy_(torch.from_numpy(values))
    return net
