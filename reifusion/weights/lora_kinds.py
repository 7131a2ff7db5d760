"""The kinds of changes that files called LoRAs hold: each makes a ΔW for a layer of a few tensors.

`read_update` tells the kind by the names of the tensors. Plain LoRAs are from Hu et al. 2021; LoHa, LoKr and
the full differences are LyCORIS's (Yeh et al. 2023, arXiv:2309.14859); DoRA is from Liu et al. 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..model.tensors import ModelError


@dataclass(frozen=True)
class Update:
    """A plain LoRA's change of one layer: B A, scaled by α/r."""

    kind: ClassVar[str] = "a LoRA"
    down: Tensor  # A, (r, in), or (r, in, k, k) for a convolution
    up: Tensor  # B, (out, r), or (out, r, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW, (out, in) or (out, in, k, k)."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self, weight: Tensor) -> Tensor:
        """Returns ΔW for a layer with that weight W, with W's shape, dtype and device."""
        # A convolution followed by a 1×1 convolution is one convolution, whose weight is the same product.
        up, down = (x.flatten(1).to(weight) for x in (self.up, self.down))
        # Eq. 3, Hu et al. 2021: h = W₀x + ΔWx = W₀x + BAx; §4.1: ΔWx is scaled by α/r
        change = self.alpha / self.rank * (up @ down)  # (out, r) @ (r, in·k·k) -> (out, in·k·k)
        return change.reshape(weight.shape)


@dataclass(frozen=True)
class LoHa:
    """The product, number by number, of two matrices of a low rank."""

    kind: ClassVar[str] = "a LoHa"
    one: tuple[Tensor, Tensor]  # (out, r) and (r, in·k·k)
    two: tuple[Tensor, Tensor]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW, flat: (out, in·k·k)."""
        return (len(self.one[0]), self.one[1].shape[1])

    def delta(self, weight: Tensor) -> Tensor:
        """Returns ΔW for a layer with that weight W, with W's shape, dtype and device."""
        (a, b), (c, d) = ([x.to(weight) for x in pair] for pair in (self.one, self.two))
        # Yeh et al. 2023, §3.2: ΔW = (B₁A₁) ⊙ (B₂A₂)
        return (self.scale * (a @ b) * (c @ d)).reshape(weight.shape)


@dataclass(frozen=True)
class LoKr:
    """The Kronecker product of two matrices: every number of the first, times all of the second."""

    kind: ClassVar[str] = "a LoKr"
    outer: Tensor  # (out/m, in/n)
    inner: Tensor  # (m, n·k·k)
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW, flat: (out, in·k·k)."""
        return (len(self.outer) * len(self.inner), self.outer.shape[1] * self.inner.shape[1])

    def delta(self, weight: Tensor) -> Tensor:
        """Returns ΔW for a layer with that weight W, with W's shape, dtype and device."""
        # Yeh et al. 2023, §3.2: ΔW = C ⊗ (BA)
        change = torch.kron(self.outer.to(weight).contiguous(), self.inner.to(weight).contiguous())
        return (self.scale * change).reshape(weight.shape)


@dataclass(frozen=True)
class Difference:
    """A difference that is stored as it is: of a weight, of a bias, or of a norm's."""

    kind: ClassVar[str] = "a full difference of weights"
    change: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.change.shape)

    def delta(self, weight: Tensor) -> Tensor:
        """Returns ΔW for a layer with that weight W, with W's shape, dtype and device."""
        return self.change.to(weight).reshape(weight.shape)


@dataclass(frozen=True)
class DoRA:
    """A change of another kind, after which each row, or each column, is given a length that was learned."""

    kind: ClassVar[str] = "a DoRA"
    inside: Update | LoHa | LoKr | Difference
    lengths: Tensor  # (out, 1) of the rows, or (1, in) of the columns

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inside.shape

    def delta(self, weight: Tensor) -> Tensor:
        """Returns ΔW for a layer with that weight W, with W's shape, dtype and device."""
        changed = weight + self.inside.delta(weight)  # V
        rows = self.lengths.shape[1] == 1
        others = [axis for axis in range(weight.ndim) if axis != (0 if rows else 1)]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        lengths = self.lengths.to(weight).reshape(norm.shape)
        # Eq. 5, Liu et al. 2024: W' = m (W₀ + BA) / ‖W₀ + BA‖. At the weight s, W becomes W + s (W' − W).
        return lengths * changed / norm.clamp_min(torch.finfo(weight.dtype).tiny) - weight


Additive = Update | LoHa | LoKr | Difference
AnyUpdate = Additive | DoRA

# The tensors of each kind, by LyCORIS's names
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LYCORIS = (*LOHA, "hada_t1", "hada_t2", *LOKR, "diff", "diff_b", "w_norm", "b_norm")


def read_update(parts: Mapping[str, Tensor], alpha: float | None) -> AnyUpdate:
    """Makes the change of a layer's weight of its tensors.

    parts: by their names in `LYCORIS`, "down", "up", "mid" and "lengths". alpha: None if nothing says it,
    then it is the rank; over the rank already if no tensor has a rank. Raises ModelError, with a
    sentence that goes on from the layer's name, for tensors that are incomplete or do not fit together.
    """
    for name, x in parts.items():
        if name != "alpha" and (
            x.ndim < (1 if name in ("lengths", "diff", "w_norm") else 2) or not x.numel()
        ):
            raise ModelError(f"has a tensor {name} of shape {tuple(x.shape)}, which cannot be")
    left = set(parts) - {"alpha", "lengths"}
    if left & {"down", "up", "mid"}:
        update: Additive = _lora(parts, alpha)
        left -= {"down", "up", "mid"}
    elif any(name.startswith("hada_") for name in left):
        update = _loha(parts, alpha)
        left -= {*LOHA, "hada_t1", "hada_t2"}
    elif any(name.startswith("lokr_") for name in left):
        update = _lokr(parts, alpha)
        left -= set(LOKR)
    elif one := left & {"diff", "w_norm"}:
        update = Difference(parts[min(one)])
        left -= {min(one)}
    else:
        raise ModelError(f"lacks the tensors that its {min(parts)} belongs to")
    if left:
        raise ModelError(f"has {update.kind} and a tensor {min(left)}, which do not go together")
    if "lengths" in parts:
        lengths = parts["lengths"]
        lengths = lengths.flatten(1) if lengths.ndim > 1 else lengths[:, None]
        if 1 not in lengths.shape:
            raise ModelError(f"has lengths of shape {tuple(parts['lengths'].shape)}, not one of each row")
        return DoRA(update, lengths)
    return update


def _lora(parts: Mapping[str, Tensor], alpha: float | None) -> Update:
    down, up = _all(parts, ("down", "up"), "matrix")
    if up.shape[1] != len(parts.get("mid", down)):
        _misfit("two matrices", down, up)
    if "mid" in parts:
        middle = parts["mid"]
        if middle.ndim != 4 or middle.shape[1] != len(down) or down[0].numel() != down.shape[1]:
            _misfit("three matrices", up, middle, down)
        # A LoCon in Tucker's form: a 1×1 convolution and the k×k one behind it are one k×k convolution.
        down = torch.einsum("pqhw,qi->pihw", middle.float(), down.float().flatten(1))  # (r, in, k, k)
    if up[0].numel() != up.shape[1]:  # a kernel that is not 1×1
        _misfit("two matrices", down, up)
    return Update(down, up, len(down) if alpha is None else alpha)


def _loha(parts: Mapping[str, Tensor], alpha: float | None) -> LoHa:
    a, b, c, d = _all(parts, LOHA, "tensor")
    one, two = (_product(parts, f"hada_t{i}", *pair) for i, pair in ((1, (a, b)), (2, (c, d))))
    if (len(one[0]), one[1].shape[1]) != (len(two[0]), two[1].shape[1]):
        _misfit("two products", one[0], one[1], two[0], two[1])
    return LoHa(one, two, 1.0 if alpha is None else alpha / len(b))


def _lokr(parts: Mapping[str, Tensor], alpha: float | None) -> LoKr:
    sides: list[Tensor] = []
    ranks: list[int] = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append(parts[side].flatten(1))
            continue
        a, b = _all(parts, (f"{side}_a", f"{side}_b"), "tensor")
        left, right = _product(parts, side.replace("w", "t"), a, b)
        sides.append(left.float() @ right.float())
        ranks.append(len(b))
    # The second side's rank is the rank. With two whole sides there is none: LyCORIS and A1111 pass over the
    # file's α then, and PEFT takes α/r from its config.
    outer, inner = sides
    if not ranks:
        return LoKr(outer, inner, 1.0 if alpha is None or "alpha" in parts else alpha)
    return LoKr(outer, inner, 1.0 if alpha is None else alpha / ranks[-1])


def _product(parts: Mapping[str, Tensor], core: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two matrices whose product it is, (out, r) and (r, in·k·k)."""
    if core not in parts:
        if not a.ndim == b.ndim == 2 or a.shape[1] != len(b):
            _misfit("two matrices", a, b)
        return a, b
    t = parts[core]
    if not (a.ndim == b.ndim == 2 and t.ndim == 4 and t.shape[:2] == (len(a), len(b))):
        _misfit("three tensors", a, t, b)
    # Tucker's form: Σ_q t[p, q] b[q], with the kernel's places beside it; a is stored lying, (r, out)
    return a.T, torch.einsum("pqhw,qi->pihw", t.float(), b.float()).flatten(1)  # (r, in·k·k)


def _all(parts: Mapping[str, Tensor], names: Collection[str], what: str) -> list[Tensor]:
    for name in sorted(names):
        if name not in parts:
            raise ModelError(f"lacks its {name} {what}")
    return [parts[name] for name in names]


def _misfit(what: str, *tensors: Tensor) -> None:
    shapes = " and ".join(str(tuple(x.shape)) for x in tensors)
    raise ModelError(f"has {what} that do not fit together, {shapes}")
