"""What README.md says was shown by a test was shown by a test that exists."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    path: re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
}


def unknown(cell: str) -> list[str]:
    """The tests and files named in a cell of a table that are not there.

    A name may be cut with …; one that begins so is in the file named before it. A file without
    folders is any of that name.
    """
    missing, files = [], []
    for word in re.findall(r"`([^`]+)`", cell):
        file, _, name = word.rpartition("::")
        if not file and not word.startswith("…"):
            file, name = word, ""
        if file.endswith(".sh"):
            found = (ROOT / file).is_file()
        else:
            if file:
                files = [p for p in TESTS if str(p).endswith(f"/{file}")]
            pattern = name.replace("…", "*")
            found = any(not name or fnmatchcase(t, pattern) for f in files for t in TESTS[f])
        if not found:
            missing.append(word)
    return missing


def rows() -> list[str]:
    return [line for line in (ROOT / "README.md").read_text().splitlines() if "test" in line]


def test_every_test_that_the_readme_names_exists() -> None:
    cells = [row.rstrip(" |").rpartition("|")[2] for row in rows() if row.startswith("| ")]
    named = [c for c in cells if "test" in c and "`" in c]
    assert len(named) > 20
    assert [word for cell in named for word in unknown(cell)] == []


def test_a_name_that_does_not_exist_is_found() -> None:
    assert unknown("`test_readme.py::test_every_test_…`, `…does_not_exist_is_found`") == []
    wrong = ["test_readme.py::test_no", "test_nothing.py", "tests/no.sh", "…such_test"]
    for word in wrong:
        assert unknown(f"`test_readme.py`, `{word}`") == [word]
