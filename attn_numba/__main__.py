"""``python -m attn_numba`` is the command ``attn-numba``."""

import sys

from attn_numba.cli import main

if __name__ == "__main__":
    sys.exit(main())
