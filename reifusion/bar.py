"""How far a long piece of work is: a bar on a terminal, and elsewhere, as in a file, a line now and then."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's bar. Where stderr is no terminal, its state becomes a line every `seconds`, the last at the end.

    Work that takes less than `seconds` writes none there.
    """

    disable: bool
    leave: bool | None

    def __init__(self, *given: Any, seconds: float = 10.0, **settings: Any):
        self.lines = not sys.stderr.isatty()
        if self.lines:  # a bar that redraws itself would be one endless line
            settings |= {"mininterval": seconds, "maxinterval": seconds, "delay": seconds}
        super().__init__(*given, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if not self.lines:
            return super().display(msg, pos)
        print(str(self) if msg is None else msg, file=sys.stderr, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self.lines:
            super().clear(nolock)

    def close(self) -> None:
        if not self.lines or self.disable:
            return super().close()
        if self.leave and self.n > self.last_print_n and self._took() > self.delay:
            self.display()
        self.disable, self.leave = True, False
        self._decr_instances(self)

    def _took(self) -> float:
        return self._time() - self.start_t
