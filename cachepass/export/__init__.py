"""Programs that leave home: torch.export, ONNX, AOTInductor (docs/export.md)."""

from __future__ import annotations

from cachepass.export.aoti_package import export_aoti
from cachepass.export.onnx_file import export_onnx
from cachepass.export.program import export

__all__ = ["export", "export_aoti", "export_onnx"]
