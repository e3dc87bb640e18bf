"""Environments in which the released layers of others import on a machine without a GPU. Nothing of them is installed elsewhere.

One environment has what all releases need; a folder for each release has the package itself and the versions that its own metadata
names. Packages are taken without their dependencies where those would bring CUDA builds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attrs

COMMON = (
    *(
        "numpy",
        "pyzmq",
        "msgspec",
        "orjson",
        "psutil",
        "pybase64",
        "requests",
        "packaging",
        "pillow",
        "fastapi",
        "aiohttp",
        "ipython",
    ),
    *("triton", "apache-tvm-ffi==0.1.11", "dill", "sentencepiece", "loguru", "gguf", "prometheus_client", "openai"),
    *("partial-json-parser", "einops", "setproctitle", "uvicorn", "attrs", "transitions"),
)
TORCH = "torch==2.13.0"  # the CPU build; the releases pin CUDA ones, which these modules do not need
WITHOUT_DEPENDENCIES = ("compressed-tensors==0.18.0",)


@attrs.frozen
class Release:
    """One release and the version of transformers that it imports with, as its metadata names it."""

    package: str
    version: str
    transformers: str


SGLANG = (
    Release("sglang", "0.5.11", "5.6.0"),
    Release("sglang", "0.5.12", "5.6.0"),
    Release("sglang", "0.5.13", "5.8.1"),
    Release("sglang", "0.5.23", "5.19.0"),
)


def prepare(folder: Path, releases: tuple[Release, ...]) -> Path:
    """Install what is not there yet. Returns the interpreter; raises CalledProcessError with pip's own words."""
    base = folder / "base"
    python = base / "bin" / "python"
    if not (base / ".ready").exists():
        _run([sys.executable, "-m", "venv", str(base)])
        _pip(python, TORCH)
        _pip(python, *COMMON)
        _pip(python, "--no-deps", *WITHOUT_DEPENDENCIES)
        (base / ".ready").touch()
    for release in releases:
        target = path_of(folder, release)
        if not (target / ".ready").exists():
            _pip(python, "--target", str(target), f"transformers=={release.transformers}")
            _pip(python, "--target", str(target), "--no-deps", f"{release.package}=={release.version}")
            (target / ".ready").touch()
    return python


def path_of(folder: Path, release: Release) -> Path:
    return folder / f"{release.package}-{release.version}"


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, timeout=1_800)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), SGLANG)
