"""For toolchains that start here; pyproject.toml says everything."""

from setuptools import setup

setup()
