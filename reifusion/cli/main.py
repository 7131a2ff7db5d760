"""The way in, and what holds for every verb: exit codes, errors, memory.

Exit codes: 0 done, 1 the work failed, 2 the input was wrong, 130 stopped by Ctrl-C. An error is one sentence
on stderr; REIFUSION_DEBUG=1 shows the traceback as well. Whatever can be wrong with the user's input is
found before the work starts. PyTorch is imported by the commands when they run, so that `--help` answers at
once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from .. import __version__
from ..errors import cut, sentence
from ..threads import wait_briefly
from .batch import batch
from .book import book
from .check import check
from .draw import generate
from .edges import edges
from .evaluate import evaluate
from .grid import grid
from .lora import app as lora
from .models import convert, info
from .samplers import samplers
from .serve import serve
from .studio import studio
from .train import train
from .vae import app as vae
from .why import why

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Stable Diffusion from scratch.")
app.command()(generate)
app.command()(batch)
app.command()(grid)
app.command()(info)
app.command()(convert)
app.command()(samplers)
app.command()(edges)
app.command()(why)
app.command()(evaluate)
app.add_typer(lora, name="lora")
app.add_typer(vae, name="vae")

# These two read their arguments themselves.
whole_line: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
app.command(**whole_line)(train)


@app.command(**whole_line)
def explain(context: typer.Context) -> None:
    """Shows how a picture comes about; `reifusion explain --help` says what there is."""
    from .explain import main as explain_main

    raise typer.Exit(explain_main(context.args))


app.command()(book)
app.command()(studio)
app.command()(serve)
app.command()(check)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"reifusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# The base class of typer's usage errors, which is click's: imported before typer 0.2x, and a copy since then.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    wait_briefly()
    _keep_blocks()
    _print_anything()
    gc.set_threshold(20_000, 50)  # what a start makes, stays: looking for garbage there takes 0.1 s
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("REIFUSION_DEBUG") == "1"
    with warnings.catch_warnings():
        if not debug:  # only our own warnings, and of those only the text
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module="reifusion")
            warnings.showwarning = lambda message, *_: print(f"reifusion: {_line(message)}", file=sys.stderr)
        try:
            code = app(arguments or ["--help"], prog_name="reifusion", standalone_mode=False) or 0
            return _fail("stopped", 130, False) if code == 130 else code
        except (KeyboardInterrupt, typer.Abort):
            return _fail("stopped", 130, False)
        except _UsageError as error:
            return _fail(cast(Any, error).format_message(), 2, debug)
        except ValueError as error:
            return _fail(str(error), 2, debug)
        except Exception as error:
            return _fail(sentence(error, "--size"), 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"reifusion: {_line(message)}", file=sys.stderr)
    return code


def _line(message: object) -> str:
    first, *_ = str(message).strip().splitlines() or ["failed"]
    return cut(first)


def _print_anything() -> None:
    """Lets stdout take letters that its encoding lacks, and names of files that are no UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        utf8 = sys.stdout.encoding.lower() == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")


def _keep_blocks() -> None:
    """Keeps large blocks of memory in the process, in huge pages; bench/NOTES.md says what that saves.

    glibc would give the blocks back at once, and the next layer would get them again page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it when it first allocates
    with contextlib.suppress(OSError, TypeError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
