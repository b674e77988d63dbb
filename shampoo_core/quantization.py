"""Numbers in few bits: codes of 8 or 4 bits with a scale per group, and the error of rounding kept.

    scale = max |x| over a group of 64 numbers
    level = round(q * curve(x / scale))                 q the largest level
    code, error = level / 256 rounded, rest             what accumulates
    code        = level                                 what is replaced as a whole

*Error feedback*: a running average changes by less than a code's step from one step to the next, so that
rounding would stop it dead. What accumulates therefore keeps the error of its rounding in eight more bits
and adds it when it is next read.

*Curves* spend levels where they matter: "linear" for entries of matrices; "root" (signed square root) for
first moments, whose small entries are divided by small roots of second moments; "fourth_root" for second
moments, which are divided by: a positive one never becomes zero.

Symmetric matrices keep their diagonal exactly and code the triangle of D^(-1/2) A D^(-1/2), D the diagonal:
the entries of a correlation matrix, of one size whatever the scales of rows. The eigenvalues that matter
most to an inverse root are the small ones, and rounding A itself would destroy them first.

Source: codes per group after Dettmers et al. 2021 (arXiv 2110.02861) and Wang et al. 2024 (arXiv
2405.18144); error feedback after Li et al. 2024 (arXiv 2412.10663); ALGORITHMS.md section 7.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Curve = Literal["linear", "root", "fourth_root"]
GROUP = 64
"""Numbers that share a scale."""
ERROR_LEVELS = 256
"""Levels of an error between two codes."""


@dataclass(frozen=True)
class Format:
    """How numbers are coded.

    Args:
        code_bits: 4 or 8.
        keeps_error: Whether the error of rounding is kept, in eight bits.
        curve: See the module.
    """

    code_bits: int
    keeps_error: bool
    curve: Curve = "linear"

    @property
    def largest_level(self) -> int:
        """Q."""
        largest_code = 2 ** (self.code_bits - 1) - 1
        if not self.keeps_error:
            return largest_code
        return largest_code * ERROR_LEVELS + ERROR_LEVELS // 2 - 1


class CodedRows:
    """N rows of L numbers each, in one format; every operation is one for all rows."""

    def __init__(
        self, num_rows: int, length: int, form: Format, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Start from zeros.

        Args:
            num_rows: N.
            length: L.
            form: Of the codes.
            dtype: Of the numbers that are read, and of the scales.
            device: Of all tensors.
        """
        self._length = length
        self._form = form
        num_groups = -(-length // GROUP)
        # As long as rows need; an even number, for two 4-bit codes share a byte.
        self._group = max(2, 2 * -(-length // (2 * max(num_groups, 1))))
        shape = (num_rows, num_groups, self._group)
        self._scales = torch.zeros(num_rows, num_groups, dtype=dtype, device=device)
        self._errors: Tensor | None = None
        if form.keeps_error:
            self._errors = torch.zeros(shape, dtype=torch.int8, device=device)
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        self._codes = _packed(zeros) if form.code_bits == 4 else zeros.to(torch.int8)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is kept; the first dimension of each is N."""
        kept = {"codes": self._codes, "scales": self._scales}
        return kept if self._errors is None else {**kept, "errors": self._errors}

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (exclusive), (K, L); a copy."""
        codes = self._codes[start:stop]
        scales = self._scales[start:stop, :, None]
        levels = _unpacked(codes, scales.dtype) if self._form.code_bits == 4 else codes.to(scales)
        if self._errors is not None:
            levels.mul_(ERROR_LEVELS).add_(self._errors[start:stop])
        numbers = _straightened(levels.div_(self._form.largest_level), self._form.curve)
        return numbers.mul_(scales).flatten(1)[:, : self._length]

    def write(self, start: int, stop: int, rows: Tensor, where: Tensor | None = None) -> None:
        """Round rows into the place of old ones.

        Args:
            start: First row.
            stop: One past the last row.
            rows: (K, L), finite.
            where: (K,) bool; rows where it is false stay exactly as they are. None writes all.
        """
        scales, levels = self._levels(rows)
        errors = None
        if self._errors is not None:
            codes = levels.add(ERROR_LEVELS // 2).div_(ERROR_LEVELS).floor_()
            errors = levels.sub_(codes, alpha=ERROR_LEVELS).to(torch.int8)
            levels = codes
        codes = _packed(levels) if self._form.code_bits == 4 else levels.to(torch.int8)
        for old, new in ((self._codes, codes), (self._scales, scales), (self._errors, errors)):
            if old is None or new is None:
                continue
            kept = old[start:stop]
            if where is not None:
                new = torch.where(where.view(-1, *[1] * (new.dim() - 1)), new, kept)
            kept.copy_(new)

    def _levels(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (K, groups), and levels (K, groups, group) as whole numbers in the rows' dtype."""
        num_groups = self._scales.shape[1]
        padding = num_groups * self._group - self._length
        groups = torch.nn.functional.pad(rows, (0, padding)).view(
            len(rows), num_groups, self._group
        )
        scales = groups.abs().amax(-1)
        divisors = scales.clamp_min(torch.finfo(rows.dtype).tiny)
        levels = _curved(groups / divisors[:, :, None], self._form.curve)
        levels = levels.mul_(self._form.largest_level).round_()
        if self._form.curve == "fourth_root":
            levels = torch.maximum(levels, (groups > 0).to(levels))
        return scales, levels


class CodedSymmetric:
    """N symmetric positive semi-definite matrices of side d: diagonals as they are, triangles coded."""

    def __init__(self, initial: Tensor, form: Format) -> None:
        """Code (N, d, d) matrices."""
        count, side = initial.shape[:2]
        self.side = side
        self._diagonals = torch.zeros_like(initial[:, 0])
        length = side * (side - 1) // 2
        self._rows = CodedRows(count, length, form, initial.dtype, initial.device)
        self.write(0, count, initial)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is kept; the first dimension of each is N."""
        return {"diagonal": self._diagonals, **self._rows.tensors}

    def read(self, start: int, stop: int) -> Tensor:
        """(K, d, d); copies."""
        diagonals = self._diagonals[start:stop]
        _, unfold = strict_triangle(self.side, diagonals.device)
        # One more column, which the diagonal is read from.
        numbers = torch.nn.functional.pad(self._rows.read(start, stop), (0, 1), value=1.0)
        correlations = numbers.index_select(1, unfold).view(-1, self.side, self.side)
        roots = diagonals.sqrt()
        # Multiplied with each other first, which leaves the result exactly symmetric.
        matrices = correlations.mul_(roots[:, :, None] * roots[:, None, :])
        matrices.diagonal(dim1=-2, dim2=-1).copy_(diagonals)
        return matrices

    def write(self, start: int, stop: int, matrices: Tensor, where: Tensor | None = None) -> None:
        """Round (K, d, d) matrices into the place of old ones; see `CodedRows.write`."""
        # Rounding can leave a matrix that is not quite semi-definite.
        diagonals = matrices.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
        fold, _ = strict_triangle(self.side, matrices.device)
        scales = diagonals.clamp_min(torch.finfo(matrices.dtype).tiny).rsqrt()
        correlations = matrices * scales[:, :, None]
        rows = correlations.mul_(scales[:, None, :]).flatten(1).index_select(1, fold)
        self._rows.write(start, stop, rows, where)
        kept = self._diagonals[start:stop]
        kept.copy_(diagonals if where is None else torch.where(where[:, None], diagonals, kept))

    def scale(self, factors: Tensor) -> None:
        """Multiply matrix n by ``factors[n]``: only diagonals change, nothing is rounded."""
        self._diagonals.mul_(factors.view(-1, 1))


class CodedTensors:
    """N tensors of one shape without structure: bases, moments."""

    def __init__(self, initial: Tensor, form: Format) -> None:
        """Code a (N, ...) stack."""
        self._shape = initial.shape[1:]
        self._rows = CodedRows(
            len(initial), initial[0].numel(), form, initial.dtype, initial.device
        )
        self.write(0, len(initial), initial)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is kept; the first dimension of each is N."""
        return self._rows.tensors

    def read(self, start: int, stop: int) -> Tensor:
        """(K, ...); a copy."""
        return self._rows.read(start, stop).unflatten(1, self._shape)

    def write(self, start: int, stop: int, stacks: Tensor, where: Tensor | None = None) -> None:
        """Round a (K, ...) stack into the place of old entries; see `CodedRows.write`."""
        self._rows.write(start, stop, stacks.flatten(1), where)


@functools.cache
def strict_triangle(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the triangle's entries stand in a flat matrix, and a flat matrix's in the triangle.

    Entries of the diagonal are said to stand one past the end of the triangle.
    """
    rows, columns = torch.triu_indices(side, side, 1, device=device)
    fold = (rows * side + columns).to(torch.int32)
    places = torch.arange(len(fold), dtype=torch.int32, device=device)
    unfold = torch.full((side, side), len(fold), dtype=torch.int32, device=device)
    unfold[rows, columns] = places
    unfold[columns, rows] = places
    return fold, unfold.flatten()


def _packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits, -8 to 7, in a byte."""
    shifted = codes.add(8).to(torch.uint8)
    return shifted[..., ::2].bitwise_or(shifted[..., 1::2].bitwise_left_shift(4))


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of `_packed`."""
    low, high = packed.bitwise_and(15), packed.bitwise_right_shift(4)
    return torch.stack((low, high), dim=-1).flatten(-2).to(dtype).sub_(8)


def _curved(fractions: Tensor, curve: Curve) -> Tensor:
    """Curve numbers in [-1, 1], or [0, 1] for "fourth_root"; changes them in place."""
    if curve == "root":
        return fractions.abs().sqrt_().copysign_(fractions)
    return fractions.sqrt_().sqrt_() if curve == "fourth_root" else fractions


def _straightened(levels: Tensor, curve: Curve) -> Tensor:
    """Undo `_curved`, in place."""
    if curve == "root":
        return levels.mul_(levels.abs())
    return levels.square_().square_() if curve == "fourth_root" else levels
