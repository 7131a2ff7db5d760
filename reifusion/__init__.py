"""Stable Diffusion from scratch, to be read. `load()` and `generate()` are all you need to draw."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import generate, load

__all__ = ["__version__", "generate", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the two when first asked for: PyTorch takes seconds, and `--help` does not need it."""
    if name in ("generate", "load"):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
