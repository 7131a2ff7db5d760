"""Models that stay in memory while many pictures are drawn, and what steers them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from .settings import DRAWING, STEERING, Settings, requested

if TYPE_CHECKING:
    from .model.pipeline import StableDiffusion

STEERS = 4  # ControlNets and adapters that stay beside each model


def of_model(settings: Settings) -> str:
    """Tells settings apart that need another model in memory."""
    asked = {*requested(), *DRAWING, *STEERING, "code"}
    own = {name: x for name, x in settings.carried().items() if name not in asked}
    return json.dumps(own, sort_keys=True)


class Models:
    """The models that were used last, with their LoRAs, each loaded when it is first needed."""

    def __init__(
        self,
        device: str | None = None,
        compile: bool = False,
        keep: int = 1,
        loading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """keep: how many models stay. loading: is entered while one is loaded."""
        self._device, self._compile, self._keep, self._loading = device, compile, keep, loading
        # of each model: itself, and the ControlNets and adapters that were read for it
        self._loaded: OrderedDict[str, tuple[StableDiffusion, dict[Any, Any]]] = OrderedDict()

    def there(self, settings: Settings) -> StableDiffusion | None:
        """The same if the model is in memory: at once, also while another one is being loaded."""
        return self._steered(of_model(settings), settings)

    def pipe(self, settings: Settings) -> StableDiffusion:
        """The model that these settings need, steered as they say. Raises ValueError for a wrong file."""
        key = of_model(settings)
        if key not in self._loaded:
            while len(self._loaded) >= self._keep:  # its memory, before the next model needs it
                self._loaded.popitem(last=False)
            with self._loading():
                self._loaded[key] = settings.loaded(self._device, self._compile), {}
        steered = self._steered(key, settings)
        assert steered is not None
        return steered

    def _steered(self, key: str, settings: Settings) -> StableDiffusion | None:
        if (found := self._loaded.get(key)) is None:
            return None
        with suppress(KeyError):  # another thread may just have dropped it
            self._loaded.move_to_end(key)
        model, steers = found
        steered = settings.steered(model, steers)
        while len(steers) > STEERS:
            steers.pop(next(iter(steers)))
        return steered
