"""Eigenvalue-corrected Shampoo (SOAP): Adam in the eigenbasis of Shampoo's factors.

    A_i <- beta2 A_i + (1 - beta2) Gram_i(G)
    Q_i  = eigenvectors of A_i                                     at refreshes
    g    = G x_1 Q_1 x_2 Q_2 ...
    M, D <- averages of g and g^2                                  in the eigenbasis
    P    = (M / (sqrt(D) + eps)) x_1 Q_1^T x_2 Q_2^T ...

The averages live in the eigenbasis, so a step costs three two-sided products instead of four, and they
are carried over when the basis turns: with S_i = Q_i,old^T Q_i,new, M becomes M x_i S_i, exactly, and D
becomes D x_i (S_i o S_i), which is exact where coordinates are uncorrelated.

Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3; Eschenhagen et al. 2025 (arXiv 2506.03595);
the transport of D is ALGORITHMS.md section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from shampoo_core.config import GroupOptions, check_choice, check_count, check_range
from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import AdamGrafting, GraftingConfig, lend_length
from shampoo_core.preconditioners.axes import (
    group_due,
    preconditioned_axes,
    slices_of,
    write_slices,
)
from shampoo_core.refresh import FactorSlice, RefreshPolicy
from shampoo_core.solvers import BasisSolver, EighSolver
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import KroneckerFactors, by_axis, multiply_along_axes
