"""The queue: its order and its end, what clients hear when it is full, and many clients at once."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from reifusion.model.request import Request
from reifusion.server.app import Config
from reifusion.server.queue import Job
from reifusion.settings import Settings

from .conftest import Running, serving, settings, until

ROOT = Path(__file__).parents[2]
LONG = {"prompt": "cat", "size": "128x128", "steps": 150, "n": 10}
SHORT = {"prompt": "cat", "steps": 1, "cfg_scale": 1}


@pytest.fixture
def small(models, loras) -> Iterator[Running]:
    """A server in which two requests may wait."""
    with serving(Config(settings(models), models, loras, port=0, queue=2, grace=1)) as one:
        yield one


def ask(running: Running, body: dict, answers: list[httpx.Response], **more) -> threading.Thread:
    def send() -> None:
        with running.client() as client:
            answers.append(client.post("/v1/images/generations", json=body, **more))

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def number(running: Running, name: str) -> float:
    with running.client() as client:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_full_queue_says_when_to_come_again_and_a_client_that_left_makes_room(small: Running):
    answers: list[httpx.Response] = []
    queue = small.queue
    threads = [ask(small, LONG, answers, headers={"X-Request-ID": "first-job"})]
    until(lambda: queue.current is not None and queue.current.step)
    leaving = _sent(small, SHORT)
    until(lambda: number(small, "reifusion_queue_depth") == 1)
    threads.append(ask(small, SHORT, answers))
    until(lambda: number(small, "reifusion_queue_depth") == 2)
    with small.client() as client:
        answer = client.post("/v1/images/generations", json=SHORT)
        assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 120
        assert answer.json()["error"]["code"] == "queue_full"
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
        leaving.close()
        until(lambda: number(small, "reifusion_queue_depth") == 1)
        assert client.get("/readyz").status_code == 200
        assert client.delete("/jobs/first-job").status_code == 202
    for thread in threads:
        thread.join()
    assert sorted(one.status_code for one in answers) == [200, 410]
    assert number(small, 'reifusion_jobs_total{state="cancelled"}') == 2


def _sent(running: Running, body: dict) -> socket.socket:
    """A connection on which a request has been sent."""
    host, _, port = running.address.removeprefix("http://").partition(":")
    text = json.dumps(body)
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(text)}"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{text}".encode())
    return connection


def test_openais_client_comes_again_by_itself(small: Running):
    openai = pytest.importorskip("openai")
    answers: list[httpx.Response] = []
    threads = [ask(small, LONG, answers, headers={"X-Request-ID": "first-job"})]
    until(lambda: small.queue.current is not None)
    threads += [ask(small, SHORT, answers) for _ in range(2)]
    until(lambda: number(small, "reifusion_queue_depth") == 2)
    route = 'reifusion_requests_total{code="%s",route="/v1/images/generations"}'

    def let_it_in_once_it_was_refused() -> None:
        until(lambda: number(small, route % 429) == 1)
        httpx.delete(f"{small.address}/jobs/first-job", trust_env=False)

    threads.append(threading.Thread(target=let_it_in_once_it_was_refused))
    threads[-1].start()
    with openai.OpenAI(api_key="none", base_url=f"{small.address}/v1", max_retries=2) as client:
        assert client.images.generate(prompt="cat", extra_body={"steps": 1}).data[0].b64_json
    for thread in threads:
        thread.join()
    assert number(small, route % 429) == 1 and number(small, route % 200) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_drawn_for_a_client_that_left_ends(small: Running, stream):
    connection = _sent(small, LONG | {"stream": stream, "partial_images": 3})
    until(lambda: small.queue.current is not None and small.queue.current.step)
    connection.close()
    until(lambda: small.queue.current is None, 5)
    assert number(small, 'reifusion_jobs_total{state="cancelled"}') == 1


def test_an_id_is_one_jobs_at_a_time(small: Running):
    answers: list[httpx.Response] = []
    thread = ask(small, LONG, answers, headers={"X-Request-ID": "same-same"})
    until(lambda: "same-same" in small.queue)
    with small.client() as client:
        again = client.post("/v1/images/generations", json=SHORT, headers={"X-Request-ID": "same-same"})
        assert again.status_code == 409
        client.delete("/jobs/same-same")
    thread.join()
    assert answers[0].status_code == 410


def test_a_look_of_others_is_no_picture_of_the_stream():
    async def watched() -> list[object]:
        job = Job(Settings("cat"), Request("cat", seed=0, steps=8), previews=1)
        found: list[object] = []
        for k in range(8):
            job.wants_preview = True
            job.look(SimpleNamespace(index=k, total=8, x0=k), lambda x0: [x0])  # type: ignore[arg-type]
            assert job.preview == k
            found.append(job.partial)
        return found

    assert asyncio.run(watched()) == 3 * [None] + 5 * [3]


def test_stopping_answers_everyone(models):
    answers: list[httpx.Response] = []
    with serving(Config(settings(models), port=0, grace=0.5)) as running:
        threads = [ask(running, LONG, answers) for _ in range(3)]
        until(lambda: running.queue.current is not None)  # the first does not count as waiting any more
        until(lambda: number(running, "reifusion_queue_depth") == 2)
        begun = time.monotonic()
        running.stop()
        assert time.monotonic() - begun < 5
    for thread in threads:
        thread.join()
    assert [one.status_code for one in answers] == 3 * [503]
    assert {one.headers["Retry-After"] for one in answers} == {"5"}


def test_what_is_drawn_when_the_server_stops_is_finished(models):
    answers: list[httpx.Response] = []
    with serving(Config(settings(models), port=0, grace=20)) as running:
        threads = [ask(running, LONG | {"n": 1, "steps": 30}, answers) for _ in range(2)]
        until(lambda: running.queue.current is not None)
        until(lambda: number(running, "reifusion_queue_depth") == 1)
        running.stop()
    for thread in threads:
        thread.join()
    assert [one.status_code for one in answers] == [200, 200]


def test_a_model_that_breaks_while_it_is_loaded_is_said(tmp_path, models):
    usual = replace(settings(models), vae=str(tmp_path / "none.safetensors"))
    with serving(Config(usual, port=0), ready=False) as running, running.client() as client:
        until(lambda: "none.safetensors" in client.get("/readyz").json()["status"])
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
        assert client.post("/v1/images/generations", json=SHORT).status_code == 400


def test_metrics_tell_the_parts_and_nothing_of_what_was_asked(running: Running):
    with running.client() as client:
        client.post("/v1/images/generations", json={"prompt": "a secret cat", "steps": 1})
        client.get("/v1/models/secret")
        client.get("/secret")
        text = client.get("/metrics").text
    for stage in ("queue", "load", "sample", "decode", "encode"):
        assert f'reifusion_stage_seconds_bucket{{le="0.01",stage="{stage}"}}' in text
    for name in ("reifusion_queue_depth", "reifusion_pictures_total", "process_resident_memory_bytes"):
        assert f"\n{name} " in text
    assert 'route="/v1/models/{name}"' in text and "secret" not in text


async def _crowd(address: str, clients: int, seconds: float) -> dict[str, int]:
    """So many clients ask, hear, check, and ask again; a third of their requests is given up early."""
    alone: dict[int, str] = {}
    counts = {"right": 0, "left": 0, "busy": 0}
    end = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, k: int) -> None:
        dice = random.Random(k)
        while time.monotonic() < end:
            seed = dice.randrange(8)
            body = {"prompt": "cat", "seed": seed, "steps": 1, "cfg_scale": 1, "size": "32x32"}
            leaves = dice.random() < 1 / 3
            try:
                answer = await client.post(
                    "/v1/images/generations", json=body, timeout=dice.random() / 4 if leaves else 60
                )
            except httpx.TimeoutException:
                assert leaves
                counts["left"] += 1
                continue
            if answer.status_code == 429:
                counts["busy"] += 1
                await asyncio.sleep(0.2)
                continue
            assert answer.status_code == 200, answer.text
            (datum,) = answer.json()["data"]
            assert datum["seed"] == seed and datum["b64_json"] == alone.setdefault(seed, datum["b64_json"])
            counts["right"] += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, trust_env=False, limits=limits) as client:
        for seed in range(8):  # what each is alone
            body = {"prompt": "cat", "seed": seed, "steps": 1, "cfg_scale": 1, "size": "32x32"}
            alone[seed] = (await client.post("/v1/images/generations", json=body)).json()["data"][0][
                "b64_json"
            ]
        assert len(set(alone.values())) == 8
        await asyncio.gather(*(one(client, k) for k in range(clients)))
    return counts


def test_64_clients_each_get_their_own_picture(models):
    with serving(Config(settings(models), port=0, queue=32)) as running:
        counts = asyncio.run(_crowd(running.address, 64, 2))
        assert min(counts.values()) > 5, counts
        until(lambda: number(running, "reifusion_queue_depth") == 0)
        assert not running.queue._jobs and not list(running.server._app.state.service.scratch.iterdir())


@pytest.fixture
def process(models) -> Iterator[str]:
    """A server as it is started from a shell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "reifusion", "serve", "--model", str(models / "tiny.safetensors"), "--dtype",
        "fp32", "--device", "cpu", "--port", str(port), "--models", str(models), "--grace", "10",
    ]  # fmt: skip
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines: list[dict] = []
    reader = threading.Thread(target=lambda: lines.extend(map(json.loads, started.stderr or ())))
    reader.start()
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert started.poll() is None
        try:
            return httpx.get(f"{address}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(ready, 60)
        yield address
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) in (0, -signal.SIGTERM)
        reader.join()
        events = [one["event"] for one in lines]
        assert "stopping" in events and {"time", "level", "event"} <= set(lines[0])
        assert "a cat" not in json.dumps(lines)
    finally:
        started.kill()
        started.wait()


def test_the_command_serves_and_stops_in_order(process: str):
    body = {"prompt": "a cat", "seed": 1, "steps": 1}
    answer = httpx.post(f"{process}/v1/images/generations", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200 and answer.json()["data"][0]["seed"] == 1


@pytest.mark.slow
def test_64_clients_for_a_minute_and_memory_stays_flat(process: str):
    def resident() -> float:
        gc.collect()
        text = httpx.get(f"{process}/metrics", trust_env=False).text
        return float(re.findall(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)[0])

    asyncio.run(_crowd(process, 64, 10))
    before = resident()
    counts = asyncio.run(_crowd(process, 64, 60))
    after = resident()
    print(counts, f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
    assert counts["right"] > 100 < counts["left"], counts
    assert after < before + 20 * 2**20
