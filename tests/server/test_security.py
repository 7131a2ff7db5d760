"""Strangers, browsers, long bodies, odd names and odd bytes: refused, each in its dialect's shape."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from reifusion import cli
from reifusion.server.app import Config, build
from reifusion.server.catalog import Catalog
from reifusion.server.errors import Refusal
from reifusion.server.limits import Limits

from .conftest import Running, serving, settings

TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def strict(models, loras):
    """A server with a token and a small limit for the body."""
    config = Config(settings(models), models, loras, port=0, token=TOKEN, limits=Limits(body=10_000), grace=1)
    with serving(config) as one:
        yield one


@pytest.mark.parametrize("path", ["/v1/models", "/sdapi/v1/options", "/metrics", "/docs", "/jobs/1", "/none"])
def test_a_token_is_needed_everywhere_but_for_health(strict: Running, path):
    with strict.client() as client:
        for wrong in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic !!"},
            {"Authorization": "x"},
        ):
            answer = client.get(path, headers=wrong)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic")
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        right = client.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
        assert right.status_code == (404 if path in ("/jobs/1", "/none") else 200)
        assert client.get(path, auth=("anyone", TOKEN)).status_code == right.status_code


def test_the_shapes_of_a_refusal(strict: Running):
    with strict.client() as client:
        assert client.get("/controlnet/version").json()["detail"] == "the token is missing or wrong"
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert client.get("/sdapi/v1/options").json()["detail"] == "the token is missing or wrong"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/sdapi/v1/img2img", "/none"])
def test_a_body_that_is_too_long_is_not_read(strict: Running, path, chunked):
    body = b'{"prompt": "' + 20_000 * b"a" + b'"}'
    kind = "multipart/form-data; boundary=x" if path.endswith("edits") else "application/json"
    content = iter([body[:12_000], body[12_000:]]) if chunked else body
    headers = {"Content-Type": kind, "Authorization": f"Bearer {TOKEN}"}
    with strict.client() as client:
        answer = client.post(path, content=content, headers=headers)
    if path == "/none" and chunked:  # whose body nobody reads
        assert answer.status_code == 404
    else:
        assert answer.status_code == 413
        shape = "detail" if path.startswith("/sdapi") else "error"
        assert "10,000 bytes" in str(answer.json()[shape])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7861", "127.0.0.1.evil.example", "", "[::1", "a@b"]
)
def test_a_name_that_was_made_to_point_here_is_refused(running: Running, host):
    with running.client() as client:
        answer = client.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 403 or (host == "" and answer.status_code == 400)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:7861", "LOCALHOST"])
def test_this_machine_goes_by_these_names(running: Running, host):
    with running.client() as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://["]
)
def test_a_page_of_another_origin_may_not_ask(running: Running, origin):
    with running.client() as client:
        for method, path in (
            ("POST", "/sdapi/v1/interrupt"),
            ("GET", "/v1/models"),
            ("OPTIONS", "/v1/models"),
        ):
            answer = client.request(method, path, headers={"Origin": origin})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        own = {"Origin": running.address}
        assert client.get("/v1/models", headers=own).status_code == 200


def test_json_has_to_say_that_it_is_json(running: Running):
    """A page's form can send text/plain anywhere, without the browser asking first."""
    with running.client() as client:
        answer = client.post(
            "/sdapi/v1/txt2img", content=b'{"prompt": "cat"}', headers={"Content-Type": "text/plain"}
        )
        assert answer.status_code == 422


def test_nothing_is_sniffed(running: Running):
    with running.client() as client:
        assert client.get("/none").headers["X-Content-Type-Options"] == "nosniff"


def test_names_are_looked_up_and_never_lead_out_of_the_folder(tmp_path):
    outside, inside = tmp_path / "outside.safetensors", tmp_path / "models"
    inside.mkdir()
    for path in (outside, inside / "own.safetensors", inside / ".hidden.safetensors", inside / "own.txt"):
        path.write_bytes(b"")
    os.symlink(outside, inside / "link.safetensors")
    os.symlink(inside / "own.safetensors", inside / "again.safetensors")
    os.symlink(tmp_path / "nothing", inside / "broken.safetensors")
    (inside / "folder").mkdir()
    (inside / "folder" / "model_index.json").write_text("{}")
    catalog = Catalog("mini", inside, inside)
    assert set(catalog.models()) == {"mini", "own", "again", "folder"}
    assert set(catalog.loras()) == {"own", "again"}
    for name in ("own", "own.safetensors", "own [0123456789]"):
        assert Path(catalog.model_of(name)) == inside / "own.safetensors"
    for name in ("../outside", "link", str(outside), ".hidden", "own/", "./own", "own\0", "OWN", ""):
        with pytest.raises(Refusal):
            catalog.model_of(name)
        with pytest.raises(Refusal):
            catalog.lora_of(name)


def test_a_server_for_others_needs_a_token(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("REIFUSION_TOKEN", raising=False)
    assert cli.main(["serve", "--host", "0.0.0.0"]) == 2
    assert "needs a token" in capsys.readouterr().err
    (tmp_path / "token").write_text("short\n")
    assert cli.main(["serve", "--host", "0.0.0.0", "--token-file", str(tmp_path / "token")]) == 2
    assert "at least 16" in capsys.readouterr().err
    assert cli.main(["serve", "--token-file", str(tmp_path / "none")]) == 2
    assert cli.main(["serve", "--models", str(tmp_path / "none")]) == 2
    assert cli.main(["serve", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_a_port_that_is_taken_is_one_sentence(capsys, models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", str(models / "tiny.safetensors"), "--port", str(port)]) == 2
    said = f"reifusion: cannot listen on 127.0.0.1:{port}: Address already in use; try another --port\n"
    assert capsys.readouterr().err == said


def test_a_host_that_is_not_here_is_one_sentence(capsys, models, monkeypatch):
    monkeypatch.setenv("REIFUSION_TOKEN", "x" * 32)
    assert cli.main(["serve", "--model", str(models / "tiny.safetensors"), "--host", "192.0.2.1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("reifusion: cannot listen on 192.0.2.1:") and said.endswith("try another --host\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["prompt", "n", "size", "seed", "steps", "cfg_scale", "sampler", "lora", "stream", "partial_images",
          "width", "height", "sampler_name", "scheduler", "init_images", "mask", "alwayson_scripts",
          "override_settings", "batch_size", "hr_scale", "enable_hr", "eta", "s_churn", "model"]  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(running: Running):
    with running.client() as client:
        yield client


@hypothesis_settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    path=st.sampled_from(
        ["/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
         "/sdapi/v1/options", "/sdapi/v1/png-info"]
    ),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3) | JSON | st.binary(),
)  # fmt: skip
def test_odd_bodies_are_answered_in_the_shape_and_never_with_500(fuzzed: httpx.Client, path, body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = fuzzed.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500
    if answer.status_code >= 400:
        said = answer.json()
        assert ("detail" in said) if path.startswith("/sdapi") else said["error"]["message"]


FORMS = {
    "without a boundary": ("multipart/form-data", b"x"),
    "with no end": (None, b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc'),
    "of no parts": (None, b"--x--\r\n"),
    "of a long field": (None, b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + 2**21 * b"a"),
    "of many fields": (
        None,
        60 * b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n' + b"--x--\r\n",
    ),
    "of another file": (
        None,
        b'--x\r\nContent-Disposition: form-data; name="../a"; filename="../../a"\r\n\r\nabc\r\n--x--\r\n',
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_broken_is_refused(running: Running, form):
    kind, body = FORMS[form]
    with running.client() as client:
        headers = {"Content-Type": kind or "multipart/form-data; boundary=x"}
        answer = client.post("/v1/images/edits", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_the_openapi_page_has_every_route(running: Running):
    with running.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/readyz"} <= set(paths)
        form = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert {"image", "mask", "prompt", "strength", "seed"} <= set(form["properties"])
        assert client.get("/docs").status_code == 200
    assert build(Config()).openapi()["info"]["title"] == "reifusion"
