"""Relations between tokens, as attention sees them: for students of another width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supple.axes.base import selected
from supple.errors import SettingError
from supple.training.batches import Forward, run_model
from supple.training.features import Features, WithFeatures

__all__ = ["KINDS", "Attended", "WithAttended", "attended", "relation_loss", "relations"]

KINDS = ("queries", "keys", "values")
"""What relations are taken of."""


@dataclass(frozen=True)
class Attended:
    """Paths of the modules that give one layer's queries, keys and values.

    Args:
        queries: Path of the module that gives the queries, (N, tokens, width).
        keys: Path of the one that gives the keys.
        values: Path of the one that gives the values.
    """

    queries: str
    keys: str
    values: str

    @property
    def paths(self) -> tuple[str, str, str]:
        """All three, in the order queries, keys, values."""
        return self.queries, self.keys, self.values


def relations(features: Tensor, heads: int) -> Tensor:
    r"""Scaled products of tokens with one another, in several parts of the features.

    The features are split into `heads` equal parts $x_h$ of width $d$, whatever heads the
    layer itself has, and $x_h x_h^\top / \sqrt d$ is returned. Features left over are ignored.

    Args:
        features: Queries, keys or values, shape (N, tokens, width).
        heads: Into how many parts they are split.

    Returns:
        Shape (N, heads, tokens, tokens).

    Raises:
        SettingError: There are fewer features than heads.

    Example:
        >>> relations(torch.ones(1, 3, 9), heads=2)[0, 0, 0].tolist()   # d = 4
        [2.0, 2.0, 2.0]
    """
    width = features.shape[-1] // heads
    if not width:
        raise SettingError(
            f"relations need at least one feature for each of {heads} heads, got "
            f"{features.shape[-1]} features; ask for fewer heads"
        )
    split = features[..., : width * heads].reshape(*features.shape[:-1], heads, width)
    parts = split.transpose(1, 2)
    if parts.dtype.itemsize < 4:
        parts = parts.float()
    return parts @ parts.transpose(2, 3) / math.sqrt(width)


def relation_loss(
    student: Tensor, teacher: Tensor, heads: int, where: Tensor | None = None
) -> Tensor:
    r"""Tells how far a student's relations between tokens are from a teacher's.

    $\text{KL}(\text{softmax}(R_t) \| \text{softmax}(R_s))$, the mean over heads and tokens,
    where $R$ are `relations`. The widths of the two may differ. No gradient flows to the
    teacher.

    Args:
        student: The student's queries, keys or values, shape (N, tokens, width).
        teacher: The teacher's, shape (N, tokens, width).
        heads: Into how many parts both are split.
        where: Which tokens count, shape (N, tokens); the others are padding.

    Returns:
        A scalar in nats, at least 0.

    Example:
        >>> x = torch.eye(4)[None]
        >>> relation_loss(x, x, heads=2).item()
        0.0

    Source:
        Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for
        Compressing Pretrained Transformers", arXiv:2012.15828.
    """
    ours, theirs = relations(student, heads), relations(teacher.detach(), heads)
    if where is not None:
        hidden = ~where.bool()[:, None, None, :]
        least = torch.finfo(ours.dtype).min
        ours, theirs = ours.masked_fill(hidden, least), theirs.masked_fill(hidden, least)
    each = F.kl_div(
        ours.log_softmax(-1), theirs.to(ours).log_softmax(-1), reduction="none", log_target=True
    )
    each = each.sum(-1).mean(1)  # over tokens looked at, then over heads
    if where is None:
        return each.mean()
    return (each * where).sum() / where.sum().clamp(min=1)


def attended(model: nn.Module, where: Sequence[str] | None = None) -> list[Attended]:
    """Finds where the layers of a model make queries, keys and values.

    Args:
        model: A model whose attention computes them in modules of their own.
        where: Shell-style patterns of the paths of the modules for queries, for keys and for
            values, each of which matches one module per layer. None looks for modules that
            have a query, a key and a value module as children: just one each whose name
            begins with q, k and v.

    Returns:
        One entry per layer, in the order in which the model holds them.

    Raises:
        SettingError: There are none, or the patterns match unequal numbers of modules.

    Example:
        >>> layer = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q_proj", "k_proj", "v_proj")})
        >>> attended(nn.Sequential(layer))[0].keys
        '0.k_proj'
    """
    found = list(_siblings(model)) if where is None else _matched(model, where)
    if not found:
        raise SettingError(
            f"no modules for queries, keys and values were found in {type(model).__name__}"
            + ("" if where else "; name them by patterns: (queries, keys, values)")
        )
    return found


def _siblings(model: nn.Module) -> Iterator[Attended]:
    for path, module in model.named_modules():
        begin = f"{path}." if path else ""
        heads = [
            [name for name, child in module.named_children() if _owns(name, child, letter)]
            for letter in "qkv"
        ]
        if all(len(each) == 1 for each in heads):
            queries, keys, values = (begin + each[0] for each in heads)
            yield Attended(queries, keys, values)


def _owns(name: str, child: nn.Module, letter: str) -> bool:
    weight = getattr(child, "weight", None)  # a norm of queries has a vector
    return name.lower().startswith(letter) and isinstance(weight, Tensor) and weight.dim() > 1


def _matched(model: nn.Module, where: Sequence[str]) -> list[Attended]:
    paths = [path for path, _ in model.named_modules()]
    matched = [[path for path in paths if selected(path, pattern)] for pattern in where]
    if len(matched) != 3 or len({len(each) for each in matched}) != 1:
        raise SettingError(
            "patterns for queries, keys and values must match equally many modules, got "
            f"{[len(each) for each in matched]} for {tuple(where)}"
        )
    return [Attended(*each) for each in zip(*matched, strict=True)]


class WithAttended:
    """A `forward=` that also gives queries, keys and values of the last layer that ran.

    Losses then get `Features`, whose `features` are `queries`, `keys` and `values`.

    Args:
        layers: What `attended` found in the model.
        forward: `forward(model, batch) -> output`; by default by the batch's type.

    Example:
        >>> layer = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("query", "key", "value")})
        >>> run = lambda model, x: [part(x) for part in model.values()]
        >>> seen = WithAttended(attended(layer), run)(layer, torch.ones(2, 3, 4))
        >>> {name: tuple(each.shape) for name, each in seen.features.items()}
        {'queries': (2, 3, 4), 'keys': (2, 3, 4), 'values': (2, 3, 4)}
    """

    def __init__(self, layers: Sequence[Attended], forward: Forward = run_model) -> None:
        self.layers = tuple(layers)
        paths = [path for layer in self.layers for path in layer.paths]
        self._forward = WithFeatures(paths, forward)

    def __call__(self, model: nn.Module, batch: Any) -> Features:
        """Runs a model on a batch.

        Raises:
            SettingError: None of the layers ran.
        """
        seen = self._forward(model, batch)
        for layer in reversed(self.layers):
            if all(path in seen.features for path in layer.paths):
                last = {kind: seen.features[getattr(layer, kind)] for kind in KINDS}
                return Features(seen.output, last)
        raise SettingError(f"none of {len(self.layers)} attention layers ran at this size")
