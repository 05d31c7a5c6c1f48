"""Recorded couplings equal those of the whole-program solver (`tests/oracle.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.base import Patch
from supple.graph.couple import Graph, analyse
from supple.graph.dims import Atom, Dim, atoms, evaluate, monomials
from supple.plan import Plan
from tests import zoo
from tests.oracle import Place, Solution, directions, solve, violations

#: Reasons that are no matter of shapes: the program would accept another size there.
MEANING = (
    "its rows are looked up by index",
    "the kernel size of a convolution",
    "it is a dimension of the model's output",
    "no other parameter depends on it",
    "is selected",
)


def one_layer(sizes: dict[str, Any]) -> dict[str, Any]:
    return {**sizes, "num_hidden_layers": 1}


def bert() -> zoo.Entry:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**one_layer(zoo.encoders.encoder_sizes()))
    return BertForSequenceClassification(config).eval(), (), {"input_ids": zoo.base.tokens()}


def gpt2() -> zoo.Entry:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_embd=48, n_layer=1, n_head=4, n_inner=80, n_positions=37
    )
    config.use_cache = False
    return GPT2LMHeadModel(config).eval(), (), {"input_ids": zoo.base.tokens()}


def llama() -> zoo.Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**one_layer(zoo.decoders.decoder_sizes()), use_cache=False)
    return LlamaForCausalLM(config).eval(), (), {"input_ids": zoo.base.tokens()}


def vit() -> zoo.Entry:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=80,
        image_size=24,
        patch_size=8,
        num_labels=7,
    )
    return ViTForImageClassification(config).eval(), (), {"pixel_values": zoo.base.image(24)}


class InvertedResidual(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)))
        y = self.norm3(self.project(F.relu6(self.norm2(self.depthwise(y)))))
        return x + y if self.residual else y


def mobilenet_v2() -> zoo.Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        InvertedResidual(12, 36, 18),
        InvertedResidual(18, 54, 18),
        nn.Conv2d(18, 26, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(26, 7),
    )
    return model.eval(), (zoo.base.image(8),), {}


FAMILIES: dict[str, Callable[[], zoo.Entry]] = {
    "resnet_option_a": zoo.ZOO["resnet_option_a"],
    "squeeze_excite": zoo.ZOO["squeeze_excite"],
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
    "mobilenet_v2": mobilenet_v2,
    "glu_mlp": zoo.ZOO["glu_mlp"],
    "densenet": zoo.ZOO["densenet"],
    "shufflenet": zoo.ZOO["shufflenet"],
    "resnext": zoo.ZOO["resnext"],
    "llama": llama,
    "nanogpt": zoo.ZOO["nanogpt"],
    "convnext": zoo.ZOO["convnext"],
}


def variables(graph: Graph) -> list[dict[Atom, float]]:
    """What may change, one entry per direction: atoms and how fast each of them changes."""
    found = [{atom: atom.size / group.full for atom in group.atoms} for group in graph.groups]
    grouped = {atom for entry in found for atom in entry}
    for label, reason in graph.fixed.items():
        if reason.startswith("no other parameter depends on it"):
            name, _, dim = label.removesuffix("]").rpartition("[")
            for atom in atoms(graph.tensors[name][int(dim)]):
                if atom not in grouped and not (atom.pinned or atom.ordered):
                    found.append({atom: 1.0})
                    grouped.add(atom)
    return found


def slope(dim: Dim, rates: dict[Atom, float]) -> float:
    """How fast the size of a dimension changes when atoms change at these rates."""
    total = 0.0
    for key, coefficient in monomials(dim).items():
        for position, atom in enumerate(key):
            others = [a.size for i, a in enumerate(key) if i != position]
            total += coefficient * float(np.prod(others)) * rates.get(atom, 0.0)
    return total


def recorded_directions(graph: Graph, places: list[Place]) -> np.ndarray:
    columns = [
        [slope(graph.tensors[name][dim], rates) for name, dim in places]
        for rates in variables(graph)
    ]
    return np.array(columns, dtype=float).reshape(len(columns), len(places)).T


def fixed_by_meaning(graph: Graph, solution: Solution) -> list[Place]:
    """Places that the recorder holds for a reason that shapes cannot show.

    Buffers that the program does not read are held too.
    """
    parameters = dict(graph.model.named_parameters())
    read = {symbol for guard in solution.guards for symbol in guard.free_symbols}
    held = []
    for name, dim in solution.places:
        if name not in parameters and solution.symbols[name, dim] not in read:
            held.append((name, dim))
            continue
        reasons = [atom.pinned or atom.ordered for atom in atoms(graph.tensors[name][dim])]
        if reasons and all(any(m in reason for m in MEANING) for reason in reasons):
            held.append((name, dim))
    return held


def outside(columns: np.ndarray, space: np.ndarray, places: list[Place]) -> list[str]:
    """Places at which directions leave a space."""
    left, values, _ = np.linalg.svd(space, full_matrices=False)
    basis = left[:, values > 1e-8 * max(values.max(), 1e-12)]
    rest = columns - basis @ (basis.T @ columns)
    wrong = (np.abs(rest) > 1e-6 * np.abs(columns).max()).any(axis=1)
    return [f"{name}[{dim}]" for (name, dim), w in zip(places, wrong, strict=True) if w]


#: The zeros that option A pads with are a constant of its code; a sub-network keeps them.
CONSTANTS = {"resnet_option_a": ("extra",)}
#: Where the recorder asks for more than shapes do: which positions are which.
STRICTER = {"shufflenet": "mixing channels of two halves is a permutation if they are equal"}

SOLVED: dict[str, tuple[Graph, Solution]] = {}


def solved(family: str) -> tuple[Graph, Solution]:
    if family not in SOLVED:
        model, args, kwargs = FAMILIES[family]()
        solution = solve(model, args, kwargs, CONSTANTS.get(family, ()))
        SOLVED[family] = analyse(model, args, kwargs), solution
    return SOLVED[family]


FAST = ["resnet_option_a", "squeeze_excite", "bert", "gpt2", "vit", "mobilenet_v2", "glu_mlp"]
CASES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]


@pytest.mark.parametrize("family", CASES)
def test_the_recorded_couplings_are_those_that_the_program_asks_for(family: str) -> None:
    graph, solution = solved(family)
    places = solution.places
    ours = recorded_directions(graph, places)
    theirs = directions(solution, fixed_by_meaning(graph, solution))
    assert ours.shape[1] >= 2
    assert outside(ours, theirs, places) == [], "missed: the program couples more"
    if family not in STRICTER:
        assert outside(theirs, ours, places) == [], "needless: the program couples less"


@pytest.mark.parametrize("family", CASES)
def test_a_coupling_that_is_left_out_is_noticed(family: str) -> None:
    """The comparison itself: one place of a group that stays full must show."""
    graph, solution = solved(family)
    places = solution.places
    theirs = directions(solution, fixed_by_meaning(graph, solution))
    ours = recorded_directions(graph, places)
    changing = np.flatnonzero(ours[:, 0])
    for place in changing[:: max(1, len(changing) // 5)]:
        broken = ours.copy()
        broken[place] = 0.0
        assert outside(broken, theirs, places), places[place]


@pytest.mark.parametrize("family", CASES)
def test_sub_networks_keep_every_equation_of_the_program(family: str) -> None:
    """Sizes and patched integers of random sub-networks, put into PyTorch's own guards."""
    graph, solution = solved(family)
    generator = np.random.default_rng(0)
    assert solution.guards
    for _ in range(3):
        sizes: dict[Atom, int] = {}
        for group in graph.groups:
            units = generator.integers(1, group.full // group.unit, endpoint=True)
            sizes.update(group.sizes(int(units) * group.unit))
        plan = Plan(graph, Patch(sizes=sizes))
        integers = {}
        for key, value in plan._attributes.items():
            suffix = "" if key.index is None else f"[{key.index}]"
            integers[key.module, key.chain[0] + suffix] = value
        found = {
            (name, dim): evaluate(graph.tensors[name][dim], sizes)
            for name, dim in solution.places
        }
        assert found != {place: solution.full[solution.symbols[place]] for place in found}
        assert violations(solution, found, integers) == []


def test_the_third_stage_of_option_a_is_the_first_plus_48() -> None:
    graph, _ = solved("resnet_option_a")
    (first,) = [g for g in graph.groups if ("0.weight", 0) in g.members]
    third = graph.tensors["11.weight"][1]
    assert third.size == 64
    assert evaluate(third, first.sizes(5)) == 5 + 48
    assert evaluate(graph.tensors["5.conv2.weight"][0], first.sizes(5)) == 5 + 16


def test_the_solver_sees_through_a_product_of_heads() -> None:
    """A hand-made case: `heads x width` out of one projection into the next."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out, self.heads = nn.Linear(5, 12), nn.Linear(12, 3), 4

        def forward(self, x: Tensor) -> Tensor:
            y = self.into(x).view(x.shape[0], self.heads, -1)
            return self.out((y - y.mean(1, keepdim=True)).flatten(1))

    solution = solve(Heads(), (torch.randn(2, 5),))
    sizes = {place: solution.full[solution.symbols[place]] for place in solution.places}
    smaller = {
        **sizes,
        ("into.weight", 0): 9,
        ("into.bias", 0): 9,
        ("out.weight", 1): 9,
    }
    assert violations(solution, sizes, {}) == []
    assert violations(solution, smaller, {("", "heads"): 3}) == []
    assert violations(solution, {**smaller, ("into.bias", 0): 12}, {("", "heads"): 3})
    assert violations(solution, smaller, {})
