"""Numbers in few bits: codes of 8 or 4 bits with a scale per group, and the error of rounding kept.

    scale = max |x| over a group of 64 numbers
    level = round(q * curve(x / scale))                 q the largest level
    code, error = level / 256 rounded, rest             what accumulates
    code        = level                                 what is replaced as a whole

*Error feedback*: a running average changes by less than a code's step from one step to the next, so that
rounding would stop it dead. What accumulates therefore keeps the error of its rounding in eight more bits
and adds it when it is next read.

*Curves* spend levels where they matter: "linear" for entries of matrices; "root" (signed square root) for
first moments, whose small entries are divided by small roots of second moments, and "cube_root" for those
that have few levels; "fourth_root" for second moments, which are divided by: a positive one never becomes
zero.

Symmetric matrices keep their diagonal exactly and code the triangle of D^(-1/2) A D^(-1/2), D the diagonal:
the entries of a correlation matrix, of one size whatever the scales of rows. The eigenvalues that matter
most to an inverse root are the small ones, and rounding A itself would destroy them first.

Source: codes per group after Dettmers et al. 2021 (arXiv 2110.02861) and Wang et al. 2024 (arXiv
2405.18144); error feedback after Li et al. 2024 (arXiv 2412.10663).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shampoo_core.storage.joined import Span, copy_to, taken

Curve = Literal["linear", "root", "cube_root", "fourth_root"]
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


class CodedGroups:
    """R groups of 64 numbers each, in one format; every operation is one for all groups."""

    def __init__(
        self, num_groups: int, form: Format, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Start from zeros.

        Args:
            num_groups: R.
            form: Of the codes.
            dtype: Of the numbers that are read, and of the scales.
            device: Of all tensors.
        """
        self._form = form
        self._scales = torch.zeros(num_groups, dtype=dtype, device=device)
        zeros = torch.zeros(num_groups, GROUP, dtype=torch.int8, device=device)
        self._errors = zeros if form.keeps_error else None
        self._codes = _packed(zeros) if form.code_bits == 4 else zeros.clone()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is kept; the first dimension of each is R."""
        kept = {"codes": self._codes, "scales": self._scales}
        return kept if self._errors is None else {**kept, "errors": self._errors}

    def read(self, spans: Sequence[Span]) -> Tensor:
        """Some groups, (K, 64); a copy."""
        codes, scales = taken(self._codes, spans), taken(self._scales, spans)
        levels = _unpacked(codes, scales.dtype) if self._form.code_bits == 4 else codes.to(scales)
        if self._errors is not None:
            levels.mul_(ERROR_LEVELS).add_(taken(self._errors, spans))
        numbers = _straightened(levels.div_(self._form.largest_level), self._form.curve)
        return numbers.mul_(scales[:, None])

    def write(self, spans: Sequence[Span], groups: Tensor, where: Tensor | None = None) -> None:
        """Round groups into the place of old ones.

        Args:
            spans: Which.
            groups: (K, 64), finite.
            where: (K,) bool; groups where it is false stay exactly as they are. None writes all.
        """
        scales, levels = self._levels(groups)
        if self._errors is not None:
            codes = levels.add(ERROR_LEVELS // 2).div_(ERROR_LEVELS).floor_()
            errors = levels.sub_(codes, alpha=ERROR_LEVELS).to(torch.int8)
            copy_to(self._errors, spans, errors, where)
            levels = codes
        codes = _packed(levels) if self._form.code_bits == 4 else levels.to(torch.int8)
        copy_to(self._codes, spans, codes, where)
        copy_to(self._scales, spans, scales, where)

    def _levels(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (K,), and levels (K, 64) as whole numbers in the groups' dtype."""
        scales = groups.abs().amax(-1)
        divisors = scales.clamp_min(torch.finfo(groups.dtype).tiny)
        levels = _curved(groups / divisors[:, None], self._form.curve)
        levels = levels.mul_(self._form.largest_level).round_()
        if self._form.curve == "fourth_root":
            levels = torch.maximum(levels, (groups > 0).to(levels))
        return scales, levels


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
    if curve == "cube_root":
        return fractions.abs().pow_(1.0 / 3.0).copysign_(fractions)
    return fractions.sqrt_().sqrt_() if curve == "fourth_root" else fractions


def _straightened(levels: Tensor, curve: Curve) -> Tensor:
    """Undo `_curved`, in place."""
    if curve == "root":
        return levels.mul_(levels.abs())
    if curve == "cube_root":
        return levels.mul_(levels.square())
    return levels.square_().square_() if curve == "fourth_root" else levels
