"""``python -m gresbox.cli`` is ``gresbox``."""

import sys

from gresbox.cli import main

if __name__ == "__main__":
    sys.exit(main())
