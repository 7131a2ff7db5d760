"""What a U-Net predicts, ε or v, for files whose tensors cannot tell.

Drawn as the wrong one, a model gives noise. A folder of diffusers says it in its scheduler's config, and a
file written here in its header. Other files have one of three signs, and none of them has to be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from .diffusers_folder import FLOW_SCHEDULER, read_json
from .tensors import ModelError

# The spellings in the wild, without signs and in lower case.
SPELLINGS = {
    **dict.fromkeys(("epsilon", "eps", "e"), "epsilon"),
    **dict.fromkeys(("vprediction", "v", "vpred", "velocity"), "v_prediction"),
    **dict.fromkeys(("flow", "rectifiedflow"), "flow"),
}


class Prediction(NamedTuple):
    """What a U-Net predicts, and how that is known."""

    type: str  # as in `ScheduleConfig.prediction_type`
    known_from: str  # for people
    zero_terminal_snr: bool = False


def read_prediction(text: str) -> str:
    """v -> v_prediction. Raises ValueError for a text that is none of `SPELLINGS`."""
    found = SPELLINGS.get(re.sub(r"[\W_]", "", text.lower()))
    if found is None:
        raise ValueError(f"a U-Net predicts epsilon, v_prediction or flow, not {text[:40]!r}")
    return found


def prediction_of(path: Path, header: Mapping[str, str], names: Collection[str]) -> Prediction | None:
    """Returns what the signs of a single file say; None if it has no sign.

    The signs are an empty tensor `v_pred`, beside which `ztsnr` means a zero terminal SNR; the key
    `modelspec.prediction_type`, or ComfyUI's `modelspec.predict_key`, in the header; and a `.yaml` of the
    same name, as CompVis's programs read it. Raises ModelError for a sign that is not understood.
    """
    ends = {name.rpartition(".")[2] for name in names}
    if "v_pred" in ends:
        return Prediction("v_prediction", "a tensor v_pred in the file", "ztsnr" in ends)
    if said := header.get("modelspec.prediction_type") or header.get("modelspec.predict_key"):
        return Prediction(_read(said, path), "the file's header", "ztsnr" in ends)
    yaml = path.with_suffix(".yaml")
    if path.is_file() and yaml.is_file():
        text = yaml.read_text("utf-8", errors="replace")
        if told := re.search(r"""^\s*["']?parameterization["']?\s*:\s*["']?([\w-]+)""", text, re.MULTILINE):
            zero = re.search(
                r"^\s*(zero_terminal_snr|rescale_betas_zero_snr|ztsnr|zsnr)\s*:\s*[Tt]rue", text, re.M
            )
            return Prediction(_read(told[1], yaml), yaml.name, zero is not None)
    return None


def trained_for(path: Path, header: Mapping[str, str]) -> Prediction | None:
    """Returns what a U-Net's own config says; None if it has none.

    That is in the header of a file that was written here, or in the folder of the whole model.
    """
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        theirs = read_json(scheduler)
        flow = theirs.get("_class_name") == FLOW_SCHEDULER
        said = "flow" if flow else str(theirs.get("prediction_type", "epsilon"))
        zero = bool(theirs.get("rescale_betas_zero_snr"))
        return Prediction(_read(said, scheduler), "the scheduler's config beside the U-Net", zero)
    try:
        schedule = json.loads(header["config"])["schedule"]
        said, zero = schedule["prediction_type"], bool(schedule["zero_terminal_snr"])
        return Prediction(_read(said, path), "the config in the U-Net's header", zero)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _read(text: str, path: Path) -> str:
    try:
        return read_prediction(text)
    except ValueError as error:
        raise ModelError(f"{path} is not understood: {error}; --prediction-type overrides it") from None
