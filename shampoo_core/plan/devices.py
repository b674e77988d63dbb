"""What a device can do: the stated rates behind every estimated millisecond.

Peak numbers are the vendors'; a step is charged a share of them. Matrix products are counted at float32
without TF32, for factors and roots need it. Estimates are for choosing between plans, good to a factor
of about two; bytes and operations are exact.

Source: the vendors' data sheets (arithmetic, memory, links; those inside a node at some 0.8 of it).
Decompositions of side 1024 are measured on an H200 for an H100 (docs/gpu.md), where DASH's published times
(arXiv 2602.02016) come to 12 or 13 ms, and guessed for the others; `SHARES` has other sides and kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shampoo_core.counting import Operation

PRODUCT_EFFICIENCY = 0.7
"""Share of the peak rate that batched float32 products reach at sides of some hundreds."""
MEMORY_EFFICIENCY = 0.75
"""Share of the peak bandwidth that elementwise operations reach."""
LAUNCH_SECONDS = 6e-6
"""From one kernel to the next when the device waits for the host."""
REFERENCE_SIDE = 1024
"""Side of the matrices for which decomposition times are stated."""
SHARES = {
    "_linalg_eigh": 1.0,
    "geqrf": 0.21,
    "linalg_householder_product": 0.21,
    "linalg_cholesky_ex": 0.01,
}
"""Of the time of an eigendecomposition. Measured on an H200, milliseconds at sides 64, 128, ..., 2048: of
eigendecompositions 0.8, 1.7, 2.0, 4.7, 11, 25, of QR 0.1, 0.5, 0.8 (2.7 in batches of 16), 1.9, 4.4, 11,
half of which is charged for each of its two operations."""
SMALL_SIDE, SMALL_AT_ONCE = 32, 64
"""Matrices up to this side are decomposed together, so many in the time of one."""


@dataclass(frozen=True)
class Device:
    """Rates of one accelerator."""

    name: str
    flops: float
    """float32 multiplications and additions per second, without TF32."""
    bandwidth: float
    """Bytes per second to and from its memory."""
    decomposition_seconds: float
    """One float32 eigendecomposition of side 1024, in a batch."""
    node_bandwidth: float
    """Bytes per second that one device sends inside a node in a collective."""
    network_bandwidth: float
    """Bytes per second and device between nodes."""
    devices_per_node: int = 8

    def step_seconds(self, operations: Iterable[Operation]) -> float:
        """Estimated time of some operations, one after the other.

        Each takes the longer of its arithmetic and its traffic, and at least the launches of its kernels.
        """
        return sum(
            max(LAUNCH_SECONDS * max(1, item.num_kernels), self._seconds(item))
            for item in operations
        )

    def traffic_seconds(self, num_bytes: float) -> float:
        """Estimated time in which some bytes go to or from memory in elementwise operations."""
        return num_bytes / (self.bandwidth * MEMORY_EFFICIENCY)

    def _seconds(self, operation: Operation) -> float:
        traffic = self.traffic_seconds(operation.bytes_moved)
        if operation.side is None:
            return max(operation.flops / (self.flops * PRODUCT_EFFICIENCY), traffic)
        # A decomposition is bound by its sequential steps, of which there are as many as rows, until
        # it is by arithmetic.
        each = self.decomposition_seconds * operation.side / REFERENCE_SIDE
        share = next(share for name, share in SHARES.items() if name in operation.name)
        small = operation.side <= SMALL_SIDE
        rounds = math.ceil(operation.num_matrices / (SMALL_AT_ONCE if small else 1))
        return max(rounds * share * each, operation.flops / (self.flops * PRODUCT_EFFICIENCY))

    def send_seconds(self, num_bytes: float, world_size: int, *, to_all: bool) -> float:
        """Estimated time in which one of ``world_size`` devices sends some bytes in a collective.

        Args:
            num_bytes: That the device sends, to all others together.
            world_size: Devices that take part.
            to_all: Whether all get the same, as in an all-gather: then they travel in a ring, which leaves
                a node once, and its devices' links to the network share that. Otherwise, as in an
                all-to-all, nearly all of a device's bytes leave the node by its own link.
        """
        if world_size <= self.devices_per_node:
            return num_bytes / self.node_bandwidth
        if not to_all:
            return num_bytes / self.network_bandwidth
        return num_bytes / min(self.node_bandwidth, self.devices_per_node * self.network_bandwidth)


DEVICES = {
    device.name: device
    for device in (
        Device("v100", 15.7e12, 900e9, 50e-3, 130e9, 6.25e9),
        Device("a100", 19.5e12, 1555e9, 20e-3, 230e9, 25e9),
        Device("h100", 66.9e12, 3350e9, 11e-3, 370e9, 50e9),
    )
}
"""V100-SXM2 16 GB, A100-SXM4 40 GB, H100-SXM5: nodes of eight on NVLink; InfiniBand at 50 Gbit/s (V100),
200 (A100) and 400 Gbit/s (H100) a device, as in the vendor's own servers (DGX-1, DGX A100, DGX H100).
Decompositions of the last were measured on an H200, which has its processor."""
