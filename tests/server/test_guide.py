"""What the guide, the Dockerfile and the compose file say is true."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from reifusion.cli.main import app

from .conftest import Running

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/server.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def test_its_python_runs_from_top_to_bottom(running: Running, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    pytest.importorskip("webuiapi")
    pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)
    port = running.address.rpartition(":")[2]
    for block in blocks("python"):
        exec(block.replace("7861", port), {})
    assert (tmp_path / "apple.png").exists() and (tmp_path / "apple-2.png").exists()
    assert (tmp_path / "steered.png").exists() and (tmp_path / "edges.png").exists()
    said = capsys.readouterr().out
    assert "image_generation.partial_image\nimage_generation.completed\n" in said and "a green apple" in said


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_its_lines_for_the_shell_run(running: Running):
    first, second = blocks("bash")
    port = running.address.rpartition(":")[2]
    done = [
        subprocess.run(
            line.replace("7861", port), shell=True, capture_output=True, text=True, timeout=60
        ).stdout
        for line in (first, second)
    ]
    assert '"b64_json"' in done[0] and "there is no job" in done[1]


def options() -> set[str]:
    import typer.main

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {flag for one in command.params for flag in one.opts}


@pytest.mark.parametrize("file", ["docs/guides/server.md", "Dockerfile", "compose.yaml"])
def test_every_option_is_one(file):
    lines = (ROOT / file).read_text("utf-8")
    found = re.findall(r"reifusion serve (--.*)|`(--[a-z-]+)`|ENTRYPOINT (.*)|command: (.*)", lines)
    flags = {flag for line in found for text in line for flag in re.findall(r"--[a-z-]+", text)}
    assert flags and flags - {"--help"} <= options()


def test_the_dockerfile_copies_what_there_is():
    text = (ROOT / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
    assert "USER reifusion" in text and '".[server]"' in text


def test_the_compose_file_needs_a_token_and_is_for_this_machine_only():
    said = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert all(port.startswith("127.0.0.1:") for one in said["services"].values() for port in one["ports"])
    assert said["secrets"]["token"]["file"] == "./token.txt"
    command = said["services"]["reifusion"]["command"]
    assert command[command.index("--token-file") + 1] == "/run/secrets/token"
    prometheus = yaml.safe_load(said["configs"]["prometheus"]["content"])
    (scrape,) = prometheus["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["reifusion:7861"]}]


def test_the_metrics_of_the_guide_are_those_of_the_server(running: Running):
    with running.client() as client:
        client.post("/v1/images/generations", json={"prompt": "cat", "steps": 1})
        text = client.get("/metrics").text
    for name in re.findall(r"`(reifusion_\w+)", GUIDE):
        assert f"# TYPE {name.removesuffix('_total')}" in text
