"""`python -m reifusion` is `reifusion`."""

import sys

from .cli import main

sys.exit(main())
