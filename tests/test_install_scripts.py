"""The scripts that the image is built with, run with stubs for everything they call."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from official_harness import REPOSITORY

DOCKER = REPOSITORY / "docker"

STUB = """#!/bin/sh
test "$PWD" -ef . || exit 3  # a folder that was deleted
echo "${0##*/} $*" >> '{log}'
"""


@pytest.mark.parametrize("python", ["of the base", "packaged", "from source"])
def test_the_system_script_installs_python_whatever_the_base_has(
    python: str, tmp_path: Path
) -> None:
    """With stubs for all that it calls, below another root."""
    stubs, log = tmp_path / "stubs", tmp_path / "calls.txt"
    stubs.mkdir()
    candidate = "3.11.2-6" if python == "packaged" else "3.11.0~rc1-1"
    bodies = {
        "apt-get": "",
        "apt-cache": f"echo '  Candidate: {candidate}'\n",
        "wget": f"mkdir -p '{tmp_path}/tmp/Python-3.11.10'\ntouch Python-3.11.10.tgz\n"
        f"printf '#!/bin/sh\\n' > '{tmp_path}/tmp/Python-3.11.10/configure'\n"
        f"chmod +x '{tmp_path}/tmp/Python-3.11.10/configure'\n",
        "tar": "",
        "make": "",
        "python3.11": "",
    }
    if python != "of the base":
        copy = f'cp "{stubs}/pip" "{stubs}/python3.11"'
        install = f'case "$*" in *python3.11-venv*|altinstall) {copy};; esac\n'
        bodies["make"] = bodies["apt-get"] = install
        del bodies["python3.11"]
    for name, body in {**bodies, "pip": ""}.items():
        (stubs / name).write_text(STUB.replace("{log}", str(log)) + body)
        (stubs / name).chmod(0o755)
    script = (DOCKER / "install_system.sh").read_text()
    quoted = str(tmp_path).replace(" ", "\\ ")
    script = re.sub(r"/opt/venv/bin|/tmp|/var/lib", lambda found: quoted + found[0], script)
    (tmp_path / "opt/venv").mkdir(parents=True)
    (tmp_path / "opt/venv/bin").symlink_to(stubs)
    (tmp_path / "tmp").mkdir()
    # The machine's own tools, but not its Python.
    for name in ("awk", "chmod", "cp", "mkdir", "nproc", "rm", "touch"):
        (stubs / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        env={
            "PATH": str(stubs),
            "EXTRA_APT_PACKAGES": "one two",
            "PYTHON_VERSION": "3.11.10",
            "PIP_VERSION": "24.3.1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert calls[-1] == "pip install --no-cache-dir pip==24.3.1"
    assert ("make altinstall" in calls) == (python == "from source")
    assert any("python3.11-venv" in call for call in calls) == (python == "packaged")
    assert not list((tmp_path / "tmp").iterdir())
