"""Searches by random inputs are the same in every run, so that a run tells of the code alone.

REIFUSION_MANY=10 searches for longer, and anew each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
if "REIFUSION_MANY" not in os.environ:
    settings.load_profile("fixed")
