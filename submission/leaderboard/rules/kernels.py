"""No kernels of one's own, no code that a reader cannot see, no work on other threads.

"Submissions are not allowed to use faster GPU kernels than other submitters by writing their own,
using TVM, or using a different version of cuDNN/cuBLAS", and not "asynchronous operations (e.g.,
spawning additional threads) to perform additional computations that run during the untimed
evaluations" (AlgoPerf v0.6, docs/DOCUMENTATION.md, Disallowed submissions).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from submission.leaderboard.rules.source import Offence, Source

KERNEL_RULE, HIDDEN_RULE, THREAD_RULE = "kernel", "hidden-code", "background-work"

_KERNEL_MODULES = {
    "cffi",
    "ctypes",
    "cuda",
    "cupy",
    "cython",
    "numba",
    "pybind11",
    "pycuda",
    "torch.classes",
    "torch.utils.cpp_extension",
    "torch.cuda.nvrtc",
    "torch.ops.load_library",
    "triton",
    "tvm",
}
_THREAD_MODULES = {"asyncio", "concurrent", "multiprocessing", "threading", "torch.multiprocessing"}
_HIDING = {"exec", "eval", "compile"}
_DEVICE_CODE = ("__global__", "__device__", "tl.program_id", ".visible .entry")
#: Endings of files that hold a kernel.
KERNEL_FILES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".cubin", ".h", ".ptx", ".pyx", ".so"}


def check(source: Source) -> Iterator[Offence]:
    """Yield kernels, code in strings, and threads."""
    for node, name in _used(source):
        if _within(name, _KERNEL_MODULES):
            yield source.offence(node, KERNEL_RULE, f"{name}: a kernel must be torch's own")
        if _within(name, _THREAD_MODULES):
            yield source.offence(node, THREAD_RULE, f"{name}: work must end with its step")
    for constant, text in source.strings():
        if any(word in text for word in _DEVICE_CODE):
            yield source.offence(constant, KERNEL_RULE, "device code in a string")
    for node in source.nodes:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _HIDING
        ):
            message = f"{node.func.id}() runs code that no check can read"
            yield source.offence(node, HIDDEN_RULE, message)


def _used(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Yield the full names that are imported, and those of the outermost attribute chains."""
    yield from source.imports()
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and not isinstance(source.parent(node), ast.Attribute):
            name = source.dotted(node)
            if name and name.startswith("torch."):
                yield node, name


def _within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)
