"""Trained models as files that run without this package: ONNX, and the programs of `torch.export`."""

from .folder import ExportSettings, export_folder
from .onnx_file import export_onnx
from .torch_program import export_program


__all__ = ["ExportSettings", "export_folder", "export_onnx", "export_program"]
