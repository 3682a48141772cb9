"""From an exported program to a package of AOTInductor."""

from __future__ import annotations

import pathlib

import torch
from torch.export import ExportedProgram

from cachepass.lowering.conditional import equal_outputs, exact_operands


def package(program: ExportedProgram, path: pathlib.Path, metadata: dict[str, str]) -> None:
    """Compile a program into a `.pt2` file, with metadata for its runners."""
    configs = {"aot_inductor.metadata": metadata}
    with exact_operands(), equal_outputs():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )
