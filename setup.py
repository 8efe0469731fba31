"""Everything about the package stands in `pyproject.toml`; this file serves tools that still start `setup.py`."""

from setuptools import setup

setup()
