from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.errors import CheckpointError, SettingError
from supple.files import (
    checksum,
    read_json,
    read_tensors,
    replacing,
    replacing_folder,
    write_json,
    write_tensors,
    write_text,
)

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_json_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, obj: object
) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    write_json(path, {"content": obj})
    assert read_json(path) == {"content": obj}


def test_json_with_number_keys_and_tuples_comes_back_as_json_knows_them(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": {1: (2, 3), 10: 4, 2: 5}})
    assert read_json(tmp_path / "a.json") == {"a": {"1": [2, 3], "10": 4, "2": 5}}


def _flipped(path: Path, read: Callable[[Path], object]) -> Iterator[object]:
    """Yields what reading gives, the error included, with each byte flipped in turn."""
    content = path.read_bytes()
    for index in range(len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 1
        path.write_bytes(flipped)
        try:
            yield read(path)
        except CheckpointError as error:
            yield error


def test_a_flipped_byte_of_a_json_file_is_reported_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    obj = {"step": 12, "names": ["a", "b"]}
    write_json(path, obj)
    outcomes = list(_flipped(path, read_json))
    errors = [one for one in outcomes if isinstance(one, CheckpointError)]
    assert len(errors) > len(outcomes) / 2
    assert all("state.json" in str(error) for error in errors)
    # What is left is white space.
    assert all(one == obj for one in outcomes if not isinstance(one, CheckpointError))


def test_a_flipped_byte_of_a_tensor_file_is_reported_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bool)}
    write_tensors(path, tensors, {"kind": "test"})
    unseen = 0
    for outcome in _flipped(path, read_tensors):
        if isinstance(outcome, tuple):  # the checksum's own name
            unseen += 1
            assert all(torch.equal(outcome[0][name], tensors[name]) for name in tensors)
            assert outcome[1]["kind"] == "test"
        else:
            assert "weights.safetensors" in str(outcome)
    assert unseen == len("sha256")


def test_tensors_of_all_kinds_come_back_bitwise(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "whole": base,
        "view": base[3:7],
        "transposed": base.view(3, 4).t(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "again": base,
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    back, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {}
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_file_without_our_checksum_is_read_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    assert torch.equal(read_tensors(tmp_path / "other.safetensors")[0]["a"], torch.ones(2))
    (tmp_path / "other.json").write_text('{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "other.json", checked=False) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"other\.json doesn't match its checksum"):
        read_json(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["no.json", "no.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    read = read_json if name.endswith("json") else read_tensors
    with pytest.raises(CheckpointError, match=f"there is no file .*{name}"):
        read(tmp_path / name)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1}, schema=2)
    with pytest.raises(CheckpointError, match="another version"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json", schema=2) == {"a": 1}


@pytest.mark.parametrize("obj", [{"a": object()}, [1], {"schema": 1}, {"sha256": ""}])
def test_what_json_cannot_hold_is_refused_and_leaves_no_file(
    tmp_path: Path, obj: object
) -> None:
    with pytest.raises(SettingError):
        write_json(tmp_path / "a.json", obj)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as temporary:
            assert temporary.suffix == ".onnx"
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_half()
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text(encoding="utf-8") == "old"


def test_an_error_while_filling_a_folder_leaves_the_old_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "net"
    write_text(folder / "ours", "old")

    def fill_half() -> None:
        with replacing_folder(folder, ["ours"]) as new:
            write_text(new / "ours", "new")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"can't write .*net: No space left"):
        fill_half()
    assert [one.name for one in tmp_path.iterdir()] == ["net"]
    assert (folder / "ours").read_text(encoding="utf-8") == "old"


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"can't write .*file/a\.json: .*choose a folder"):
        write_json(tmp_path / "file" / "a.json", {})


def test_missing_folders_are_made_and_files_are_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    umask = os.umask(0)
    os.umask(umask)
    for write in (write_text, write_json, write_tensors):
        write(path, {} if write is not write_text else "text\n")
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        path.unlink()


def test_a_killed_writer_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"number": -1, "list": []})
    code = (
        "import sys; from supple.files import write_json\n"
        "for i in range(10**6): write_json(sys.argv[1], {'number': i, 'list': [i] * 2000})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        while read_json(path)["number"] < 3:
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    left = read_json(path)
    assert left["list"] == [left["number"]] * 2000


def test_the_checksum_is_sha256_of_the_canonical_form() -> None:
    assert checksum(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert checksum({"b": [1], "a": None}) == checksum(b'{"a":null,"b":[1]}')
    assert json.loads(json.dumps(checksum([]))) == checksum(b"[]")
