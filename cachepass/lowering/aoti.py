"""From an exported program to a package of AOTInductor."""

from __future__ import annotations

import pathlib

import torch
from torch.export import ExportedProgram

from cachepass.lowering.conditional import exact_operands


def package(program: ExportedProgram, path: pathlib.Path) -> None:
    """Compile a program into a `.pt2` file."""
    with exact_operands():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
