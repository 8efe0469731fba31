"""Everything about the package stands in `pyproject.toml`; this file serves tools that still start `setup.py`."""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_py import build_py


class WithoutThisScript(build_py):
    """The root of the repository is the package, so this script lies among its modules. A wheel must not hold it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Leave the script out of the modules of the root."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("upcycle3d", "setup")]


setup(cmdclass={"build_py": WithoutThisScript})
