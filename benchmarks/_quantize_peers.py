"""Networks as peers quantize them, in the peers' environment.

`python -m benchmarks._quantize_peers PEER NETWORK.onnx FOLDER` reads inputs for ranges from
`FOLDER/calibration.safetensors` and writes `FOLDER/PEER.onnx` (ONNX Runtime's own quantizers)
or `FOLDER/PEER.xml` (NNCF).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def batches(folder: Path) -> list[dict[str, Any]]:
    """The inputs to calibrate on, one example each."""
    held = load_file(folder / "calibration.safetensors")
    count = len(next(iter(held.values())))
    return [{name: rows[i : i + 1] for name, rows in held.items()} for i in range(count)]


def nncf(network: Path, folder: Path) -> None:
    """Quantizes by NNCF: whole numbers of 8 bits for weights and activations."""
    import nncf as peer
    import openvino

    model = openvino.Core().read_model(network)  # `convert_model` parts paths at commas
    small = peer.quantize(
        model, peer.Dataset(batches(folder)), subset_size=len(batches(folder))
    )
    openvino.save_model(small, folder / "nncf.xml", compress_to_fp16=False)


def onnxruntime_static(network: Path, folder: Path) -> None:
    """Quantizes by ONNX Runtime: fixed ranges, scales by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter(batches(folder))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    quantize_static(
        network,
        folder / "onnxruntime_static.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
    )


def onnxruntime_dynamic(network: Path, folder: Path) -> None:
    """Quantizes by ONNX Runtime: ranges of activations found as they come."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(network, folder / "onnxruntime_dynamic.onnx", per_channel=True)


PEERS = {
    "nncf": nncf,
    "onnxruntime_static": onnxruntime_static,
    "onnxruntime_dynamic": onnxruntime_dynamic,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
