"""``python -m s2edit_pipeline``: the command line, as ``s2edit``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
