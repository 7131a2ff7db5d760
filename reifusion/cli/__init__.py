"""The command line: a file for each verb, `options.py` for what they share, `main.py` for the way in."""

from .main import main

__all__ = ["main"]
