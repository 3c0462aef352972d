"""Trained models as files that run without this package: ONNX, and the programs of `torch.export`."""

from .onnx_file import export_onnx
from .torch_program import export_program


__all__ = ["export_onnx", "export_program"]
