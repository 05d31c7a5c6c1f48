import json
import re
from html.parser import HTMLParser

import pytest

from supple.errors import CheckpointError
from supple.report.page import page_html, write_report
from supple.report.summary import summary_from_json, summary_to_json
from tests.report.fake import fake_summary


class Outline(HTMLParser):
    """Collects tags, addresses and the text of table cells; checks that tags are closed."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.cells, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def text():
    return page_html(fake_summary())


def test_the_page_is_whole_and_asks_nothing_of_a_network(text):
    outline = Outline(text)
    assert outline.open == []
    assert not {"script", "link", "iframe", "img"} & set(outline.tags)
    assert all(not re.match("[a-z]+:|//", address) for address in outline.addresses)
    assert "url(" not in text.replace("url(#", "")
    assert len(text) < 2_000_000


def test_the_page_shows_every_network_with_every_way_and_its_figures(text):
    cells = Outline(text).cells
    for name in ("full", "large", "medium", "small"):
        assert sum(cell.startswith(name) for cell in cells) >= 1
    assert sum(cell.startswith("one supernet") for cell in cells) == 4
    assert sum(cell.startswith("trained alone") for cell in cells) == 4
    assert "96.9 %" in cells
    assert "6 k" in cells


def test_text_of_the_user_is_escaped(text):
    assert "<demo>" not in text
    assert "digits &lt;demo&gt;" in text
    assert "&lt;digits-cnn&gt;" in text


def test_the_page_tells_the_device_the_space_and_the_provenance(text):
    for words in ("1 thread of an x86 processor", "262,144", "2.13.0", "head", "whose number"):
        assert words in text


def test_report_writes_the_page_the_figures_and_pictures(tmp_path):
    summary = fake_summary()
    page, *others = write_report(summary, tmp_path)
    assert page.read_text().startswith("<!DOCTYPE html>")
    pictures = [path for path in others if path.suffix == ".png"]
    assert {path.stem for path in pictures} == {
        "front-params", "front-macs", "losses", "sizes", "validation"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_summary_survives_json():
    summary = fake_summary()
    assert summary_from_json(json.loads(json.dumps(summary_to_json(summary)))) == summary


def test_the_same_run_gives_the_same_page(text):
    assert page_html(fake_summary()) == text


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        write_report(fake_summary(), tmp_path / "file" / "run")
