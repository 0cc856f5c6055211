"""`python -m fasttx`: the command `fasttx`, where that is not on the PATH."""

import sys

from fasttx.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
