"""A line of JSON for each event, on stderr. Prompts and pictures are never in it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

LOG = logging.getLogger("reifusion.server")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


def log(event: str, level: int = logging.INFO, failure: BaseException | None = None, **facts: Any) -> None:
    """Writes a line. failure: whose traceback it has. facts: what else it says, without None."""
    kept = {name: value for name, value in facts.items() if value is not None}
    LOG.log(level, event, extra={"facts": kept}, exc_info=failure)


def write_to_stderr() -> None:
    """Begins to write, the lines of the HTTP server among them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    for name in ("reifusion.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
