"""Who may ask, and how much they may send: checked before a request reaches anything else.

On this machine alone, a page in a browser must not draw through the back door: the Host must be this machine
(or a name that was made to point here could ask), and a request that a page of another origin sends is
refused. Elsewhere there is a token. Plain ASGI, as Starlette's own middleware hides that a client has left.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import GONE, Refusal, answer
from .logs import log

if TYPE_CHECKING:
    from .metrics import Metrics

HERE = ("127.0.0.1", "localhost", "::1")
OPEN = ("/healthz", "/readyz")  # without a token: they tell nothing but whether the server is well


class Guard:
    """Refuses with 401 a wrong token, with 403 a foreign origin or host, with 413 a body that is too long."""

    def __init__(self, app: ASGIApp, token: str | None, hosts: tuple[str, ...], most: int) -> None:
        """token: None for none. hosts: the names that a Host header may have; () for any. most: bytes."""
        self._app, self._token, self._hosts, self._most = app, token, hosts, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"]
        try:
            self._check(headers, path)
        except Refusal as refusal:
            return await answer(path, refusal)(scope, receive, send)
        length, too_long = 0, False

        async def counted() -> Message:
            nonlocal length, too_long
            message = await receive()
            length += len(message.get("body", b""))
            if length <= self._most:
                return message
            too_long = True
            return {"type": "http.disconnect"}  # so that nobody reads on

        async def instead(message: Message) -> None:
            if not too_long:
                await send(message)

        try:
            await self._app(scope, counted, instead)
        finally:
            if too_long:
                await answer(path, self._too_long())(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host = _name(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            raise Refusal(403, "this server answers only under its own name; see --host")
        origin = headers.get("origin")
        if origin is not None and (origin.partition("://")[2] or origin) != headers.get("host"):
            raise Refusal(403, "a page of another origin may not ask this server")
        # A link may lead to a page; what another page shows as a picture or in a frame has no origin.
        linked = headers.get("sec-fetch-mode", "navigate") == "navigate" and not path.startswith("/api/")
        if not linked and headers.get("sec-fetch-site") == "cross-site":
            raise Refusal(403, "a page of another origin may not ask this server")
        if self._token is not None and path not in OPEN and not self._known(headers.get("authorization", "")):
            raise Refusal(401, "the token is missing or wrong", None, "invalid_api_key")
        length = headers.get("content-length", "0")
        if not re.fullmatch(r"\d{1,15}", length) or int(length) > self._most:
            raise self._too_long()

    def _known(self, authorization: str) -> bool:
        """True for `Bearer TOKEN`, and for Basic with the token as the password."""
        kind, _, value = authorization.partition(" ")
        given = value.strip().encode("latin-1")  # the bytes as they were sent
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given, (self._token or "").encode())

    def _too_long(self) -> Refusal:
        return Refusal(413, f"the body has more than {self._most:,} bytes", None, "request_too_large")


def _name(host: str) -> str:
    """127.0.0.1:8000 -> 127.0.0.1, [::1]:8000 -> ::1"""
    found = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([^:\[\]]*))(?::\d+)?", host)
    return ((found[1] or found[2]) if found else "").lower()


class Observer:
    """Gives every request an id, counts it, and writes a line about it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["id"] = asked if re.fullmatch(r"[\w-]{8,64}", asked) else uuid.uuid4().hex
        begun = time.monotonic()
        failure: Exception | None = None
        status = GONE  # unless there is an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Content-Type-Options"] = "nosniff"
                sent["X-Request-ID"] = state["id"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            failure = error
            if status == GONE:  # nothing has been sent yet
                refusal = Refusal(500, "the server failed; its log says why")
                await answer(scope["path"], refusal)(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            level = logging.INFO if status < 500 else logging.ERROR
            if route not in ("/healthz", "/readyz", "/metrics"):
                seconds = round(time.monotonic() - begun, 3)
                log(
                    "request", level, failure, id=state["id"], method=scope["method"], route=route,
                    status=status, seconds=seconds, **state.get("facts", {}),
                )  # fmt: skip
