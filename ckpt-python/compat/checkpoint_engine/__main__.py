"""`python -m checkpoint_engine --uds PATH`: one rank's parameter server behind the HTTP API. It is `ckpt serve`."""

from __future__ import annotations

import sys

from ckpt_engine._native import run_command


def run_from_cli() -> None:
    """Serves until SIGTERM; options of `ckpt serve` are taken too."""
    sys.exit(run_command(["ckpt", "serve", *sys.argv[1:]]))


if __name__ == "__main__":
    run_from_cli()
