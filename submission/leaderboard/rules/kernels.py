"""No kernels of one's own, no code that a reader cannot see, no work on other threads.

"Submissions are not allowed to use faster GPU kernels than other submitters by writing their own,
using TVM, or using a different version of cuDNN/cuBLAS", and not "asynchronous operations (e.g.,
spawning additional threads) to perform additional computations that run during the untimed
evaluations" (AlgoPerf v0.6, docs/DOCUMENTATION.md, Disallowed submissions).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from submission.leaderboard.rules.source import IMPORTERS, Offence, Source

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
_THREAD_MODULES = {
    "_thread",
    "asyncio",
    "concurrent",
    "multiprocessing",
    "os.fork",
    "os.forkpty",
    "threading",
    "torch.jit.fork",
    "torch.multiprocessing",
}
_HIDING_MODULES = {
    "code",
    "codeop",
    "importlib.machinery",
    "importlib.util",
    "marshal",
    "os.popen",
    "os.system",
    "pty",
    "runpy",
    "subprocess",
    "torch.jit.CompilationUnit",
}
_PROGRAM = re.compile(r"os\.(exec|spawn|posix_spawn)\w*")
_HIDING = {"exec", "eval", "compile"}
_HIDING |= {f"builtins.{name}" for name in _HIDING}
_WATCHED_PACKAGES = ("torch.", "os.", "importlib.")
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
        if _within(name, _HIDING_MODULES) or _PROGRAM.fullmatch(name):
            yield source.offence(node, HIDDEN_RULE, f"{name} runs code that no check can read")
    for constant, text in source.strings():
        if any(word in text for word in _DEVICE_CODE):
            yield source.offence(constant, KERNEL_RULE, "device code in a string")
    for node in source.nodes:
        message = _hides_code(source, node)
        if message:
            yield source.offence(node, HIDDEN_RULE, message)


def _hides_code(source: Source, node: ast.AST) -> str | None:
    """Say how a node runs or imports code out of sight, or None."""
    if isinstance(node, ast.Assign) and source.dotted(node.value) in _HIDING - {"compile"}:
        return f"{ast.unparse(node.value)} by another name runs code that no check can read"
    if not isinstance(node, ast.Call):
        return None
    called = source.dotted(node.func)
    if called in _HIDING:
        return f"{called}() runs code that no check can read"
    if called in IMPORTERS and not _names_a_module(node):
        return f"{called}() imports what no check can read; give it the module's name as a literal"
    return None


def _names_a_module(call: ast.Call) -> bool:
    """Return whether an import by a function says what it imports, so that the rules see it."""
    name = call.args[0] if call.args else None
    return isinstance(name, ast.Constant) and isinstance(name.value, str)


def _used(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Yield the full names that are imported, and those of the outermost attribute chains."""
    yield from source.imports()
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and not isinstance(source.parent(node), ast.Attribute):
            name = source.dotted(node)
            if name and name.startswith(_WATCHED_PACKAGES):
                yield node, name


def _within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)
