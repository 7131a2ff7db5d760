"""Why a request is refused, in the shape that each dialect's clients read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


GONE = 499  # the status, in logs and metrics, of a request whose client left before there was an answer


@dataclass
class Refusal(Exception):
    """A request that is not answered with what it asked for."""

    status: int  # of HTTP
    message: str  # one sentence
    param: str | None = None  # the field that is wrong
    code: str | None = None  # OpenAI's name of the error, where it has one
    retry_after: int | None = None  # seconds

    def __str__(self) -> str:
        return self.message


def is_a1111(path: str) -> bool:
    """True if the path belongs to A1111's API, with its extension for ControlNets."""
    return path.startswith(("/sdapi/", "/controlnet/"))


def body(path: str, refusal: Refusal) -> dict[str, Any]:
    """Returns the JSON that tells of it, in the dialect that the path belongs to."""
    if is_a1111(path):
        name = {404: "NotFound", 422: "ValidationError"}.get(refusal.status, "HTTPException")
        return {"error": name, "detail": refusal.message, "body": refusal.param or "", "errors": ""}
    kind = "server_error" if refusal.status >= 500 else TYPES.get(refusal.status, "invalid_request_error")
    said = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
    return {"error": said}


def answer(path: str, refusal: Refusal) -> JSONResponse:
    """Returns the whole response."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="reifusion"'
    return JSONResponse(body(path, refusal), refusal.status, headers)
