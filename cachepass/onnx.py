"""Runs a file of `cachepass.export_onnx` in onnxruntime: state in, state out, call by call."""

from __future__ import annotations

import ast
import contextlib
import json
import operator
import os
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from cachepass.adapters.scheduler import follow
from cachepass.errors import CachePassError, SessionError
from cachepass.export.names import REQUEST
from cachepass.export.onnx_file import METADATA
from cachepass.lowering.rule import where_it_stands

_TYPES: dict[str, tuple[torch.dtype, Any]] = {
    "tensor(float)": (torch.float32, np.float32), "tensor(double)": (torch.float64, np.float64),
    "tensor(float16)": (torch.float16, np.float16), "tensor(int64)": (torch.int64, np.int64),
    "tensor(bool)": (torch.bool, np.bool_),
}  # fmt: skip


class Denoiser(nn.Module):
    """A denoiser out of a file, to be put in a pipeline in the place of its transformer.

    ::

        pipe.transformer = cachepass.onnx.Denoiser("model.onnx", scheduler=pipe.scheduler)

    The scheduler tells requests and steps, `cache_context` the branches. In a loop of one's own
    call `begin_request` and `end_step`, and enter `cache_context` around each call. Computes with
    as many threads as torch is set to.

    Args:
        path: the file.
        scheduler: of the pipeline; it is followed.
        providers: of onnxruntime, in order of preference; its own choice if None.

    Raises:
        CachePassError: no file of `export_onnx`, or onnxruntime cannot run it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        scheduler: Any = None,
        providers: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.session = _load(os.fspath(path), providers)
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text is None:
            raise CachePassError(f"{os.fspath(path)} was not made by cachepass.export_onnx")
        facts = json.loads(text)
        self.config = SimpleNamespace(**facts["config"])
        self.policy: str = facts["policy"]
        self._state: dict[str, str] = facts["state"]
        self._needs_num_steps: bool = facts["needs_num_steps"]
        self._inputs = {i.name: i for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        latent = next(i for i in self._inputs.values() if "float" in i.type)
        dtype, _ = _TYPES[latent.type]
        self.register_buffer("anchor", torch.zeros((), dtype=dtype), persistent=False)
        self.num_steps: int | None = None
        self.step = 0
        self._kept: dict[tuple[str, str], onnxruntime.OrtValue] = {}
        self._branch = ""
        self.reused: list[tuple[int, str, list[str]]] = []
        """(step, branch, sites that all rows reused) of each call of this request."""

        if scheduler is not None:
            follow(scheduler, self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the latent, as diffusers asks for it."""
        dtype: torch.dtype = self.get_buffer("anchor").dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline is to put the inputs."""
        device: torch.device = self.get_buffer("anchor").device
        return device

    def begin_request(self, num_steps: int, told: int | None = None) -> None:
        """Start a request: what was cached is forgotten."""
        self.num_steps, self.step = num_steps, 0
        self._kept.clear()
        self.reused = []

    def expect(self, num_steps: int) -> None:
        """The request has another number of steps than was thought."""
        self.num_steps = num_steps

    def end_step(self, left: int | None = None) -> None:
        """The calls that follow belong to the next step."""
        self.step += 1

    def end_request(self) -> None:
        """What was cached is forgotten."""
        self._kept.clear()

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """The branch of the calls inside."""
        before, self._branch = self._branch, name
        try:
            yield
        finally:
            self._branch = before

    def forward(self, *, return_dict: bool = True, **inputs: Any) -> Any:
        """One denoising call; takes the model's own tensors by name."""
        if self._needs_num_steps and self.num_steps is None:
            raise SessionError(
                f"policy {self.policy} needs the number of steps: give Denoiser the pipeline's "
                "`scheduler`, or call begin_request(num_steps)"
            )
        numbers = where_it_stands(self.step, self.num_steps, self._branch)
        given = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
        given |= {n: torch.tensor(v) for n, v in numbers.items()}
        wanted = {name for name in self._inputs if name not in self._state}
        if given.keys() != wanted:
            raise CachePassError(
                f"the program takes {', '.join(sorted(wanted - numbers.keys()))}; it was given "
                f"{', '.join(sorted(given.keys() - numbers.keys()))}"
            )
        binding = self.session.io_binding()
        alive = [self._bind(binding, name, value) for name, value in given.items()]
        sizes = self._sizes(given)
        for name in self._state:
            binding.bind_ortvalue_input(name, self._value(name, sizes))
        device = alive[0].device.type
        for name in self._outputs:
            binding.bind_output(name, device)
        self.session.run_with_iobinding(binding)
        made = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        for name, new in self._state.items():
            if new in made:
                self._kept[self._key(name)] = made[new]
        sites = sorted(n.removeprefix("reused.") for n in made if n.startswith("reused."))
        reused = [site for site in sites if made[f"reused.{site}"].numpy().all()]
        self.reused.append((self.step, self._branch, reused))
        output = _tensor(made["output"])
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def _bind(self, binding: Any, name: str, value: Tensor) -> Tensor:
        """Hand a tensor over where it lies; returns what has to stay alive until the run."""
        dtype, kind = _TYPES[self._inputs[name].type]
        value = value.detach().to(dtype).contiguous()
        binding.bind_input(
            name, value.device.type, value.device.index or 0, kind, tuple(value.shape),
            value.data_ptr(),
        )  # fmt: skip
        return value

    def _key(self, name: str) -> tuple[str, str]:
        return ("" if name.startswith(f"{REQUEST}.") else self._branch, name)

    def _sizes(self, given: Mapping[str, Tensor]) -> dict[str, int]:
        """What stands in this call for the sizes that the file leaves open, by their names."""
        sizes: dict[str, int] = {}
        for name, value in given.items():
            declared = self._inputs[name].shape
            if len(declared) != value.ndim:
                raise CachePassError(
                    f"{name!r} has the shape {tuple(value.shape)}, the program takes "
                    f"{_shown(declared)}"
                )
            for wanted, size in zip(declared, value.shape, strict=True):
                known = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
                if known != size:
                    raise CachePassError(
                        f"{name!r} has the shape {tuple(value.shape)}, the program takes "
                        f"{_shown(declared)}"
                        + (f" with {wanted} = {known}" if isinstance(wanted, str) else "")
                    )
        return sizes

    def _value(self, name: str, sizes: Mapping[str, int]) -> Any:
        """A tensor of the state: what the last call left, or zeros."""
        key = self._key(name)
        if key not in self._kept:
            declared = self._inputs[name]
            shape = [_evaluate(n, sizes) if isinstance(n, str) else n for n in declared.shape]
            _, kind = _TYPES[declared.type]
            self._kept[key] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind))
        return self._kept[key]


def _load(path: str, providers: list[str] | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Memory of a value that is gone is then taken from the arena, newest first, so it is still in
    # a processor's cache: calls that compute are 2 to 4 % faster, in no more memory (1.31).
    options.enable_mem_reuse = False
    options.log_severity_level = 3  # errors: what it folds away on its way is nobody's concern
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=providers or onnxruntime.get_available_providers()
        )
    except Exception as error:  # its own have no base class but this
        raise CachePassError(
            f"onnxruntime cannot load {path}: {str(error).splitlines()[0]} A type that it has no "
            "kernel for (bfloat16 on a CPU) is avoided by exporting the model in float32 or float16"
        ) from error


_ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def _evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """A size as ONNX spells it, such as ``2*((s20//2))``, for known ones."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
                result: int = _ARITHMETIC[type(op)](value(left), value(right))
                return result
            case ast.Constant(int(number)):
                return number
            case ast.Name(name) if name in sizes:
                return sizes[name]
        raise CachePassError(f"the size {text!r} in the file does not follow from the inputs'")

    return value(ast.parse(text, mode="eval").body)


def _shown(shape: list[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def _tensor(value: Any) -> Tensor:
    """An output as a torch tensor, without a copy where it lies on the host."""
    if value.device_name() == "cpu":
        return torch.from_numpy(value.numpy())
    found: Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
    return found
