"""The kernels in Triton, run by its interpreter on a CPU, and compiled for GPUs that are not here.

These run where Triton can be imported, which PyTorch for CPUs does not bring.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.model.test_fast import error, normal, randomized

CHECK = '''
import torch
from torch import nn
from torch.nn import functional as F
from reifusion.kernels import fused, graphs
from reifusion.model import diffusion, encoder
from reifusion.swap import swap
from tests.model.test_fast import error, normal, randomized

fused.is_here = lambda x: asked.append(1) or True  # a CPU, through the interpreter
asked = []
torch.set_grad_enabled(False)
last = dict(memory_format=torch.channels_last)

def near(module, form, *inputs):
    """As near to the numbers in float64 as the plain form, in each dtype."""
    exact = module.double()(*[x.double() for x in inputs])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        module.to(dtype)
        given = [x.to(dtype) for x in inputs]
        plain = module(*given)
        put_back = swap(module, form)
        asked.clear()
        fast = module(*given)
        put_back()
        assert asked, "the fast form did not run"
        assert fast.dtype == dtype and fast.shape == plain.shape
        # Where a GPU rounds to bfloat16, the interpreter cuts off.
        within = (3 if dtype == torch.bfloat16 else 1.5) * error(plain, exact) + 1e-6
        assert error(fast, exact) <= within, (form, dtype, error(fast, exact), within)

sizes = (32, 8, 5, 7), (40, 4, 5, 13), (100, 1, 33, 33), (20, 20, 1, 1), (96, 32, 3, 4), (6, 1, 9, 2)
for channels, groups, *size in sizes:
    norm = randomized(nn.GroupNorm(groups, channels, eps=1e-2))
    x = (3 + 2 * normal(2, channels, *size)).to(**last)
    near(norm, fused.GroupNorm, x)
    class Silu(nn.GroupNorm):
        def forward(self, x): return F.silu(super().forward(x))
    class Fused(nn.GroupNorm):
        def forward(self, x): return fused.norm_silu(x, self)
    swap(norm, Silu)
    near(norm, Fused, x)
# Statistics of large numbers that differ little, which sums of squares would lose
norm, x = randomized(nn.GroupNorm(2, 8)), (1000 + normal(1, 8, 30, 30)).to(**last)
assert error(fused._normalized(x, norm, False), norm.double()(x.double())) < 1e-3
norm.float()
x = normal(2, 32, 4, 4)
assert not fused.suits(x) and fused.suits(x.to(**last))
swap(norm := randomized(nn.GroupNorm(4, 32)), fused.GroupNorm)
assert torch.equal(norm(x), F.group_norm(x, 4, norm.weight, norm.bias))  # the usual order of memory
calls = []
norm.register_forward_hook(lambda *_: calls.append(1))
fused.norm_silu(x.to(**last), norm)
assert calls == [1]
for width in (8, 33):
    near(randomized(diffusion.GEGLU(width)), fused.GEGLU, normal(2, 7, width))
block = randomized(encoder.ResidualBlock(16, 32, 8)).to(**last)
near(block, fused.VAEResidualBlock, normal(2, 16, 6, 5).to(**last))
block = randomized(diffusion.ResidualBlock(16, 16, 12, 8)).to(**last)
time = normal(1, 12)
class Timed(type(block)):
    def forward(self, x): return super().forward(x, diffusion.Given(time.to(x.dtype), x))
class FusedTimed(fused.UNetResidualBlock):
    def forward(self, x): return super().forward(x, diffusion.Given(time.to(x.dtype), x))
swap(block, Timed)
near(block, FusedTimed, normal(2, 16, 6, 5).to(**last))
'''

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reifusion.kernels import fused

for half in ("fp16", "bf16"):
    for W in (4, 16, 128):
        G = max(1, 64 // W)
        numbers = dict.fromkeys(("pixels", "groups", "width", "rows"), "i32")
        types = dict.fromkeys(("x", "y", "weight", "bias"), f"*{half}") | numbers
        types |= {"means": "*fp32", "spreads": "*fp32", "eps": "fp32"}
        sizes = {"PARTS": fused.PARTS, "P": fused.BLOCK // (G * W), "G": G, "W": W}
        work = [(fused._statistics, sizes), (fused._gate, {"R": 16, "W": 256})]
        work += [(fused._normalize, sizes | {"SILU": silu}) for silu in (True, False)]
        for kernel, constants in work:
            signature = {
                name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
            }
            source = ASTSource(kernel, signature, constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert len(made.asm["ptx"]) > 1000
"""


def test_they_are_for_the_gpu_on_which_triton_launches_and_not_for_float64(monkeypatch):
    """Triton launches on the current GPU, wherever its inputs are."""
    from reifusion.kernels import fused

    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def is_here(index: int, dtype: torch.dtype) -> bool:
        return fused.is_here(SimpleNamespace(device=torch.device("cuda", index), dtype=dtype))  # type: ignore[arg-type]

    assert is_here(0, torch.float16) and is_here(0, torch.float32)
    assert not is_here(1, torch.float16) and not is_here(0, torch.float64)


@pytest.mark.parametrize("work, interpreted", [(CHECK, "1"), (COMPILE, "0")], ids=["interpreted", "compiled"])
def test_kernels(work, interpreted, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("channels, groups, side", [(320, 32, 64), (1280, 32, 8), (128, 32, 100)])
def test_on_a_gpu_norm_and_silu_are_as_exact_as_pytorchs(channels, groups, side):
    from reifusion.kernels import fused

    norm = randomized(nn.GroupNorm(groups, channels))
    x = (1 + normal(2, channels, side, side)).to(memory_format=torch.channels_last)
    exact = F.silu(norm.double()(x.double()))
    norm, x = norm.to("cuda", torch.float16), x.cuda().half()
    fast, plain = fused.norm_silu(x, norm), F.silu(norm(x))
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert error(fast.cpu(), exact) <= 1.2 * error(plain.cpu(), exact)
