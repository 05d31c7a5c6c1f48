"""How each tool halves a network; run by `benchmarks.any_model` in an environment of its own.

A tool is a function `(model, args, kwargs, cut) -> model`: it prunes that part of the channels
of a model that it has never seen; several cuts are tried until about half of the parameters
are left. What a tool documents as the user's part for any model (which layers give the
outputs, how to read the output) is done for it, and models of `transformers` are put into the
plainest form (no cache, tuples, attention without fused kernels). What a tool would need by
architecture is not done, except where its name says so.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tests.zoo import ZOO

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Halve = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], float], nn.Module]

SECONDS = 20  # for one family, all cuts together
CUTS = (0.3, 0.5, 0.7, 0.9)
LEAST, MOST = 0.2, 0.75  # "about half": what part of the parameters may be left


def tensors(output: Any) -> list[Tensor]:
    plain = dict(output) if hasattr(output, "keys") else output
    found = [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, Tensor)]
    return [t for t in found if t.is_floating_point()]


def simplify(model: nn.Module) -> None:
    """Put a model of `transformers` into the form that tracers like best."""
    config = getattr(model, "config", None)
    for name, value in (("use_cache", False), ("return_dict", False)):
        if hasattr(config, name):
            setattr(config, name, value)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")


def simplest(family: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A family in that form, or as it is where it does not run so."""
    model, args, kwargs = ZOO[family]()
    simplify(model)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
        return model, args, kwargs
    except (AttributeError, TypeError, ValueError):
        return ZOO[family]()


def output_layers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Layers as wide as the last dimension (or the channels) of the output, by convention."""
    with torch.no_grad():
        shape = tensors(model(*args, **kwargs))[0].shape
    wide = {shape[-1], shape[1] if len(shape) > 1 else shape[-1]}
    named = ("head", "classifier", "score", "lm_head", "fc", "out", "decoder", "proj_out")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d | nn.ConvTranspose2d)
        and module.weight.shape[0] in wide
        and any(part in name.rpartition(".")[2] or name.startswith(part) for part in named)
    ]


# ------------------------------------------------------------------------------------ Supple


def supple(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cut: float
) -> nn.Module:
    """The size of 2,000 random ones that is nearest to half; it needs no cut."""
    import numpy as np

    import supple as library

    net = library.elastic(model, args, kwargs, axes=[library.Width(), library.Heads()])
    rows = net.space.random_many(2000, 0)
    rows = np.concatenate([rows, net.space.encode_many([net.space.smallest()])])
    params = net.costs(rows)["params"]
    half = 0.5 * sum(p.numel() for p in model.parameters())
    nearest = int(np.abs(params - half).argmin())
    return net.extract(net.space.decode(rows[nearest]))


# ----------------------------------------------------------------------------- Torch-Pruning


def torch_pruning(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cut: float
) -> nn.Module:
    return _torch_pruning(model, args, kwargs, cut, {})


def torch_pruning_by_hand(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cut: float
) -> nn.Module:
    """With the head counts of every projection, and the modules' integers mended after."""
    heads = dict(_projections(model))
    pruned = _torch_pruning(model, args, kwargs, cut, heads)
    for module in pruned.modules():
        _mend(module)
    return pruned


def _torch_pruning(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cut: float,
    heads: dict[nn.Module, int],
) -> nn.Module:
    import torch_pruning as tp

    examples = kwargs if kwargs and not args else args
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs=examples,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=cut,
        ignored_layers=output_layers(model, args, kwargs),
        num_heads=heads,
        prune_num_heads=False,
        prune_head_dims=True,
        output_transform=lambda output: tensors(output)[0].sum(),
    )
    pruner.step()
    return model


_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead")
_QUERIES = ("query", "q_proj", "q", "q_lin", "query_proj", "qkv", "c_attn", "in_proj")
_KEYS = ("key", "value", "k_proj", "v_proj", "k", "v", "k_lin", "v_lin")


def _projections(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    config = getattr(model, "config", None)
    for module in model.modules():
        own = [getattr(module, n) for n in _COUNTS if isinstance(getattr(module, n, None), int)]
        count = own[0] if own else getattr(config, "num_attention_heads", None)
        if not isinstance(count, int):
            continue
        grouped = getattr(config, "num_key_value_heads", None) or count
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name in _QUERIES:
                yield child, count
            elif isinstance(child, nn.Linear) and name in _KEYS:
                yield child, grouped


def _mend(module: nn.Module) -> None:
    """Set the widths that attention modules keep as integers to those of their layers."""
    children = dict(module.named_children())
    query = next((children[name] for name in _QUERIES if name in children), None)
    if not isinstance(query, nn.Linear):
        return
    width = query.weight.shape[0]
    count = next((getattr(module, n) for n in _COUNTS if hasattr(module, n)), None)
    for name in ("all_head_size", "embed_dim", "hidden_size", "dim", "inner_dim"):
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, width)
    if isinstance(count, int) and count:
        for name in ("attention_head_size", "head_dim", "key_value_proj_dim"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, width // count)


# --------------------------------------------------------------------------- only-train-once


def only_train_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cut: float
) -> nn.Module:
    """The newest release imports names that PyTorch has since moved: they are put back."""
    import torch.onnx
    from torch.onnx._internal.torchscript_exporter import _globals, symbolic_helper, utils

    sys.modules["torch.onnx._globals"] = _globals
    torch.onnx.symbolic_helper = symbolic_helper
    torch.onnx._optimize_graph = utils._optimize_graph
    from only_train_once import OTO

    examples: Any = tuple(kwargs.values()) if kwargs and not args else args
    oto = OTO(model=model, dummy_input=examples[0] if len(examples) == 1 else examples)
    ignored = {id(m) for m in output_layers(model, args, kwargs)}
    names = [n for n, m in model.named_modules() if id(m) in ignored]
    oto.mark_unprunable_by_param_names([f"{n}.weight" for n in names])
    oto.random_set_zero_groups(target_group_sparsity=cut)
    with tempfile.TemporaryDirectory() as folder:
        oto.construct_subnet(out_dir=folder)
        return torch.load(oto.compressed_model_path, weights_only=False)


# ----------------------------------------------------------------------------------- ModelOpt


def modelopt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cut: float
) -> nn.Module:
    import modelopt.torch.nas as mtn

    ratios = (1 - cut, 1.0)
    conv = {"channels_ratio": ratios, "kernel_size": (), "channel_divisor": 1}
    other = {"features_ratio": ratios, "feature_divisor": 1}
    dims, kinds = ("1d", "2d", "3d"), ("nn.BatchNorm", "nn.InstanceNorm")
    config = {
        f"{kind}{d}": {"*": conv} for kind in ("nn.Conv", "nn.ConvTranspose") for d in dims
    }
    config |= {f"{kind}{d}": {"*": other} for kind in kinds for d in dims}
    config |= {name: {"*": other} for name in ("nn.Linear", "nn.LayerNorm")}
    config["nn.GroupNorm"] = {"*": {"channels_ratio": ratios, "channel_divisor": 1}}
    searched = mtn.convert(model, mode=[("fastnas", config)])
    mtn.sample(searched, min)
    return mtn.export(searched)


TOOLS: dict[str, Halve] = {
    "supple": supple,
    "torch-pruning": torch_pruning,
    "torch-pruning with head counts": torch_pruning_by_hand,
    "only-train-once": only_train_once,
    "modelopt": modelopt,
}


# ------------------------------------------------------------------------------------ running


def attempt(tool: str, family: str) -> dict[str, Any]:
    """One family through one tool: whether it works, what is left, seconds, or the reason."""
    found: dict[str, Any] = {}
    for cut in CUTS if tool != "supple" else CUTS[:1]:
        found = _attempt(tool, family, cut)
        if found["works"] or found.get("left", 0.0) < LEAST:
            break
    return found


def _attempt(tool: str, family: str, cut: float) -> dict[str, Any]:
    model, args, kwargs = ZOO[family]() if tool == "supple" else simplest(family)
    whole = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        before = [t.shape for t in tensors(model(*args, **kwargs))[:1]]
    start = time.perf_counter()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            small = TOOLS[tool](model, args, kwargs, cut)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            outputs = tensors(small(*args, **kwargs))[:1]
    except BaseException as error:
        text = " ".join(str(error).split())[:200]
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "works": False,
            "why": f"{type(error).__name__}: {text} ({place.name})",
            "left": 0,
        }
    left = sum(p.numel() for p in small.parameters()) / whole
    found = {"left": round(left, 3), "seconds": round(seconds, 3)}
    if [t.shape for t in outputs] != before:
        return {"works": False, "why": "the output has another shape", **found}
    if not LEAST <= left <= MOST:
        return {"works": False, "why": f"{left:.0%} of the parameters are left", **found}
    return {"works": True, **found}


def isolated(tool: str, family: str) -> dict[str, Any]:
    """The attempt in a process of its own, stopped after a while."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.write(writing, json.dumps(attempt(tool, family)).encode())
        os._exit(0)
    os.close(writing)
    ready = select.select([reading], [], [], SECONDS)[0]
    text = os.read(reading, 1 << 16) if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    if text:
        result: dict[str, Any] = json.loads(text)
        return result
    return {"works": False, "why": f"no end after {SECONDS} s" if not ready else "it crashed"}


def main(tool: str, families: list[str]) -> None:
    """Prints one line of JSON for each family."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family in families:
        print(json.dumps({"family": family, **isolated(tool, family)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
