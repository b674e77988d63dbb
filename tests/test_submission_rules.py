"""The benchmark's rules, as far as a machine can check them: on bad sources, and on ours."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from official_harness import REPOSITORY, require_harness

from submission.batch_sizes import BATCH_SIZES
from submission.leaderboard.contents import entry_modules, third_party_packages
from submission.leaderboard.folder import requirements_text
from submission.leaderboard.rules import check_folder, check_source, pins
from submission.leaderboard.rules.pins import benchmark_pins, disagreement, normalised
from submission.leaderboard.rules.workload_names import STEMS

MODULES = entry_modules(REPOSITORY)


def rules_broken(text: str, path: str = "entry/file.py") -> list[str]:
    return [offence.rule for offence in check_source(path, text)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.place))
def test_our_own_code_keeps_the_rules(module) -> None:
    assert check_source(str(module.place), module.source.read_text()) == []


def test_there_is_something_to_check() -> None:
    places = {str(module.place) for module in MODULES}
    assert {"submission.py", "batch_sizes.py", "shampoo_core/optimizer.py"} <= places
    assert len(places) > 40


def test_the_entry_needs_nothing_but_what_it_lists() -> None:
    assert set(third_party_packages(MODULES)) <= {"absl", "torch"}
    assert "torch==2.5.1" in requirements_text(third_party_packages(MODULES))


@pytest.mark.parametrize(
    "text",
    [
        'if workload_name == "wmt": lr = 1',
        'NAMES = {"imagenet_resnet": 3}',
        'path = f"{root}/librispeech"',
        "def is_ogbg(workload): ...",
        "criteo_rate = 0.1",
        "from .wmt import rate",
        "rate = table.fastmri",
        "f(mnist=1)",
        'name = b"cifar"',
        "kind = type(workload)",
        "kind = workload.__class__.__name__",
        "kind = self.workload.__module__",
        "if isinstance(workload, Other): ...",
        "vars(workload)",
        "kind = str(workload)",
        "kind = repr(self._workload)",
        'kind = f"{workload!r:>9}"',
        'kind = "%s of %d" % (workload, 1)',
        'kind = "{}".format(workload)',
        'kind = getattr(workload, "__class__")',
        "kind = workload.__repr__()",
        "import inspect\nplace = inspect.getmodule(workload)",
        "task = workload\nkind = type(task)",
        "class A:\n    def f(self, workload): self.task = workload\n    def g(self): return str(self.task)",
        "if workload.step_hint == 10_666: ...",
        'rare = workload.target_metric_name in ("x", "y")',
    ],
)
def test_a_workload_named_or_told_apart(text: str) -> None:
    assert set(rules_broken(text)) == {"workload-name"}


def test_names_may_stand_in_the_batch_size_table_and_nowhere_else_in_its_file() -> None:
    table = '"""Sizes."""\nBATCH_SIZES: dict[str, int] = {"wmt": 128}\n'
    assert rules_broken(table, "entry/batch_sizes.py") == []
    assert rules_broken(table, "entry/other.py") == ["workload-name"]
    assert rules_broken(table + 'x = "wmt"', "entry/batch_sizes.py") == ["workload-name"]
    assert rules_broken('RATES = {"wmt": 1}', "entry/batch_sizes.py") == ["workload-name"]


@pytest.mark.parametrize(
    "text",
    [
        '"""Works on wmt too."""\ndef f():\n    """As found on ogbg."""\n',
        "def get_batch_size(workload_name): return table[workload_name]",
        "steps = workload.step_hint; kind = type(workload.loss_type)",
        "# tuned on imagenet\nx = 1",
        'text = f"{workload.step_hint} steps"; share = 7 % workload.step_hint',
        'log("%s", workload); last = name.format(workload=1); text = str(workload_name)',
        "if workload.step_hint > 1000 and workload.loss_type == spec.LossType.A: ...",
        "if workload.metrics_logger is None or workload.count == 1: ...",
        'logger = getattr(workload, "metrics_logger", None)',
    ],
)
def test_what_names_no_workload_in_its_code(text: str) -> None:
    assert rules_broken(text) == []


def test_every_workload_name_is_recognised() -> None:
    assert all(any(stem in name for stem in STEMS) for name in BATCH_SIZES)


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nname = sys.argv",
        "from sys import argv",
        "import sys\nsys._getframe(1).f_locals",
        "import sys\nnames = [name for name in sys.modules]",
        "import inspect\ninspect.stack()",
        "import gc\ngc.get_objects()",
        "import __main__",
        "from absl import flags\nname = flags.FLAGS.workload",
        'from absl import flags\nname = flags.FLAGS["data_dir"].value',
        "from absl import flags\nvalues = flags.FLAGS\nvalues.flag_values_dict()",
        "from absl.flags import FLAGS\nname = FLAGS.experiment_dir",
        'open("/proc/self/cmdline")',
    ],
)
def test_a_look_around_for_the_workload(text: str) -> None:
    assert set(rules_broken(text)) == {"surroundings"}


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.modules[type(x).__module__]; sys.modules.get(name); sys.maxsize",
        "import gc, inspect\ngc.collect(); inspect.signature(f)",
        'from absl import flags\nvalues = flags.FLAGS\nsaved = values["save_checkpoints"].value',
        "args.workload_path; self.argv",
    ],
)
def test_what_does_not_look_around(text: str) -> None:
    assert rules_broken(text) == []


@pytest.mark.parametrize(
    "text",
    [
        'import os\nos.environ["NCCL_ALGO"] = "Ring"',
        'import os\ndel os.environ["A"]',
        'import os as system\nsystem.environ.update(A="1")',
        'import os\nos.environ.setdefault("A", "1")',
        'import os\nos.putenv("A", "1")',
        'from os import environ\nenviron["A"] = "1"',
        'import os\nenv = os.environ\nenv["A"] = "1"',
        'import os\ngetattr(os, "environ").pop("A")',
        "import os\nchange(os.environ)",
        'import os\nos.environ |= {"A": "1"}',
        'from os import *\nputenv("A", "1")',
        'import posix\nposix.putenv("A", "1")',
        'import os\nvars(os)["environ"]["A"] = "1"',
        'import os\nos.__dict__["environ"]["A"] = "1"',
        'import os\nsetattr(os, "environ", {})',
    ],
)
def test_an_environment_variable_set(text: str) -> None:
    assert set(rules_broken(text)) == {"environment"}


@pytest.mark.parametrize(
    "text",
    [
        'import os\nrank = os.environ["RANK"]',
        'import os\nrank = os.environ.get("RANK", "0")',
        'import os\nrank = os.getenv("RANK")',
        'import os\nif "RANK" in os.environ: ...',
        "class Place:\n    environ = 1\nplace.environ = 2",
    ],
)
def test_an_environment_variable_read(text: str) -> None:
    assert rules_broken(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch._inductor",
        "import torch._inductor.config as config",
        "from torch._dynamo import config",
        "from torch.utils._pytree import tree_map",
        "from torch import _C",
        "import torch\ntorch._inductor.config.max_autotune = True",
        "import torch\ntorch._C._set_x(1)",
        "import torch.distributed as dist\ndist._all_gather_base(a, b)",
        "from torch import distributed\ndistributed.distributed_c10d._rank",
        "import torch\nlibrary = torch\nlibrary._dynamo.reset()",
        'import torch\ngetattr(torch, "_dynamo")',
        'import importlib\nimportlib.import_module("torch._dynamo")',
        '__import__("torch._dynamo")',
        'NAME = "torch._inductor.config"',
        "from torch import nn\nnn.Module._call_impl",
    ],
)
def test_what_is_private_to_torch(text: str) -> None:
    assert set(rules_broken(text)) == {"private-torch"}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._foreach_mul_(a, b)",
        "import torch\ntorch.__version__",
        "import torch\nclass A(torch.nn.Module):\n    def f(self): return self._x",
        "from torch import nn\nmodel._orig_mod",
        "from ._inner import f",
        "import torch\ny = torch.zeros(1)\ny._x",
    ],
)
def test_what_is_not_private_to_torch(text: str) -> None:
    assert rules_broken(text) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("import triton", "kernel"),
        ("import triton.language as tl", "kernel"),
        ("from torch.utils import cpp_extension", "kernel"),
        ("from torch.utils.cpp_extension import load_inline", "kernel"),
        ("import torch\ntorch.utils.cpp_extension.load(name)", "kernel"),
        ("import torch\ntorch.ops.load_library(path)", "kernel"),
        ("import ctypes", "kernel"),
        ("import cupy", "kernel"),
        ("from numba import cuda", "kernel"),
        ('SOURCE = "__global__ void add(float* a)"', "kernel"),
        ("exec(text)", "hidden-code"),
        ("x = eval(text)", "hidden-code"),
        ("import builtins\nbuiltins.exec(text)", "hidden-code"),
        ("run = exec\nrun(text)", "hidden-code"),
        ("import importlib\nimportlib.import_module(name)", "hidden-code"),
        ("from importlib import import_module as load\nload('tor' + 'ch')", "hidden-code"),
        ("__import__(name)", "hidden-code"),
        ("from importlib import util", "hidden-code"),
        ("import runpy", "hidden-code"),
        ("import subprocess", "hidden-code"),
        ("from subprocess import run", "hidden-code"),
        ("import os\nos.system(command)", "hidden-code"),
        ("from os import popen", "hidden-code"),
        ("import os\nos.execvp(name, [])", "hidden-code"),
        ("import os\nos.posix_spawn(name, [], {})", "hidden-code"),
        ("import torch\ntorch.jit.CompilationUnit(text)", "hidden-code"),
        ("import os\nos.fork()", "background-work"),
        ("import torch\ntorch.jit.fork(f)", "background-work"),
        ("import threading", "background-work"),
        ("from concurrent.futures import ThreadPoolExecutor", "background-work"),
        ("import torch.multiprocessing as mp", "background-work"),
    ],
)
def test_kernels_hidden_code_and_threads(text: str, rule: str) -> None:
    assert set(rules_broken(text)) == {rule}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nstep = torch.compile(step)\nmodel.eval()",
        "import torch\nstream = torch.cuda.Stream()",
        "import re\npattern = re.compile('x')",
        "from re import compile\npattern = compile('x')",
        "import importlib\nimportlib.import_module('numpy')",
        "from importlib import metadata\nmetadata.version('torch')",
        "import os\nos.path.exists(os.getcwd()); os.cpu_count()",
        "from .code import f\nself.compile = compile",
    ],
)
def test_what_is_no_kernel_and_not_hidden(text: str) -> None:
    assert rules_broken(text) == []


@pytest.mark.parametrize(
    ("requirement", "agrees"),
    [
        ("torch==2.5.1", True),
        ("torch", True),
        ("torch>=2.5.1", True),
        ("torch>=2.5,<3", True),
        ("torch~=2.5.0", True),
        ("torch==2.5.*", True),
        ("absl_py==2.1.0", True),
        ("numpy>=2.0.2", True),
        ("numpy>=1.26", True),
        ("torch==2.6.0", False),
        ("torch>2.5.1", False),
        ("torch~=2.4", True),
        ("torch~=2.0", True),
        ("torch!=2.4.*", True),
        ("torch~=2.6", False),
        ("torch~=2.4.0", False),
        ("torch==2.0.*", False),
        ("torch==2.5.0.*", False),
        ("torch!=2.5.*", False),
        ("torch!=2.5.1", False),
        ("torch<2.5.1", False),
        ("Torch [x] == 2.4.0", False),
        ("numpy==1.26.4", False),
        ("numpy>=2.3", False),
        ("numpy<2", False),
        ("jax==0.4.1", False),
        ("torch @ git+https://example.org/torch", False),
        ("-r other.txt", False),
        ("torch newest", False),
    ],
)
def test_a_pin_against_the_benchmarks(requirement: str, agrees: bool) -> None:
    assert (disagreement(requirement) is None) is agrees


def test_a_package_of_ones_own_needs_a_reason() -> None:
    text = "einops==0.8.0\n\neinops==0.8.0  # reshapes\n# reshapes\neinops==0.8.0\n# torch==1.0\n"
    offences = list(pins.check("requirements.txt", text))
    assert [(offence.line, offence.rule) for offence in offences] == [(1, "pin")]


def test_our_package_asks_for_nothing_that_the_benchmark_has_not() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = [normalised(re.split(r"[<>=]", text)[0]) for text in project["dependencies"]]
    assert names
    assert set(names) <= benchmark_pins().keys()
    assert [text for text in project["dependencies"] if disagreement(text)] == []


def test_the_image_has_the_benchmarks_pins() -> None:
    lines = (REPOSITORY / "docker" / "constraints.txt").read_text().splitlines()
    image = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    image = {normalised(name): version for name, version in image.items()}
    exact = {name: clause[2:] for name, clause in benchmark_pins().items() if clause[:2] == "=="}
    assert len(exact) > 20
    assert {name: image[name] for name in exact} == exact


@pytest.mark.harness
def test_the_pins_are_those_of_the_harness() -> None:
    project = tomllib.loads((require_harness().checkout / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = {"full", "pytorch_cpu", "pytorch_gpu", "jax_cpu", "jax_core_deps"}
    ours |= set(re.findall(r"\w+", extras["full"][0])) - {"algoperf"}
    lines = [*project["dependencies"], *(line for name in ours for line in extras[name])]
    parsed = (re.fullmatch(r"([\w-]+)((?:==|>=).*)", line) for line in lines)
    assert {normalised(m[1]): m[2] for m in parsed if m} == benchmark_pins()


def test_a_folder_is_checked_whole(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "submission.py").write_text("import torch\n")
    (tmp_path / "core" / "rates.py").write_text("\nimport triton\n")
    (tmp_path / "core" / "fast.cu").write_text("")
    (tmp_path / "requirements.txt").write_text("torch==2.4.0\n")
    (tmp_path / "notes.json").write_text(json.dumps({"wmt": 1}))
    places = [str(offence).split(": ")[0] for offence in check_folder(tmp_path)]
    assert places == ["core/fast.cu:0", "core/rates.py:2", "requirements.txt:1"]
