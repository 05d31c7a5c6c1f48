"""The table and the page of a compression."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from supple.deploy.engines import Trial
from supple.files import read_json
from supple.report.engines import Engines
from supple.report.steps import StepsSummary, steps_html, steps_table, write_steps


def step(name: str, accuracy: float, params: int, zeros: float = 0.0) -> dict[str, Any]:
    return {
        "name": name, "what": f"what {name} does <&>", "seconds": 61.0, "zeros": zeros,
        "figures": {"accuracy": accuracy}, "latency": 0.002, "spread": 0.0,
        "costs": {"params": params, "macs": 10 * params}, "file_bytes": 4 * params,
    }  # fmt: skip


SUMMARY = StepsSummary(
    name="small & fast",
    metric="accuracy",
    tests=1000,
    steps=(step("start", 0.9, 1000), step("1-prune-global-mp", 0.85, 500, zeros=0.25)),
    files=("export/network.onnx",),
    engines=Engines(
        (
            Trial("onnxruntime", 0.0012, 3e-8),
            Trial("openvino-bf16", 0.001, 0.2, "differs by <0.2>"),
        ),
        (Trial("onnxruntime", 0.0048, 3e-8), Trial("openvino-bf16", refused="missing")),
    ),
    device="a machine",
    recipe="name: <small>",
)


def test_the_table_sets_every_step_against_the_start() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(steps_table(SUMMARY))
    text = captured.get()
    assert "small & fast: accuracy on 1,000 test examples" in text
    row = next(line for line in text.splitlines() if "global-mp" in line)
    assert row.split() == [
        "1", "global-mp", "85.0", "%", "500", "(50%)", "25.0%", "5", "k", "(50%)", "2", "kB",
        "2", "ms", "(100%)", "61", "s",
    ]  # fmt: skip


def test_the_page_escapes_what_it_is_given_and_links_the_files() -> None:
    page = steps_html(SUMMARY)
    assert "small &amp; fast" in page
    assert "does &lt;&amp;&gt;" in page
    assert "name: &lt;small&gt;" in page
    assert '<a href="export/network.onnx">' in page
    assert "in 1 step. " in page
    assert "<td>onnxruntime</td><td>4.8 ms</td><td>1.2 ms</td>" in page
    assert "differs by &lt;0.2&gt;" in page
    assert "<script" not in page
    assert 'src="http' not in page


def test_without_engines_the_page_says_nothing_of_them() -> None:
    assert "Engines" not in steps_html(dataclasses.replace(SUMMARY, engines=None))


def test_page_figures_and_picture_are_written(tmp_path) -> None:
    page, data, picture = write_steps(SUMMARY, tmp_path)
    assert page.read_text() == steps_html(SUMMARY)
    assert read_json(data)["steps"][1]["zeros"] == 0.25
    assert picture.read_bytes()[:4] == b"\x89PNG"
