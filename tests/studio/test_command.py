"""`reifusion studio`: wrong input gets one sentence, before a page opens."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reifusion import cli


def test_without_fastapi_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["studio"]) == 2
    said = 'reifusion: the studio needs FastAPI; install it with: pip install "reifusion[studio]"\n'
    assert capsys.readouterr() == ("", said)


def test_a_source_that_is_no_model_is_refused_before_the_page_opens(monkeypatch, capsys, tmp_path):
    pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["studio", "--no-browser", "--model", "nowhere.safetensors"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "nowhere.safetensors" in said.err and said.err.count("\n") == 1


def test_a_tiny_vae_that_does_not_fit_is_refused_before_the_page_opens(monkeypatch, capsys, model, tmp_path):
    pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["studio", "--no-browser", "--model", model, "--preview-vae", model]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "is no tiny VAE" in said.err and said.err.count("\n") == 1


def test_a_port_that_is_taken_is_one_sentence(monkeypatch, capsys, model, tmp_path):
    pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["studio", "--no-browser", "--model", model, "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err == f"reifusion: port {port} is taken, or no port is free: try another --port\n"
    )


ALONE = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("prometheus_client", "python_multipart", "multipart"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from pathlib import Path
from reifusion.studio.routes import Studio, build
print(len(build(Studio("mini", Path("pictures"))).routes))
"""


TERMINATED = """
import os, signal, threading, time
from reifusion.studio import serve
class Page:
    address, thread = "here", threading.Thread(target=time.sleep, args=(60,), daemon=True)
    def close(self):
        print("closed")
Page.thread.start()
serve.serve = lambda *_: Page()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
serve.run("mini", None, False, "pictures")
"""


def test_sigterm_ends_it_and_its_training_as_ctrl_c_does(tmp_path):
    pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.endswith("closed\n"), done.stderr


@pytest.mark.slow
def test_it_needs_nothing_of_the_server_s_extra(tmp_path):
    pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and int(done.stdout) > 10, done.stderr
