"""The rows of the speed benchmark: what is measured, who runs it, and one contender's result for a row."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from bench.contenders import CONTENDERS, STEPS

REFERENCE = "diffusers fp32"
FULL = (REFERENCE, "reifusion fp32")
HALF = tuple(name for name in CONTENDERS if "bf16" in name)
BEST = ("diffusers bf16 channels-last", "OpenVINO bf16", "reifusion bf16")
OURS = ("reifusion bf16",)
CPP = ("stable-diffusion.cpp f16",)

# glibc gives large blocks back to the system at once and asks for them again in the next layer, page by page.
# Blocks that are kept, in huge pages, need no asking. The command line keeps them for its users.
AS_IS, KEPT = "as it is", "blocks kept"
ALLOCATORS: dict[str, dict[str, str]] = {
    AS_IS: {},
    KEPT: {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "THP_MEM_ALLOC_ENABLE": "1"},
}


@dataclass(frozen=True)
class Row:
    """A piece of work. kind: text, unet, vae or picture; sizes in pixels."""

    name: str
    kind: str
    width: int = 512
    height: int = 512
    batch: int = 1
    steps: int = STEPS
    contenders: tuple[str, ...] = (*FULL, *HALF)
    warm_up: bool = True  # one uncounted run first; a row that takes minutes warms up while it runs
    patience: float = 45  # seconds of rounds after which no other round begins; at least one round counts


STEP, DECODE = "U-Net step with guidance, 512×512", "VAE decode, 512×512"
ROWS = [
    Row("text encoder, 2 prompts", "text"),
    Row(STEP, "unet"),
    Row(DECODE, "vae"),
    Row("U-Net step with guidance, 256×256", "unet", 256, 256, contenders=(*FULL, *BEST)),
    Row("U-Net step with guidance, 768×512", "unet", 768, contenders=BEST, patience=20),
    Row("VAE decode, 1024×1024", "vae", 1024, 1024, contenders=BEST, warm_up=False, patience=0),
    Row(f"picture, 512×512, {STEPS} steps", "picture", contenders=(*BEST, *CPP), warm_up=False, patience=0),
]
SCALING = [
    Row(f"U-Net step, {side}×{side}", "unet", side, side, contenders=OURS, patience=5)
    for side in (384, 768, 1024)
]
SCALING += [
    Row(f"U-Net step, {batch} times 512×512", "unet", batch=batch, contenders=OURS, patience=5)
    for batch in (2, 4, 8)
]
MEMORY = [
    Row("memory of a process that decodes 512×512", "vae", contenders=BEST),
    Row("memory of a process that draws 512×512", "picture", steps=2, contenders=BEST),
]
# Contenders that run together, how they keep memory, and their rows; the most important first.
PHASES: list[tuple[tuple[str, ...], str, list[Row]]] = [
    (FULL, KEPT, ROWS),
    (HALF, KEPT, ROWS + SCALING),
    (BEST, AS_IS, [row for row in ROWS if row.name in (STEP, DECODE)]),
    (CPP, KEPT, ROWS),
]
LOAD, IMPORT, SHELL = (
    "load 2 GB of weights",
    "import, beyond torch itself",
    f"shell to PNG, the mini, {STEPS} steps",
)
BUSY = f"{SHELL}, with a busy program on each core"
PROCESSES = [LOAD, IMPORT, SHELL, BUSY]  # rows that need a fresh process each time
# OpenMP's threads look out for one another in a loop before they sleep: briefly, as reifusion's programs have
# it, or 300,000 turns of the loop, as GNU's OpenMP has it where nobody says otherwise.
BRIEFLY, LONG = "reifusion", "reifusion, threads that wait long"
THREADS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
WAITING: dict[str, dict[str, str]] = {BRIEFLY: {}, LONG: {"GOMP_SPINCOUNT": "300000"}}


@dataclass
class Result:
    """One contender's result for one row."""

    row: str
    contender: str
    allocator: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None  # of the output, relative to the reference's; None: it is not comparable
    peak: float = 0.0  # MB of resident memory, at most
    added: float = 0.0  # MB of the peak beyond the memory before the row
    gflop: float = 0.0  # of the plain arithmetic, so that doing less arithmetic counts as speed
    note: str = ""  # the reason if there is no result

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def __str__(self) -> str:
        figures = f"{self.median:8.3f} s of {len(self.seconds)}" if self.seconds else f"-- {self.note}"
        error = "" if self.error is None else f"  error {self.error:.1e}"
        memory = f"  {self.peak:.0f} MB" if self.peak else ""
        return f"{self.row:40} {self.allocator:12} {self.contender:40} {figures}{error}{memory}"
