"""What may happen to a file: bytes change, values are edited, code is slipped in.

Every mutation draws from a `random.Random`, so a failing one is known by its seed.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from supple import files

#: Values that an editor, a script or somebody with bad intentions may leave in a file.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, 1e-320,
    float("inf"), float("nan"), "", "x", "0", "null", "<= 1 k", "../../etc/passwd", "/dev/zero",
    "canary:touch", "canary", "os:system", "\u0000", "\ud7ff" * 3, "a" * 5000, [], [[]], {},
    {"": None}, [1, "a", None], {"tensor": "0"}, {"tuple": []}, {"map": [[1]]}, [[[[[[1]]]]]],
)  # fmt: skip

#: YAML that would run code or grow without end, were it read by a careless reader.
YAML = (
    "!!python/object/apply:canary.touch []",
    "!!python/name:canary.touch",
    "!!python/module:canary",
    "!!python/object/new:canary.Thing {}",
    "!<tag:yaml.org,2002:python/object/apply:canary.touch> []",
    "&a [*a]",
    "*nothing",
    "{<<: *nothing}",
    "2020-02-30",
    "!!binary '!'",
    "!!timestamp 'no'",
    "!!set {1, 2}",
    "!!float 'x'",
    "!!int 0x",
    "12:30:45",
    ".inf",
    "? [1, 2]\n  : 3",
    "|",
    "%TAG",
    "'",
    "[",
    "}",
    "- 1",
    "\t",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(inner for key, one in items for inner in places(one, (*path, key)))]


def edited(value: Any, random: Random) -> Any:
    """The value with one thing in it replaced, removed, added, renamed or doubled."""
    value = json.loads(json.dumps(value))
    path = random.choice(places(value)[1:] or [()])
    if not path:
        return random.choice(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], random.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice(["x", "", "__class__", str(key) + "s"])] = holder.pop(key)
    elif how == 2 and isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), random.choice(VALUES))
    elif how == 3 and isinstance(holder, list):
        holder.extend(holder * random.choice([1, 50]))
    elif how == 4 and isinstance(holder[key], int | float):
        holder[key] = random.choice([-holder[key], holder[key] + 1, holder[key] * 1000])
    else:
        holder[key] = random.choice(VALUES)
    return value


def scrambled(content: bytes, random: Random) -> bytes:
    """The bytes with some of them flipped, cut off, taken out, doubled or put in."""
    if not content:
        return bytes([random.randrange(256)])
    at, length = random.randrange(len(content)), random.choice([1, 1, 1, 8, 100])
    how = random.randrange(6)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[at + length :]
    if how == 2:
        return content[:at] + random.randbytes(length) + content[at:]
    if how == 3:
        return content[: at + length] + content[at:]
    if how == 4:
        return random.randbytes(random.choice([0, 1, 8, 64]))
    return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]


def lines(text: str, random: Random) -> str:
    """YAML text with a line replaced, removed, doubled, moved or indented otherwise."""
    rows = text.splitlines()
    at, how = random.randrange(len(rows)), random.randrange(7)
    key, colon, _ = rows[at].partition(":")
    if how == 0:
        del rows[at]
    elif how == 1:
        rows.insert(random.randrange(len(rows)), rows[at])
    elif how == 2:
        rows[at] = "  " * random.randrange(4) + rows[at].lstrip()
    elif how == 3 and colon:
        rows[at] = f"{key}: {random.choice(YAML)}"
    elif how == 4:
        rows[at] = rows[at].replace(random.choice(":,[]{} -\"'") or " ", "", 1)
    elif how == 5 and colon:
        rows[at] = f"{key}s: 1"
    elif colon:
        value = random.choice(VALUES)
        rows[at] = f"{key}: {json.dumps(value)}"
    return "\n".join(rows) + "\n"


# --- files that stay sealed -------------------------------------------------------------------


def rewrite_json(path: Path, random: Random) -> None:
    """Edit a JSON file and seal it again, as somebody who knows how it is sealed would."""
    whole = json.loads(path.read_text())
    content = {k: v for k, v in whole.items() if k not in ("schema", "sha256")}
    changed = edited(content, random)
    if isinstance(changed, dict):
        files.write_json(path, changed, schema=whole["schema"])
    else:
        path.write_text(json.dumps(changed))


def rewrite_tensors(path: Path, random: Random) -> None:
    """Take a tensor out of a file, rename, reshape, retype or repeat one; seal it again."""
    with safe_open(path, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    if not tensors:
        return
    name, how = random.choice(sorted(tensors)), random.randrange(5)
    tensor = tensors.pop(name)
    if how == 1:
        tensors[name + "x"] = tensor
    elif how == 2:
        tensors[name] = tensor.reshape(-1)[: random.randrange(tensor.numel() + 1)].clone()
    elif how == 3:
        tensors[name] = tensor.bool() if random.random() < 0.5 else tensor.double()
    elif how == 4:
        tensors[name] = tensor * float("nan") if tensor.is_floating_point() else tensor - 1
    if random.random() < 0.5:
        files.write_tensors(path, tensors, {})
    else:
        save_file(tensors, path, metadata)


def edit_database(path: Path, random: Random) -> None:
    """Change one field, or drop a row or a table, of an SQLite file."""
    with sqlite3.connect(path) as connection:
        query = "SELECT name FROM sqlite_master WHERE type='table'"
        tables = sorted(row[0] for row in connection.execute(query))
        table = random.choice(tables)
        how = random.randrange(8)
        if how == 0:
            connection.execute(f'DROP TABLE "{table}"')
        elif how == 1:
            connection.execute(f'DELETE FROM "{table}"')
        else:
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            value = random.choice(VALUES)
            plain = value if type(value) in (int, float, str, type(None)) else json.dumps(value)
            if isinstance(plain, int) and abs(plain) >= 2**63:
                plain = float(plain)
            change = f'UPDATE OR IGNORE "{table}" SET "{random.choice(columns)}" = ?'
            with contextlib.suppress(sqlite3.IntegrityError):  # the file itself refuses it
                connection.execute(change, (plain,))
    connection.close()


def mutate_folder(folder: Path, random: Random) -> None:
    """One mutation of one file of a folder of JSON and tensor files."""
    path = random.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    how: list[Callable[[Path, Random], None]] = [_scramble]
    if path.suffix == ".json":
        how += [rewrite_json] * 4
    if path.suffix == ".safetensors":
        how += [rewrite_tensors] * 2
    random.choice(how)(path, random)
    _reseal(folder)


def _scramble(path: Path, random: Random) -> None:
    path.write_bytes(scrambled(path.read_bytes(), random))


def _reseal(folder: Path) -> None:
    """Correct the checksums of tensor files in a description, where it can still be read."""
    from supple.storage import DESCRIPTION, _sha256

    path = folder / DESCRIPTION
    try:
        whole = json.loads(path.read_text())
        sums = {name: _sha256(folder / name) for name in whole["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    content = {k: v for k, v in whole.items() if k not in ("schema", "sha256")}
    files.write_json(path, {**content, "files": sums}, schema=whole["schema"])
