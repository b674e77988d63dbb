"""Lets submissions import what they know from the official harness, where it is not installed.

PyTorch submissions import `spec` and `pytorch_utils.pytorch_setup`, from `algoperf` or from its former
name `algorithmic_efficiency`. These names, and `random_utils`, become importable modules; where the
real package is installed it stays in charge, and only the former name is added.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

from workloads_smoke import distributed, randomness, spec

_FORMER_NAME = "algorithmic_efficiency"


def install_if_needed() -> list[str]:
    """Register the modules; calling it again changes nothing.

    Returns:
        Names of the packages that are stood in for, empty if the real ones are installed.
    """
    packages = [
        name
        for name in ("algoperf", _FORMER_NAME)
        if name not in sys.modules and not spec.harness_installed(name)
    ]
    for package in packages:
        _install(package)
    return packages


def _install(package: str) -> None:
    """Put a package and its modules into `sys.modules`."""
    root = _module(package, "Stand-in of the AlgoPerf harness; see workloads_smoke.", {})
    root.__path__ = []  # makes it a package, so that `import algoperf.x` says what is missing
    contents: dict[str, dict[str, Any]] = {
        "spec": {name: getattr(spec, name) for name in spec.__all__},
        "pytorch_utils": {
            "pytorch_setup": distributed.pytorch_setup,
            "pytorch_init": distributed.pytorch_init,
            "sync_ddp_time": distributed.sync_ddp_time,
        },
        "random_utils": {
            "PRNGKey": randomness.PRNGKey,
            "split": randomness.split,
            "fold_in": randomness.fold_in,
        },
    }
    for name, members in contents.items():
        setattr(root, name, _module(f"{package}.{name}", f"Stand-in of algoperf.{name}.", members))


def _module(name: str, docstring: str, members: dict[str, Any]) -> ModuleType:
    """A registered module with the given members."""
    module = ModuleType(name, docstring)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    vars(module).update(members)
    sys.modules[name] = module
    return module
