"""The examples of the documentation, which tests run."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str, word: str) -> str:
    """The only Python example of docs/`page` that has that word."""
    (found,) = (
        code for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL) if word in code
    )
    return found
