"""How fast networks of few bits run here, by engine, beside what peers make of them.

`python -m benchmarks.quantize_speed` writes `benchmarks/results/quantize_speed.json`, on one
thread:

- *linear layers*, 4096 x 4096, for 1 and 32 tokens: PyTorch in float32 and bfloat16 and its own
  kernels for 8 and 4 bits, ONNX Runtime in float32 and with its own dynamic 8 bits, and layers
  that `supple.quantize` packed, on every engine of `supple.deploy.engines`; with the share of
  what `memcpy` moves in a second that reading the weights comes to;
- *networks*: a ResNet-18 at 96 x 96 and a 6-layer encoder for 128 tokens, one example and 32:
  in float32 and bfloat16, with `quantize/int8-whitepaper` (whole numbers of 8 bits), with 8 and
  4 bits for weights and 8 for what linear layers are given, and quantized by NNCF and by ONNX
  Runtime.

All ways of a row run in turn (see `supple.cost.measure.interleaved`). Weights are random: only
speed is looked at here. Peers are installed into `benchmarks/.envs/llm`; what refuses is
noted with its reason. An argument chooses rows, by the beginning of their names.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

import supple
from benchmarks._cells import HERE, environment
from supple.cost.measure import device_name, interleaved, quiet_threads, without_drift
from supple.deploy import runners
from supple.deploy.engines import ENGINES, FORMS
from supple.errors import SuppleError, import_extra
from supple.files import read_json, write_json, write_tensors
from supple.layers.packed import PackedLinear
from supple.quantize.base import Weights, baseline
from supple.quantize.int8_whitepaper import Int8Whitepaper
from supple.training.seeds import kept

PICTURE = HERE.parent / "docs" / "images" / "quantize-speed.png"
RESULT = HERE / "results" / "quantize_speed.json"
PEERS = {"nncf": ["nncf==3.4.0"]}
ROUNDS, SECONDS = 5, 0.1
WIDTH, BATCHES, CALIBRATION = 4096, (1, 32), 8

Run = Callable[[], object]
Refused = dict[str, str]


def main(arguments: list[str]) -> None:
    """Runs the rows and prints the tables.

    Args:
        arguments: The beginnings of names of rows; empty for all.
    """
    python, failed = environment("llm", PEERS)
    known = read_json(RESULT) if RESULT.exists() and arguments else {}
    rows = {row["name"]: row for row in known.get("rows", [])}
    with quiet_threads(1), kept(0), tempfile.TemporaryDirectory() as folder:
        speed = copy_speed()
        for name, make in ROWS.items():
            if arguments and not any(name.startswith(one) for one in arguments):
                continue
            place = Path(folder) / name.replace(" ", "")
            place.mkdir()
            refused: Refused = {}
            with torch.inference_mode():
                runs = dict(make(place, python, refused))
                times = milliseconds(runs)
            rows[name] = {
                "name": name,
                "milliseconds": times,
                "bits": {way: weight_bits(way) for way in times},
                "refused": refused,
            }
            show(rows[name])
            write_json(
                RESULT,
                {
                    "benchmark": "quantize_speed",
                    "command": "python -m benchmarks.quantize_speed",
                    "machine": device_name(threads=1),
                    "packages": [one for packages in PEERS.values() for one in packages],
                    "not installed": failed,
                    "bytes per second copied": speed,
                    "width": WIDTH,
                    "rows": [rows[one] for one in ROWS if one in rows],
                },
            )
    picture([rows[one] for one in ROWS if one in rows]).savefig(PICTURE, dpi=120)


def weight_bits(way: str) -> int:
    """Bits of a weight, as the name of a way tells.

    Example:
        >>> [weight_bits(way) for way in ("W4A8, openvino", "PyTorch bf16", "NNCF, openvino")]
        [4, 16, 8]
    """
    if found := re.search(r"\bW(\d)|int(\d)", way):
        return int(found[1] or found[2])
    if re.search("NNCF|dynamic|static", way):
        return 8
    return 16 if "bf16" in way else 32


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the time of all ways by bits, one plot a row, with a line along the fastest."""
    figure = Figure(figsize=(9.6, 3.2 * -(-len(rows) // 3)), layout="constrained")
    plots = figure.subplots(-(-len(rows) // 3), 3, squeeze=False).flatten()
    for axes, row in zip(plots, rows, strict=False):
        by_bits: dict[int, list[float]] = {}
        for way, time in row["milliseconds"].items():
            by_bits.setdefault(row["bits"][way], []).append(time)
        for bits, times in by_bits.items():
            axes.plot([bits] * len(times), times, "o", color="#8a93a3", ms=4)
        fastest = sorted((bits, min(times)) for bits, times in by_bits.items())
        axes.plot(*zip(*fastest, strict=True), "o-", color="#2f5fd0")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        for of_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            of_ticks(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:g}"[0] in "1235" else ""))
        axes.set_title(row["name"], fontsize=10)
        axes.set_xlabel("bits of a weight")
        axes.set_ylabel("milliseconds")
        axes.grid(alpha=0.3, which="both")
    for axes in plots[len(rows) :]:
        axes.set_visible(False)
    return figure


def milliseconds(runs: Mapping[str, Run]) -> dict[str, float]:
    """Times all in turn."""
    ways = list(runs.values())
    times = interleaved(len(ways), lambda index: ways[index], rounds=ROUNDS, seconds=SECONDS)
    return dict(zip(runs, (1e3 * without_drift(times)).round(4).tolist(), strict=True))


def copy_speed() -> float:
    """Bytes that `memcpy` reads in a second, of an array that no cache holds."""
    source = np.ones(2**28, dtype=np.uint8)
    target = np.empty_like(source)
    times = interleaved(1, lambda _: lambda: np.copyto(target, source), rounds=5, seconds=0.3)
    return float(source.nbytes / without_drift(times)[0])


# ---------------------------------------------------------------------------- linear layers


def linear(
    tokens: int, folder: Path, python: Path, refused: Refused
) -> Iterator[tuple[str, Run]]:
    """Yields the ways to multiply by one matrix."""
    layer, x = nn.Linear(WIDTH, WIDTH, bias=False).eval(), torch.randn(tokens, WIDTH)
    half, x16 = nn.Linear(WIDTH, WIDTH, bias=False).bfloat16(), x.bfloat16()
    yield "PyTorch", functools.partial(layer, x)
    yield "PyTorch bf16", functools.partial(half, x16)
    yield from kernels(layer, x16)
    model = nn.Sequential(layer)
    yield from on_engines(
        "fp32", model, (x,), folder, refused, ("onnxruntime", "openvino-bf16")
    )
    yield from by_peer("onnxruntime_dynamic", model, (x,), folder, python, refused)
    for name, quantizer in LINEAR.items():
        made = quantizer.apply(model)
        yield f"{name}, in PyTorch", functools.partial(made, x)
        packed = made[0]  # type: ignore[index]
        if isinstance(packed, PackedLinear) and packed.engine_for(x16) != "plain":
            yield f"{name}, in PyTorch bf16", functools.partial(packed, x16)
        engines = ("onnxruntime", "openvino-bf16")
        yield from on_engines(name, made, (x,), folder, refused, engines)


LINEAR: dict[str, Weights] = {
    "W8A8": baseline("rtn", bits=8, activations=8),
    "W4A8": baseline("rtn", bits=4, group_size=128, activations=8),
    "W8": baseline("rtn", bits=8),
    "W4": baseline("rtn", bits=4, group_size=128),
    "W2": baseline("rtn", bits=2, group_size=128),
}


def kernels(layer: nn.Linear, x: Tensor) -> Iterator[tuple[str, Run]]:
    """Yields PyTorch's own kernels for codes."""
    rows, columns = layer.weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(columns // 128, rows, 2).bfloat16()
    yield (
        "PyTorch int4",
        functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, 128, scales),
    )
    whole = torch.randint(-127, 127, (rows, columns), dtype=torch.int8)
    yield (
        "PyTorch int8",
        functools.partial(
            torch.ops.aten._weight_int8pack_mm, x, whole, torch.rand(rows).bfloat16()
        ),
    )
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), dtype=torch.qint8)
    yield "PyTorch dynamic int8", functools.partial(dynamic, x.float())


# -------------------------------------------------------------------------------- networks


def network(
    make: Callable[[], tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]],
    batch: int,
    folder: Path,
    python: Path,
    refused: Refused,
) -> Iterator[tuple[str, Run]]:
    """Yields the ways to run a network."""
    model, inputs = make()
    args = inputs(batch)
    yield from on_engines("fp32", model, args, folder, refused, tuple(ENGINES))
    calibration = [inputs(CALIBRATION)]
    ways: dict[str, supple.Transform] = {
        "int8-whitepaper": Int8Whitepaper(),
        "W8A8 by token": baseline("rtn", bits=8, activations=8),
        "W4A8 by token": baseline("rtn", bits=4, group_size=64, activations=8),
    }
    for name, quantizer in ways.items():
        made = quantizer.apply(model, calibration=calibration)
        engines = ("pytorch", "onnxruntime", "openvino", "openvino-bf16")
        yield from on_engines(name, made, args, folder, refused, engines)
    for peer in ("nncf", "onnxruntime_static", "onnxruntime_dynamic"):
        yield from by_peer(peer, model, args, folder, python, refused, calibration[0])


def resnet18() -> tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]:
    """A ResNet-18 and images of 96 x 96."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=1000,
    )
    model = ResNetForImageClassification(config).eval()
    return model, lambda batch: (torch.randn(batch, 3, 96, 96),)


def encoder() -> tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]:
    """A BERT of 6 layers and 384 channels, as all-MiniLM-L6 is, and 128 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    return model, lambda batch: (torch.randint(1000, 30000, (batch, 128)),)


# --------------------------------------------------------------------------------- engines


def on_engines(
    name: str,
    model: nn.Module,
    args: tuple[Tensor, ...],
    folder: Path,
    refused: Refused,
    engines: Sequence[str],
) -> Iterator[tuple[str, Run]]:
    """Yields a network on engines."""
    for engine in engines:
        form = ENGINES[engine].form
        place = folder / f"{name}-{form}".replace(" ", "")
        try:
            if not place.exists():
                place.mkdir()
                FORMS[form](model, place, args, {})
            run = ENGINES[engine].start(place, 1)
            run(*args)
        except (SuppleError, RuntimeError) as error:
            refused[f"{name}, {engine}"] = str(error).splitlines()[0]
            if place.exists() and not any(place.iterdir()):
                place.rmdir()  # another engine of this form says the same
            continue
        yield f"{name}, {engine}", functools.partial(run, *args)


def by_peer(
    peer: str,
    model: nn.Module,
    args: tuple[Tensor, ...],
    folder: Path,
    python: Path,
    refused: Refused,
    calibration: tuple[Tensor, ...] | None = None,
) -> Iterator[tuple[str, Run]]:
    """Yields a network that a peer quantized, on the engine that it is for."""
    plain = folder / "plain.onnx"
    supple.export(model, plain, args, dynamic_batch=len(args[0]) > 1)
    runtime = import_extra("onnxruntime", "onnx")
    names = [entry.name for entry in runtime.InferenceSession(str(plain)).get_inputs()]
    examples = dict(zip(names, calibration or args, strict=True))
    if len(args[0]) > 1:
        examples = {name: rows[: len(args[0])] for name, rows in examples.items()}
    write_tensors(folder / "calibration.safetensors", examples)
    command = [str(python), "-W", "ignore", "-m", "benchmarks._quantize_peers", peer]
    done = subprocess.run(
        [*command, str(plain), str(folder)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        refused[peer] = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return
    if peer == "nncf":
        for precision in ("f32", "bf16"):
            hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
            run = runners.openvino(folder / "nncf.xml", hints)
            label = "NNCF, openvino" + "-bf16" * (precision == "bf16")
            yield label, functools.partial(run, *args)
        return
    run = runners.onnx_runtime(folder / f"{peer}.onnx", 1)
    yield f"{peer.replace('_', ' ')}", functools.partial(run, *args)


ROWS: dict[str, Callable[[Path, Path, Refused], Iterator[tuple[str, Run]]]] = {
    **{f"linear, batch {n}": functools.partial(linear, n) for n in BATCHES},
    **{f"resnet18, batch {n}": functools.partial(network, resnet18, n) for n in BATCHES},
    **{f"encoder, batch {n}": functools.partial(network, encoder, n) for n in BATCHES},
}


def show(row: Mapping[str, Any]) -> None:
    """Prints a row, the fastest first."""
    print(row["name"], flush=True)
    for way, time in sorted(row["milliseconds"].items(), key=lambda one: one[1]):
        print(f"    {way:36} {time:9.4f} ms", flush=True)
    for way, why in row["refused"].items():
        print(f"    {way}: {why}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
