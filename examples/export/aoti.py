"""A cached denoiser as a package of AOTInductor, run by a program in C++.

    python -m examples.export.aoti

Builds the program in `cpp/` against the installed torch (CMake and a C++ compiler; a minute),
compiles the package, and compares what comes out with the pipeline under `cachepass.compile`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import cachepass
from examples.export.request import Request, generate, listen, relative
from examples.shapes.pipeline import GUIDANCE_SCALE, build_pipeline

SOURCE = Path(__file__).with_name("cpp")
PROMPT = "red disc bounce plain"
POLICY = "mixcache"


def build(folder: Path) -> Path:
    """Compile `cpp/` into a folder; returns the program."""
    # The one that was installed with the project, beside the interpreter, before any other.
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        raise SystemExit("CMake is not installed: pip install cmake")
    prefix = torch.utils.cmake_prefix_path
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefix}"]
    for command in (
        [cmake, "-S", str(SOURCE), "-B", str(folder), *options],
        [cmake, "--build", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return folder / "denoise"


def run(program: Path, package: Path, request: Request, folder: Path) -> torch.Tensor:
    """Denoise in the C++ program."""
    inputs, output = folder / "inputs.pt", folder / "output.pt"
    tensors = {"hidden_states": request.noise, "sigmas": request.sigmas, **request.texts}
    torch.save(tensors, inputs)
    command = [program, package, inputs, output, GUIDANCE_SCALE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    latent: torch.Tensor = torch.load(output)
    return latent


def main() -> None:
    """Runs the example."""
    pipe: Any = build_pipeline("small")
    request = listen(pipe, PROMPT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("building the C++ program ...")
        program = build(folder / "build")
        print("compiling the package (a minute or two) ...")
        package = folder / "shapes.pt2"
        cachepass.export_aoti(pipe.transformer, request.call(), package, policy=POLICY)
        started = time.perf_counter()
        latent = run(program, package, request, folder)
        print(f"C++: {time.perf_counter() - started:.1f} s, loading included")
    wanted = generate(cachepass.compile(pipe, policy=POLICY, inner="eager"), PROMPT)
    print(f"distance to the pipeline under cachepass.compile: {relative(latent, wanted):.1e}")


if __name__ == "__main__":
    main()
