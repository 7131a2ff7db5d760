"""Edges of a picture, as a hint for a ControlNet: white lines on black (Canny 1986)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..model.pictures import Picture, open_picture

LOW, HIGH = 100, 200  # of most programs, and of the published ControlNets for edges


def edges(picture: Picture, low: float = LOW, high: float = HIGH) -> Image.Image:
    """Returns the edges of a picture, as large as it: RGB, white on black.

    An edge begins where brightness or colour change by more than `high`, the sum of both directions, and goes
    on while they change by more than `low`. Raises ValueError for thresholds that are not in this order, and
    where OpenCV is not installed.
    """
    if not 0 <= low <= high:
        raise ValueError(
            f"the thresholds of edges are two numbers, the lower one first, not {low:g} and {high:g}"
        )
    try:
        import cv2
    except ImportError:
        raise ValueError("edges are found by OpenCV: pip install 'reifusion[control]'") from None
    found = cv2.Canny(np.asarray(open_picture(picture)), low, high)  # (H, W, 3) -> (H, W), 0 or 255
    return Image.fromarray(np.asarray(found, dtype=np.uint8)).convert("RGB")
