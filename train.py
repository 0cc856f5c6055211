"""Train a text classifier:  python train.py --attn-backend sdpa  (all flags: --help)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fasttx.commands.ending import exit_status, quiet_start

if __name__ == "__main__":
    quiet_start("train.py")  # the other imports take seconds

from fasttx.commands.train import options
from fasttx.train import open_run, train_as_asked

__all__ = ["main", "open_run"]


def main(argv: Sequence[str] | None = None) -> int:
    accepts: set[str] = set()

    def command() -> None:
        asked = options(argv)
        accepts.update(asked.accepts)
        train_as_asked(asked)

    return exit_status("train.py", command, accepts)


if __name__ == "__main__":
    sys.exit(main())
