"""What pyproject.toml cannot say: two files of the top folder are installed beside the submission."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: In a checkout they lie at the top, where the benchmark's command lines look for them.
TOP_FILES = ("tuning_search_space.json", "LICENSE")


class BuildWithTopFiles(build_py):
    """Copy the files into the package; an editable install finds them where they are."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if not self.editable_mode:
            for name in TOP_FILES:
                self.copy_file(name, self._installed(name), preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the paths of what is built."""
        copies = [] if self.editable_mode else [self._installed(name) for name in TOP_FILES]
        return [*super().get_outputs(include_bytecode), *copies]

    def _installed(self, name: str) -> str:
        return str(Path(self.build_lib, "submission", name))


setup(cmdclass={"build_py": BuildWithTopFiles})
