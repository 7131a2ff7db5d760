"""Where this package is the program, threads wait briefly for one another, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import reifusion
from reifusion.threads import SPINS

# Runs a module, or the command's entry point, until it imports PyTorch; prints what PyTorch would find.
RUN = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
what, *sys.argv[1:] = sys.argv[1:]
if what == "entry point":
    from importlib.metadata import entry_points
    (command,) = entry_points(group="console_scripts", name="reifusion")
    command.load()()
else:
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""
PROGRAMS = [
    ["entry point", "generate", "a cat"],
    ["reifusion", "generate", "a cat"],
    ["reifusion", "explain", "words", "a cat"],
    ["reifusion", "info", "mini"],
    ["reifusion", "train", "vae", "--dry-run"],
    ["reifusion", "studio", "--no-browser"],
    ["reifusion.train", "vae", "--dry-run"],
]


def found(program: list[str], **said: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | said
    env["PYTHONPATH"] = str(Path(reifusion.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", RUN, *program], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_threads_wait_briefly_in_every_program(program):
    assert found(program) == f"{SPINS} None"


@pytest.mark.parametrize(
    ("said", "left"),
    [({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_what_the_user_says_is_left_as_it_is(said, left):
    for program in PROGRAMS[1], PROGRAMS[-1]:
        assert found(program, **said) == left


def test_a_library_changes_nobodys_environment():
    code = "import os, reifusion.cli, reifusion.api; print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    env["PYTHONPATH"] = str(Path(reifusion.__file__).parents[1])
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True) == "None\n"
