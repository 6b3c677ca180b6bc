"""`python -m ckpt_engine`: the command line `ckpt`."""

from __future__ import annotations

import sys

from ._native import run_command


def main() -> None:
    """Runs one command and exits with its code."""
    sys.exit(run_command(["ckpt", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
