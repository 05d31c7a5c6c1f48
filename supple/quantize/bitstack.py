"""A network as a stack of blocks that is cut where memory ends, also while it is in use."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import statistics
from supple.cost.count import weight_bytes
from supple.errors import BudgetError, CheckpointError, SettingError
from supple.files import write_tensors
from supple.graph.feeds import feeds
from supple.layers.stacked_signs import SignBlock, StackedSigns
from supple.quantity import quantity, show
from supple.quantize._equivalent import scaled
from supple.rebuild import replace
from supple.storage import load, save
from supple.technique import register
from supple.training.batches import batch_size, run_model, split
from supple.transforms import Given, ModelTransform, evaluating
from supple.weights import matrices

__all__ = ["BitStack", "Stack"]

_PLUS = 1e-3
_BLOCKS = "blocks.safetensors"


@register(title="BitStack", paper="arXiv:2410.23918")
@dataclass(frozen=True, kw_only=True)
class BitStack(ModelTransform):
    r"""Takes linear layers apart into blocks of about a bit a weight, sorted by use.

    Columns that see large inputs come first: inputs are divided, and weights multiplied, by
    $s_j$, the norm over tokens of input $j$, averaged over examples, plus $10^{-3}$, where what
    comes before can take the division. Of the residual $R$, at first the weight, a block holds
    the signs and a product of low rank for the magnitudes (by singular values),

    $$R \leftarrow R - \operatorname{sign}(R) \odot U V, \qquad U V \approx |R|.$$

    Blocks are stacked level by level. Within a level they are sorted by the loss of the
    network in which only this layer has its next block. Every prefix of the stack that holds
    one block of each layer is a network: `Stack` finds the one that fits into so many bytes,
    and moves to another while the network is in use.

    Args:
        rank: Of the products; at most the smaller width of a layer.
        levels: Blocks of each layer, at least 1.
        scaled: Whether inputs and weights are scaled.
        sort: Whether blocks of a level are sorted by loss; else their order is random.
        rows: Examples of the calibration data that the loss is averaged over.
        signs: Whether blocks have signs; else they are products alone, of a rank that takes as
            many bytes.
        budget: Bytes of the network in the end, such as `"3 MB"`; None to keep all blocks.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out. Convolutions stay as they are.

    Example:
        ```python
        model = BitStack(layers="model.layers.*").apply(model, calibration=data, loss=loss)
        Stack(model).save("store")
        stack = Stack.load("store", budget="3 MB")  # reads the blocks that fit
        stack.fit("5 MB")  # reads those that are missing, while stack.model is in use
        ```
        >>> model, x = nn.Sequential(nn.Linear(32, 16)), torch.ones(4, 32)
        >>> method = BitStack(rank=2, levels=3, budget="700 B")
        >>> loss = lambda output, batch: output.square().mean()
        >>> [len(layer.blocks) for layer in method.apply(model, calibration=[(x,)], loss=loss)]
        [2]

    Source:
        Wang et al. 2024, "BitStack: Fine-Grained Size Control for Compressed Large Language
        Models in Variable Memory Environments", arXiv:2410.23918; xinghaow99/BitStack.
    Differs:
        Inputs are scaled wherever the recording shows that it is exact, also of heads that
        share values; the authors list the layers by class. Matrices are put together for each
        product, in float32.
    Checked:
        Blocks against a slow reference; order against losses measured one by one; sizes
        against the bytes of the state; outputs of prefixes that were reached by different ways.
    """

    distinguishing: ClassVar[str] = "change"
    needs: ClassVar[tuple[str, ...]] = ("calibration", "loss")

    rank: int = 16
    levels: int = 16
    scaled: bool = True
    sort: bool = True
    rows: int = 32
    signs: bool = True
    budget: str | None = None
    layers: str = "*"

    def __post_init__(self) -> None:
        for name in ("rank", "levels", "rows"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.budget is not None:
            quantity(self.budget, "B")

    @classmethod
    def examples(cls) -> list[BitStack]:
        """Gives few small blocks."""
        return [cls(rank=2, levels=2, rows=5)]

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Scales, takes apart and sorts."""
        found = {
            name: module
            for name, module in matrices(model, self.layers).items()
            if type(module) in (nn.Linear, Conv1D)
        }
        if not found:
            raise SettingError(f"layers={self.layers!r} matches no linear layer")
        examples = [one for batch in given.batches for one in split(batch, batch_size(batch))]
        if self.scaled:
            self._scale(model, set(found), given, examples)
        made = {_path(name): self._stacked(module) for name, module in found.items()}
        model = replace(model, made)
        self._sort(model, made, given)
        if self.budget is not None:
            Stack(model).fit(self.budget)
        return model

    def _stacked(self, module: nn.Module) -> nn.Module:
        rank = self.rank
        if not self.signs:
            assert isinstance(module.weight, Tensor)
            count, widths = module.weight.numel(), sum(module.weight.shape)
            rank += count // (16 * widths)
        return StackedSigns.from_linear(module, rank, self.levels, signs=self.signs)

    def _scale(
        self, model: nn.Module, names: set[str], given: Given, examples: Sequence[Any]
    ) -> None:
        args, kwargs = given.inputs()
        places = [
            feed
            for feed in feeds(model, args, kwargs, self.layers)
            if feed.producer is not None and names.issuperset(feed.consumers)
        ]
        if not places:
            return
        norms = statistics(model, examples, ["norm"], self.layers, observers={"norm": _Norms})
        for feed in places:
            scale = norms[feed.consumers[0]]["norm"].flatten() + _PLUS
            scaled(model, feed, feed.tied(scale))

    def _sort(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        given: Given,
    ) -> None:
        """Gives each block its place: level by level, within a level by the loss with it."""
        stacks = {path: one for path, one in layers.items() if isinstance(one, StackedSigns)}
        places: dict[str, list[int]] = {path: [i] for i, path in enumerate(stacks)}
        batches = _first(given.batches, self.rows)
        losses = _next_losses(model, stacks, given, batches) if self.sort else {}
        for level in range(1, self.levels):
            order = list(stacks)
            if self.sort:
                order.sort(key=lambda path: losses[path, level])
            else:
                shuffled = torch.randperm(len(order), generator=given.random).tolist()
                order = [order[i] for i in shuffled]
            for number, path in enumerate(order):
                places[path].append(level * len(stacks) + number)
        for path, layer in stacks.items():
            layer.set_places(places[path])


def _next_losses(
    model: nn.Module, stacks: Mapping[str, StackedSigns], given: Given, batches: Sequence[Any]
) -> dict[tuple[str, int], float]:
    """Gives the loss where all layers have so many blocks and one of them has one more.

    A loss that is not finite counts as that of the next level, and comes after all others.
    """
    levels = next(len(layer.places) for layer in stacks.values())
    found: dict[tuple[str, int], float] = {}
    with evaluating(model):
        for level in range(1, levels):
            for layer in stacks.values():
                layer.keep(level)
            for path, layer in stacks.items():
                layer.keep(level + 1)
                found[path, level] = _loss(model, given, batches)
                layer.keep(level)
    for layer in stacks.values():
        layer.keep(None)
    for level in range(levels - 1, 0, -1):
        known = [found[path, level] for path in stacks if math.isfinite(found[path, level])]
        for path in stacks:
            if not math.isfinite(found[path, level]):
                found[path, level] = max(known, default=0.0) + found.get((path, level + 1), 0.0)
    return found


def _first(batches: Sequence[Any], rows: int) -> list[Any]:
    """Gives batches with the first so many examples."""
    found: list[Any] = []
    for batch in batches:
        size = batch_size(batch)
        if size > rows > 0:
            found += split(batch, size)[:rows]
        elif rows > 0:
            found.append(batch)
        rows -= size
    return found


def _loss(model: nn.Module, given: Given, batches: Sequence[Any]) -> float:
    sizes = [batch_size(batch) for batch in batches]
    losses = [float(given.criterion(run_model(model, one), one)) for one in batches]
    if not all(map(math.isfinite, losses)):
        return math.nan
    return math.fsum(map(operator.mul, losses, sizes)) / sum(sizes)


class _Norms:
    """Averages over examples the norm of each input over an example's tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def see(self, rows: Tensor) -> None:
        self._sum = self._sum + rows.double().square().sum(1).sqrt()
        self._count += 1

    def result(self) -> Tensor:
        assert isinstance(self._sum, Tensor)
        return self._sum / self._count


def _path(name: str) -> str:
    return name.rpartition(".")[0]


# ------------------------------------------------------------------------------------- memory


class Stack:
    """The blocks of a network that `BitStack` gave, of which so many are in memory as fit.

    Args:
        model: The network.
        folder: Where all blocks are, if they are; without, blocks that were dropped are gone.

    Attributes:
        model: The network, in which blocks come and go.
        moved: Bytes of blocks that the last `fit` read.

    Raises:
        SettingError: The network has no such layers.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)), torch.ones(4, 32)
        >>> loss = lambda output, batch: output.square().mean()
        >>> model = BitStack(rank=2, levels=3).apply(model, calibration=[(x,)], loss=loss)
        >>> stack = Stack(model)
        >>> stack.nbytes, stack.least, stack.fit("1 kB"), stack.nbytes
        (1448, 568, 824, 824)
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str] | None = None) -> None:
        self.model = model
        self.folder = None if folder is None else Path(folder)
        self.moved = 0
        self._layers = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, StackedSigns)
        }
        if not self._layers:
            raise SettingError(
                f"a {type(model).__name__} without stacked layers has no blocks; apply BitStack"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the network takes now."""
        return weight_bytes(self.model)

    @property
    def least(self) -> int:
        """Bytes with one block of each layer."""
        return self._rest + sum(self._size(path) for path in self._layers)

    def fit(self, budget: str | int) -> int:
        """Drops blocks, or reads those that are missing, until the network just fits.

        The network may be in use meanwhile: a forward that runs sees some layers before and
        some after the change.

        Args:
            budget: Bytes, such as `"3 MB"`.

        Returns:
            The bytes that the network takes.

        Raises:
            BudgetError: One block of each layer is more than that; nothing has changed.
            SettingError: Blocks are missing and there is no folder to read them from.
            CheckpointError: The folder lacks them.
        """
        wanted = self._counts(quantity(budget, "B"))
        missing = {
            path: range(len(layer.blocks), wanted[path])
            for path, layer in self._layers.items()
            if wanted[path] > len(layer.blocks)
        }
        for path, layer in self._layers.items():
            for _ in range(len(layer.blocks) - wanted[path]):
                layer.blocks.pop(-1)
        self.moved = 0
        if missing:
            self._read(missing)
        self._note()
        return self.nbytes

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the network and, beside it, all blocks, one by one.

        Args:
            folder: The folder. Blocks have to be in memory, all of them.

        Raises:
            SettingError: Some are not.
        """
        tensors: dict[str, Tensor] = {}
        for path, layer in self._layers.items():
            if len(layer.blocks) < len(layer.places):
                raise SettingError(
                    f"'{path}' holds {len(layer.blocks)} of {len(layer.places)} blocks; save "
                    "the stack before blocks are dropped"
                )
            for number, block in enumerate(layer.blocks):
                for name, tensor in block.named_buffers():
                    tensors[f"{path}/{number}/{name}"] = tensor
        held = {path: list(layer.blocks) for path, layer in self._layers.items()}
        target = Path(folder)
        write_tensors(target / _BLOCKS, tensors, {"stack": json.dumps(sorted(held))})
        try:
            for layer in self._layers.values():
                layer.blocks = nn.ModuleList()
            self._note()
            save(self.model, target / "network")
        finally:
            for path, layer in self._layers.items():
                layer.blocks = nn.ModuleList(held[path])
            self._note()
        self.folder = target

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        budget: str | int,
        model: nn.Module | None = None,
    ) -> Stack:
        """Reads a network, and of its blocks those that fit.

        Args:
            folder: What `save` wrote.
            budget: Bytes, such as `"3 MB"`.
            model: The network before it was taken apart, where `supple.load` asks for it.

        Returns:
            The stack; `stack.model` is the network.
        """
        network = load(Path(folder) / "network", model=model)
        assert isinstance(network, nn.Module)
        stack = cls(network, folder)
        stack.fit(budget)
        return stack

    @property
    def _rest(self) -> int:
        held = (block for layer in self._layers.values() for block in layer.blocks)
        return self.nbytes - sum(b.nbytes for b in held if isinstance(b, SignBlock))

    def _size(self, path: str) -> int:
        with torch.device("meta"):
            return self._layers[path].empty_block().nbytes

    def _counts(self, budget: float) -> dict[str, int]:
        """Tells how many blocks of each layer fit."""
        if self.least > budget:
            raise BudgetError(
                f"a network with one block of each layer takes {show(self.least, 'B')}, more "
                f"than {show(budget, 'B')}; give at least that"
            )
        sizes = {path: self._size(path) for path in self._layers}
        order = sorted(
            (place, path)
            for path, layer in self._layers.items()
            for place in layer.places.tolist()
        )
        counts, total = dict.fromkeys(self._layers, 0), self._rest
        for _, path in order:
            if total + sizes[path] > budget:
                break
            total += sizes[path]
            counts[path] += 1
        return counts

    def _read(self, missing: Mapping[str, range]) -> None:
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            raise SettingError(
                "blocks are missing and there is no folder to read them from: save the stack "
                "first, or give folder="
            )
        try:
            with safe_open(self.folder / _BLOCKS, framework="pt") as file:
                for path, numbers in missing.items():
                    layer = self._layers[path]
                    for number in numbers:
                        block = layer.empty_block().to(layer.places.device)
                        for name, buffer in block.named_buffers():
                            buffer.copy_(file.get_tensor(f"{path}/{number}/{name}"))
                        self.moved += block.nbytes
                        layer.blocks.append(block.train(layer.training))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / _BLOCKS} lacks blocks of this network ({error}); give the "
                "folder that Stack.save wrote of it"
            ) from error

    def _note(self) -> None:
        """Lets the provenance tell how many blocks there are, so that files can."""
        provenance = vars(self.model).get("supple_provenance") or {"steps": []}
        for step in provenance["steps"]:
            for record in step.get("layers", ()):
                layer = self._layers.get(record["at"][0]) if record["at"] else None
                if layer is not None and record["class"] == "StackedSigns":
                    record["settings"]["blocks"] = len(layer.blocks)
