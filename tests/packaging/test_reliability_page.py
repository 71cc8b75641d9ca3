"""The tests that docs/reliability.md names for its promises are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    files = re.findall(r"\btests/[\w/]+\.py", text)
    names = set(re.findall(r"\btest_\w+\b(?!\.py)", text))
    assert len(files) > 8
    assert len(names) > 8
    assert [path for path in files if not (ROOT / path).is_file()] == []
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in names if f"def {name}(" not in sources] == []
