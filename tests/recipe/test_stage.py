import threading

import pytest

from supple.errors import CheckpointError, RecipeError
from supple.recipe.stage import Outcome, RunFolder, written_once


class Work:
    """Counts how often it is done; writes one file."""

    def __init__(self):
        self.times = 0

    def __call__(self, folder):
        self.times += 1
        path = folder / "out.txt"
        path.write_text(f"time {self.times}")
        return Outcome({"time": self.times}, (path,))


def test_a_finished_stage_is_taken_from_its_record(tmp_path):
    work = Work()
    first = RunFolder(tmp_path).perform("train", {"lr": 0.1}, work)
    again = RunFolder(tmp_path).perform("train", {"lr": 0.1}, work)
    assert (work.times, first.reused, again.reused) == (1, False, True)
    assert again.result == {"time": 1}
    assert again.digest == first.digest


def test_what_other_code_made_is_kept_and_said_to_be_so(tmp_path, monkeypatch):
    import supple.recipe.stage as stage

    work = Work()
    first = RunFolder(tmp_path).perform("train", {}, work)
    again = RunFolder(tmp_path).perform("train", {}, work)
    assert not first.outdated
    assert not again.outdated
    monkeypatch.setattr(stage, "code_print", lambda: "9.9.9 abc")
    later = RunFolder(tmp_path).perform("train", {}, work)
    assert later.outdated
    assert work.times == 1


def test_changed_inputs_empty_the_folder_and_change_the_digest(tmp_path):
    work = Work()
    first = RunFolder(tmp_path).perform("train", {"lr": 0.1}, work)
    (first.folder / "stray").write_text("of the old inputs")
    second = RunFolder(tmp_path).perform("train", {"lr": 0.2}, work)
    assert work.times == 2
    assert second.digest != first.digest
    assert not (second.folder / "stray").exists()


def test_a_killed_stage_goes_on_in_its_folder(tmp_path):
    def killed(folder):
        (folder / "checkpoint").write_text("half way")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).perform("train", {"lr": 0.1}, killed)

    def goes_on(folder):
        return Outcome({"found": (folder / "checkpoint").read_text()})

    record = RunFolder(tmp_path).perform("train", {"lr": 0.1}, goes_on)
    assert record.result == {"found": "half way"}


def test_a_larger_extent_goes_on_and_a_smaller_one_is_not_taken_for_it(tmp_path):
    def count(folder):
        path = folder / "study"
        path.write_text((path.read_text() if path.exists() else "") + "x")
        return Outcome({"study": path.read_text()})

    run = RunFolder(tmp_path)
    for evaluations, expected in ((10, "x"), (20, "xx"), (20, "xx")):
        record = run.perform("search", {"a": 1}, count, extent={"evaluations": evaluations})
        assert record.result == {"study": expected}


def test_a_file_with_one_flipped_byte_is_refused_by_name(tmp_path):
    work = Work()
    record = RunFolder(tmp_path).perform("train", {}, work)
    path = record.folder / "out.txt"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"out\.txt is not what its stage wrote"):
        RunFolder(tmp_path).perform("train", {}, work)
    assert work.times == 1


def test_a_deleted_file_is_computed_again(tmp_path):
    work = Work()
    record = RunFolder(tmp_path).perform("train", {}, work)
    (record.folder / "out.txt").unlink()
    assert RunFolder(tmp_path).perform("train", {}, work).result == {"time": 2}


def test_a_record_edited_by_hand_is_refused(tmp_path):
    record = RunFolder(tmp_path).perform("train", {}, Work())
    done = record.folder / "done.json"
    done.write_text(done.read_text().replace('"time": 1', '"time": 9'))
    with pytest.raises(CheckpointError, match=r"done\.json"):
        RunFolder(tmp_path).finished("train", {})


def test_two_processes_do_not_run_in_one_folder(tmp_path):
    with (
        RunFolder(tmp_path).claimed(),
        pytest.raises(RecipeError, match="another process is running in"),
        RunFolder(tmp_path).claimed(),
    ):
        pass
    with RunFolder(tmp_path).claimed():
        pass


def prepares(run, work, inputs):
    """What a search does before it shares its folder."""
    return lambda: run.perform("train", inputs, work)


def silent():
    pass


def test_searches_share_a_folder_and_only_the_first_one_prepares(tmp_path):
    work = Work()
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with (
        first.shared(prepares(first, work, {"lr": 0.1}), silent),
        second.shared(prepares(second, work, {"lr": 0.1}), silent) as found,
    ):
        assert found.reused
        assert (first.guest, second.guest) == (False, True)
        with pytest.raises(RecipeError, match="another process is running"):
            RunFolder(tmp_path).claimed().__enter__()
    assert work.times == 1
    with RunFolder(tmp_path).claimed():
        pass


def test_a_search_by_other_settings_does_not_empty_the_folder_of_one_that_goes_on(tmp_path):
    work = Work()
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with (
        first.shared(prepares(first, work, {"lr": 0.1}), silent) as record,
        pytest.raises(RecipeError, match=r"other settings for 'train'"),
        second.shared(prepares(second, work, {"lr": 0.2}), silent),
    ):
        pass
    assert (record.folder / "out.txt").read_text() == "time 1"
    third = RunFolder(tmp_path)
    with third.shared(prepares(third, work, {"lr": 0.2}), silent):
        assert work.times == 2


def test_no_search_joins_a_whole_run(tmp_path):
    run = RunFolder(tmp_path)
    with (
        RunFolder(tmp_path).claimed(),
        pytest.raises(RecipeError, match="another process is running"),
        run.shared(prepares(run, Work(), {}), silent),
    ):
        pass


def test_a_search_waits_while_another_one_trains(tmp_path):
    training, go_on, told = threading.Event(), threading.Event(), []

    def train(folder):
        training.set()
        assert go_on.wait(10)
        return Outcome({"by": "first"})

    def first():
        run = RunFolder(tmp_path)
        with run.shared(prepares(run, train, {}), silent):
            pass

    def waiting():
        told.append("waiting")
        go_on.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert training.wait(10)
    run = RunFolder(tmp_path)
    with run.shared(prepares(run, Work(), {}), waiting) as record:
        assert record.result == {"by": "first"}
    thread.join()
    assert told == ["waiting"]


def test_a_file_of_an_interrupted_stage_is_written_once(tmp_path):
    times = []

    def write(path):
        times.append(path)
        path.write_text(f"{len(times)}")

    path = tmp_path / "network.onnx"
    for inputs, expected in (({"a": 1}, "1"), ({"a": 1}, "1"), ({"a": 2}, "2")):
        assert written_once(path, inputs, write).read_text() == expected
    path.write_text("damaged")
    assert written_once(path, {"a": 2}, write).read_text() == "3"


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    import os

    from supple import files

    stage = tmp_path / "train"
    process = os.fork()
    if process == 0:
        with files.replacing(stage / "weights.safetensors") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(process, 0)
    (stage / "..keep").write_text("somebody's")
    assert len(list(stage.iterdir())) == 2
    with RunFolder(tmp_path).claimed():
        assert [path.name for path in stage.iterdir()] == ["..keep"]


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(CheckpointError, match=r"can't write to the run's folder .*file"),
        RunFolder(tmp_path / "file" / "run").claimed(),
    ):
        pass
