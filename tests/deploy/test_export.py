"""Exported files compute what the network computes, or the export says what is in the way."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supple.deploy import export as room
from supple.deploy.export import export
from supple.errors import CheckpointError, ExportError, SettingError, UnsupportedModelError
from supple.models.base import build
from tests.zoo import ZOO

onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def run_pt2(path, *inputs: Tensor) -> list[Tensor]:
    return [torch.export.load(path).module()(*inputs)]


def run_openvino(path, *inputs: Tensor) -> list[Tensor]:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [
        torch.from_numpy(np.array(x)) for x in compiled([x.numpy() for x in inputs]).values()
    ]


RUN = {".onnx": run_onnx, ".pt2": run_pt2, ".xml": run_openvino}


def net() -> nn.Module:
    return build("digits-cnn", widths=(8, 12), blocks=(1, 1)).eval()


@torch.library.custom_op("supple_export_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Rejected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return twice(self.layer(x))


@pytest.mark.parametrize("suffix", RUN)
def test_the_file_computes_the_same(tmp_path, suffix):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    module, x = net(), torch.randn(2, 1, 8, 8)
    path = export(module, tmp_path / f"net{suffix}", (x,))
    assert path == tmp_path / f"net{suffix}"
    other = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            RUN[suffix](path, other)[0], module(other), rtol=1e-4, atol=1e-4
        )
    companions = {".xml": ["net.bin"]}.get(suffix, [])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, *companions])


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_batch_may_vary_where_asked_for(tmp_path, suffix):
    module, x = net(), torch.randn(2, 1, 8, 8)
    path = export(module, tmp_path / f"net{suffix}", (x,), dynamic_batch=True)
    other = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            RUN[suffix](path, other)[0], module(other), rtol=1e-4, atol=1e-4
        )


def test_a_fixed_batch_stays_fixed(tmp_path):
    path = export(net(), tmp_path / "net.onnx", (torch.randn(2, 1, 8, 8),))
    with pytest.raises(Exception, match="dimension"):
        run_onnx(path, torch.randn(3, 1, 8, 8))


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
def test_inputs_by_name_and_outputs_with_a_cache_work(tmp_path, suffix):
    model, args, kwargs = ZOO["llama"]()
    path = export(model, tmp_path / f"llama{suffix}", args, kwargs, dynamic_batch=True)
    ids = torch.randint(5, 97, (3, 11))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    if suffix == ".onnx":
        found = run_onnx(path, ids)[0]
    else:
        found = torch.export.load(path).module()(input_ids=ids)["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_batch_norm_is_exported_with_running_statistics(tmp_path):
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).train()
    x = torch.randn(2, 5)
    path = export(module, tmp_path / "net.onnx", (x,))
    assert module.training
    assert module[1].num_batches_tracked == 0
    torch.testing.assert_close(run_onnx(path, x)[0], module.eval()(x).detach())


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_rejected_operator_is_named_and_nothing_is_written(tmp_path, suffix):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=r"rejects operator 'supple_export_test\.twice"):
        export(Rejected(), tmp_path / f"net{suffix}", (torch.zeros(2, 5),))
    assert not list(tmp_path.iterdir())


def test_a_forward_that_depends_on_values_is_refused(tmp_path):
    class Choosy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"\.onnx rejects this Choosy: .*data-dependent"):
        export(Choosy(), tmp_path / "net.onnx", (torch.ones(2, 5),))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, suffix):
    (tmp_path / f"net{suffix}").write_text("old")
    write = room.FORMATS[suffix]

    def wrong(program, file, codes):
        run = write(program, file, codes)
        return lambda *args, **kwargs: [out * 1.001 for out in run(*args, **kwargs)]

    monkeypatch.setitem(room.FORMATS, suffix, wrong)
    with pytest.raises(ExportError, match=r"output 0 differs by 0\.001"):
        export(nn.Linear(5, 7), tmp_path / f"net{suffix}", (torch.randn(2, 5),))
    assert (tmp_path / f"net{suffix}").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_wider_tolerance_lets_a_difference_pass(tmp_path, monkeypatch):
    write = room.FORMATS[".pt2"]

    def wrong(program, file, codes):
        run = write(program, file, codes)
        return lambda *args, **kwargs: [out * 1.001 for out in run(*args, **kwargs)]

    monkeypatch.setitem(room.FORMATS, ".pt2", wrong)
    path = tmp_path / "net.pt2"
    assert export(nn.Linear(5, 7), path, (torch.randn(2, 5),), tolerance=0.01).is_file()


def test_onnx_files_hold_weights_and_little_else(tmp_path):
    path = export(
        build("vit", dim=96, num_layers=1), tmp_path / "net.onnx", (torch.randn(2, 3, 32, 32),)
    )
    weights = 4 * sum(p.numel() for p in build("vit", dim=96, num_layers=1).parameters())
    assert weights < path.stat().st_size < 1.1 * weights
    assert str(tmp_path).encode() not in path.read_bytes()
    assert b"vit.py" not in path.read_bytes()


def test_exporters_are_quiet(tmp_path, capfd):
    export(nn.Linear(5, 7), tmp_path / "net.onnx", (torch.randn(2, 5),))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("net.onx", {}, SettingError, "did you mean '.onnx'"),
        ("net", {}, SettingError, "ending must be one of .onnx, .pt2, .xml"),
        ("net.onnx", {"tolerance": 0}, SettingError, "tolerance must be above 0"),
        ("file/net.onnx", {}, CheckpointError, "can't write"),
    ],
)
def test_bad_targets_are_refused(tmp_path, name, settings, error, message):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(error, match=message):
        export(nn.Linear(5, 7), tmp_path / name, (torch.randn(2, 5),), **settings)


def test_a_batch_of_one_can_not_vary(tmp_path):
    with pytest.raises(SettingError, match="at least two examples"):
        export(nn.Linear(5, 7), tmp_path / "net.pt2", (torch.randn(1, 5),), dynamic_batch=True)


def test_a_forward_that_fails_says_why(tmp_path):
    with pytest.raises(UnsupportedModelError, match="Linear fails"):
        export(nn.Linear(5, 7), tmp_path / "net.pt2", (torch.randn(2, 3),))
