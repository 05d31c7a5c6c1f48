import io

from rich.console import Console

from supple.report.table import networks_table
from tests.report.fake import fake_summary


def shown(width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(networks_table(fake_summary()))
    return console.file.getvalue()


def test_the_table_has_a_row_for_every_network_and_way():
    rows = [line.split() for line in shown().splitlines()]
    assert sum("supernet" in row[:2] for row in rows) == 4
    assert sum("alone," in row[:2] for row in rows) == 4
    assert sum("cut" in row[:1] for row in rows) == 4
    small = next(row for row in rows if row[:2] == ["small", "supernet"])
    assert small[2:4] == ["96.9", "%"]
    assert "4,000" in small
    assert "25.0" in small


def test_nothing_is_cut_off_at_a_hundred_columns():
    assert "…" not in shown()
    assert max(map(len, shown().splitlines())) <= 100
