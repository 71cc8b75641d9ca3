"""`python -m vpd_fast`: the report of what is installed; with arguments, the command line `vpd-fast`."""

from __future__ import annotations

import sys


def main() -> None:
    """Prints the report, or hands over to the command line if there are arguments."""
    if len(sys.argv) > 1:
        from vpd_fast.cli.main import main as run

        run()
    else:
        from vpd_fast.info import collect, render

        print(render(collect()))


if __name__ == "__main__":
    main()
