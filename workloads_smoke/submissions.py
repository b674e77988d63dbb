"""Load a submission from the path of its Python file, as it stands.

The official runner imports `a/b/submission.py` as the module `a.b.submission` from the working
directory. We do the same from the file's own root, wherever the working directory is: the first
folder above it that is not a package, or whose name belongs to another one. So relative imports,
imports from the root, and imports of what lies beside the file all resolve.
"""

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from workloads_smoke import algoperf_standin
from workloads_smoke.errors import UserError

REQUIRED_FUNCTIONS = ("init_optimizer_state", "update_params", "data_selection", "get_batch_size")

# What the benchmark gives its functions: arguments by place, and arguments by name.
_OF_A_STEP = (
    "workload",
    "current_param_container",
    "current_params_types",
    "model_state",
    "hyperparameters",
    "loss_type",
    "optimizer_state",
    "eval_results",
    "global_step",
    "rng",
)
_BY_PLACE = {
    "init_optimizer_state": (
        "workload",
        "model_params",
        "model_state",
        "hyperparameters",
        "rng",
    ),
    "data_selection": (
        "workload",
        "input_queue",
        "optimizer_state",
        "current_param_container",
        "model_state",
        "hyperparameters",
        "global_step",
        "rng",
    ),
    "get_batch_size": ("workload_name",),
    "get_eval_batch_size": ("workload_name",),
}
_BY_NAME = {"update_params": (*_OF_A_STEP, "batch"), "prepare_for_eval": _OF_A_STEP}

_JAX_PACKAGES = {"jax", "flax", "optax", "chex", "jraph"}

# How far above the file the root of absolute imports such as `submissions.self_tuning.x.y` may lie.
_NUM_ANCESTORS = 4


@dataclass(frozen=True)
class Submission:
    """The functions of a submission.

    Attributes:
        path: The file they come from.
        init_optimizer_state: Builds the optimizer state.
        update_params: One training step.
        data_selection: Takes the batches of a step from the queue.
        get_batch_size: Global batch size by workload name.
        prepare_for_eval: Readies model and optimizer for an evaluation, or None.
        get_eval_batch_size: Evaluation batch size by workload name, or None.
        wants_train_state: Whether `update_params` has a parameter `train_state`.
        sha256: Of the file's content, not of what it imports.
    """

    path: Path
    init_optimizer_state: Callable[..., Any]
    update_params: Callable[..., Any]
    data_selection: Callable[..., Any]
    get_batch_size: Callable[[str], int]
    prepare_for_eval: Callable[..., Any] | None
    get_eval_batch_size: Callable[[str], int] | None
    wants_train_state: bool
    sha256: str = ""


def load_submission(path: Path) -> Submission:
    """Import a submission file.

    Args:
        path: A Python file with the submission functions.

    Returns:
        Its functions.

    Raises:
        UserError: There is no such file, it does not import, it lacks a function, or has one that
            does not take the benchmark's arguments; the message says which.
    """
    if path.suffix != ".py":
        raise UserError(f"--submission_path must be a Python file (*.py), got {path}")
    if not path.is_file():
        raise UserError(f"--submission_path: there is no file {path}")
    algoperf_standin.install_if_needed()
    module = _import_file(Path(os.path.abspath(path)))
    content = path.read_bytes()
    missing = [name for name in REQUIRED_FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise UserError(f"submission {path} lacks the function {', '.join(missing)}")
    _check_arguments(module, path)
    return Submission(
        path=path,
        init_optimizer_state=module.init_optimizer_state,
        update_params=module.update_params,
        data_selection=module.data_selection,
        get_batch_size=module.get_batch_size,
        prepare_for_eval=getattr(module, "prepare_for_eval", None),
        get_eval_batch_size=getattr(module, "get_eval_batch_size", None),
        wants_train_state="train_state" in inspect.signature(module.update_params).parameters,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _check_arguments(module: ModuleType, path: Path) -> None:
    """Refuse a function that could not be called, before data are made and a model is built."""
    for name in (*_BY_PLACE, *_BY_NAME):
        by_place, by_name = _BY_PLACE.get(name, ()), _BY_NAME.get(name, ())
        function = getattr(module, name, None)
        if not callable(function):
            continue
        try:
            # Around a function that is wrapped there may be one that adds arguments.
            signature = inspect.signature(function, follow_wrapped=False)
        except ValueError:  # compiled, it does not tell
            continue
        if name == "update_params" and "train_state" in signature.parameters:
            by_name += ("train_state",)
        try:
            signature.bind(*by_place, **dict.fromkeys(by_name))
        except TypeError as error:
            how = "by name" if by_name else "by place"
            raise UserError(
                f"submission {path}: {name}{signature} cannot be called: {error}; the benchmark gives "
                f"{', '.join(by_place + by_name)}, {how}"
            ) from error


def _import_file(path: Path) -> ModuleType:
    """Import a file under its dotted name below its root."""
    root = _root(path)
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    # The root goes first, so that the file itself is found under its name; what is added for other
    # people's absolute imports goes last, so that it hides nothing.
    sys.path.insert(0, str(root))
    sys.path += [str(folder) for folder in list(path.parents)[:_NUM_ANCESTORS] if folder != root]
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    # Whatever a foreign file raises on import is the caller's to know, in one line; so is that it left.
    except (Exception, SystemExit) as error:
        raise UserError(f"submission {path} does not import: {_describe(error)}") from error
    if module.__file__ is None or not path.samefile(module.__file__):
        raise UserError(
            f"submission {path} does not import: its name {name!r} already belongs to "
            f"{module.__file__}; rename the file or its folder"
        )
    return module


def _root(path: Path) -> Path:
    """The highest folder above a file from which Python can reach it by a dotted name.

    A checkout of the harness may be a package itself, in a folder that is called `algoperf` as the
    package inside it is: a name that belongs to something else is no way to the file.
    """
    root = folder = path.parent
    while (folder / "__init__.py").exists() and folder.name.isidentifier():
        if not _is_taken(folder):
            root = folder.parent
        folder = folder.parent
    return root


def _is_taken(package: Path) -> bool:
    """Whether the name of a package's folder already belongs to a module from elsewhere."""
    module = sys.modules.get(package.name)
    return module is not None and str(package) not in getattr(module, "__path__", [])


def _describe(error: Exception | SystemExit) -> str:
    """The error and the last line of source that led to it."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    sources = [frame for frame in frames if not frame.filename.startswith("<")]
    place = f" ({sources[-1].filename}:{sources[-1].lineno})" if sources else ""
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = "; install what the submission requires"
        if (error.name or "").split(".")[0] in _JAX_PACKAGES:
            hint += " (a submission in JAX does not run here, only one in PyTorch)"
    return f"{type(error).__name__}: {error}{place}{hint}"
