"""Text files as blocks of tokens for language models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from supple.data.base import Splits, TensorSource, find, split
from supple.errors import CheckpointError, SettingError

__all__ = ["blocks", "load"]

BYTES = "bytes"


def load(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tokenizer: str | os.PathLike[str] = BYTES,
    length: int = 128,
    batch_size: int = 32,
    validation: float = 0.1,
    test: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> Splits:
    """Loads text as blocks of equally many tokens.

    A batch is a mapping of `input_ids` and `labels`, both of shape (N, length) and equal:
    models in `transformers` shift the labels themselves. Files are joined in the order of their
    names; the validation blocks lie behind the training blocks, the test blocks at the end.

    Args:
        path: A text file, a folder of `.txt` files, or several of these; also looked for inside
            the folder of SUPPLE_DATA.
        tokenizer: `"bytes"` (256 tokens), a `tokenizer.json`, or a folder in the format of
            `transformers`.
        length: Tokens per block, 2 or more.
        batch_size: Blocks per batch.
        validation: Fraction of blocks for validation, in (0, 1).
        test: Fraction of blocks for the test, in (0, 1).
        limit: Number of training blocks to use at most; they are the first ones.
        seed: What the order of training follows from.

    Raises:
        CheckpointError: A file is missing or can't be read.
        SettingError: There is too little text, or a setting can't be used.
    """
    if length < 2:
        raise SettingError(f"length must be at least 2 tokens, got {length}")
    if min(validation, test) <= 0 or validation + test >= 1:
        raise SettingError(
            "validation and test must be fractions above 0 that leave something to train on, "
            f"got {validation} and {test}"
        )
    encode, vocabulary = _tokenizer(tokenizer)
    files = _files(path)
    found = blocks(encode("\n".join(_read(file) for file in files)), length)
    last, middle = (max(1, round(share * len(found))) for share in (test, validation))
    training = len(found) - last - middle
    if training < 1:
        raise SettingError(
            f"{', '.join(map(str, files))}: {len(found)} blocks of {length} tokens are too few "
            "for three parts; give more text or a smaller length"
        )
    everything = torch.arange(len(found))
    positions = {
        "train": everything[:training][:limit],
        "validation": everything[training : training + middle],
        "test": everything[training + middle :],
    }
    source = TensorSource({"input_ids": found, "labels": found})
    return split(source, positions, batch_size=batch_size, seed=seed, vocabulary=vocabulary)


def blocks(tokens: Sequence[int], length: int) -> Tensor:
    """Cuts tokens into blocks, shape (n, length); what doesn't fill a block is left out.

    Example:
        >>> blocks([1, 2, 3, 4, 5], 2)
        tensor([[1, 2],
                [3, 4]])
    """
    number = len(tokens) // length
    return torch.tensor(tokens[: number * length], dtype=torch.int64).view(number, length)


def _tokenizer(name: str | os.PathLike[str]) -> tuple[Callable[[str], Sequence[int]], int]:
    if name == BYTES:
        return lambda text: list(text.encode()), 256
    from tokenizers import Tokenizer

    path = find(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}; a tokenizer's folder holds one")
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # the binding raises nothing narrower
        raise CheckpointError(f"{file} is no readable tokenizer ({error})") from error
    return lambda text: found.encode(text, add_special_tokens=False).ids, found.get_vocab_size()


def _files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    files: list[Path] = []
    for entry in given:
        root = find(entry)
        files += sorted(root.rglob("*.txt")) if root.is_dir() else [root]
    if not files:
        raise SettingError(f"there is no .txt file in {', '.join(map(str, given))}")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} can't be read as UTF-8 text ({error})") from error
