"""How fast packed layers are on a GPU, where Triton multiplies by their codes.

`python -m benchmarks.triton_linear` writes `benchmarks/results/triton_linear.json` (with
Triton installed: `make test-triton` does so). One matrix of 4096 x 4096, for 1 and 32 tokens in
bfloat16: dense; packed, put together first (`"plain"`); packed, by codes of 8, 4 and 2 bits
(`"triton"`); and PyTorch's own kernel for 4 bits. All ways take turns (see
`supple.cost.measure.interleaved`), each on copies of its layer that no cache holds together.

A call is timed as it is made, launch included, so each is recorded once as a CUDA graph of as
many calls as there are copies. Beside the time stands how many bytes of weight, scales and all,
are read in a second, next to what a copy within the GPU's memory reads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._cells import HERE
from supple.cost.measure import device_name, interleaved, quiet_threads, without_drift
from supple.files import write_json
from supple.formats import QuantSpec, quantize
from supple.layers.packed import Engine, PackedLinear
from supple.training.seeds import kept

RESULT = HERE / "results" / "triton_linear.json"
WIDTH, TOKENS, GROUP = 4096, (1, 32), 128
CACHE = 2**28  # bytes; no GPU has a cache of that size
ROUNDS, SECONDS = 7, 0.1

Run = Callable[[], object]
Way = tuple[str, Callable[[], Callable[[Tensor], Tensor]], int]


def main() -> None:
    """Times all ways and prints the table."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA or AMD GPU that PyTorch sees, and got none")
    device = torch.device("cuda", torch.cuda.current_device())
    refused: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with quiet_threads(1), kept(0), torch.inference_mode():
        copied = copy_speed(device)
        for tokens in TOKENS:
            x = torch.randn(tokens, WIDTH, device=device, dtype=torch.bfloat16)
            timed: dict[str, tuple[Run, int, int]] = {}
            for name, make, nbytes in ways(device):
                try:
                    timed[name] = (*recorded(make, nbytes, x), nbytes)
                except RuntimeError as error:
                    refused[f"{name}, {tokens}"] = str(error).splitlines()[0]
            runs = [run for run, _, _ in timed.values()]
            seconds = timings(runs, device)
            for (name, (_, calls, nbytes)), taken in zip(timed.items(), seconds, strict=True):
                speed = nbytes * calls / taken
                rows.append(
                    {
                        "way": name,
                        "tokens": tokens,
                        "milliseconds": round(1e3 * taken / calls, 5),
                        "weight bytes": nbytes,
                        "bytes per second": speed,
                        "share of a copy": round(speed / copied, 3),
                    }
                )
    write_json(
        RESULT,
        {
            "benchmark": "triton_linear",
            "command": "python -m benchmarks.triton_linear",
            "machine": device_name(device),
            "packages": [f"{name}=={version(name)}" for name in ("torch", "triton")],
            "bytes per second copied": copied,
            "refused": refused,
            "rows": rows,
        },
    )
    show(rows, refused, copied)


def timings(runs: list[Run], device: torch.device) -> list[float]:
    """Seconds of each, all in turn."""
    times = interleaved(
        len(runs), lambda index: runs[index], rounds=ROUNDS, device=device, seconds=SECONDS
    )
    found: list[float] = without_drift(times).tolist()
    return found


def copy_speed(device: torch.device) -> float:
    """Bytes that a copy within the GPU's memory reads and writes in a second."""
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (taken,) = timings([functools.partial(target.copy_, source)], device)
    return 2 * source.nbytes / taken


def recorded(
    make: Callable[[], Callable[[Tensor], Tensor]], nbytes: int, x: Tensor
) -> tuple[Run, int]:
    """A graph of one call to each of many copies, and how many calls that is."""
    copies = [make() for _ in range(-(-CACHE // nbytes))]
    for layer in copies:  # compiles, and makes ready what engines keep
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in copies:
            layer(x)
    # The graph holds addresses alone: what lies there must live as long.
    return functools.partial(_replay, graph, copies, x), len(copies)


def _replay(graph: torch.cuda.CUDAGraph, *_alive: object) -> None:
    graph.replay()


def ways(device: torch.device) -> Iterator[Way]:
    """Yields names, what makes a layer, and the bytes of its weight."""
    dense = functools.partial(
        nn.Linear, WIDTH, WIDTH, bias=False, device=device, dtype=torch.bfloat16
    )
    yield "dense", dense, 2 * WIDTH**2
    # By channel in 8 bits, as is usual, and by group in fewer.
    specs = {
        8: QuantSpec("int8", scale_format="bf16"),
        4: QuantSpec("int4", "group", GROUP, scale_format="bf16"),
        2: QuantSpec("int2", "group", GROUP, scale_format="bf16"),
    }
    engines: dict[str, Engine] = {"plain": "plain", "triton": "auto"}
    for label, engine in engines.items():
        for bits, spec in specs.items():
            make = functools.partial(_packed, device, spec, engine, label)
            yield f"{label}, {bits} bits", make, spec.nbytes((WIDTH, WIDTH))
    yield "PyTorch int4", functools.partial(_own, device), specs[4].nbytes((WIDTH, WIDTH))


def _packed(device: torch.device, spec: QuantSpec, engine: Engine, wanted: str) -> PackedLinear:
    with torch.inference_mode(False), torch.no_grad():
        linear = nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=torch.bfloat16)
        codes = quantize(linear.weight, spec)
        layer = PackedLinear.from_quantized(linear, codes, engine=engine)
    got = layer.engine_for(torch.ones(1, WIDTH, device=device, dtype=torch.bfloat16))
    if got != wanted:
        raise RuntimeError(f"the layer multiplies by {got!r}; is Triton installed?")
    return layer


def _own(device: torch.device) -> Callable[[Tensor], Tensor]:
    """PyTorch's kernel for 4 bits, with scales and offsets of groups."""
    pairs = torch.randint(256, (WIDTH, WIDTH // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = torch.rand(WIDTH // GROUP, WIDTH, 2, device=device, dtype=torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)
        return product

    return run


def show(rows: list[dict[str, Any]], refused: dict[str, str], copied: float) -> None:
    """Prints the table."""
    print(f"a copy within memory: {copied / 1e9:.0f} GB/s read and written")
    for row in rows:
        print(
            f"    {row['way']:16} {row['tokens']:3} tokens {row['milliseconds']:9.5f} ms "
            f"{row['bytes per second'] / 1e9:7.0f} GB/s ({row['share of a copy']:.0%})"
        )
    for way, why in refused.items():
        print(f"    {way}: {why}")


if __name__ == "__main__":
    main()
