"""LV-ViT and token labeling for the Hugging Face ecosystem.

Importing this package registers LV-ViT with the Auto classes of transformers.
"""

import gc
import os
import signal
import sys
import threading
from multiprocessing import parent_process


_first_parent = os.getppid()  # before the libraries, whose import takes seconds: it may be gone by then


def _is_program():
    """Whether this process starts a program of this package, and not one that uses it."""
    name = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    if name == "-m" and "-m" in sys.orig_argv:  # while `python -m` imports the packages around a module
        return sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith(f"{__name__}.")
    return name in ("lvvit", "lvvit.exe", "train_tl.py")


def _end_start(number, frame):
    """Ends a program that Ctrl-C interrupts before its `main` has begun: a line, and the status that shells give."""
    if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
        os.write(2, (b"\n" if os.isatty(2) else b"") + b"lvvit: interrupted\n")
    os._exit(128 + number)


if _is_program() and parent_process() is None and threading.current_thread() is threading.main_thread():
    # before the libraries, whose import takes seconds, a fifth of them to look for garbage, which imports hardly make, and ends with a
    # traceback after Ctrl-C; `launching.end_imports` undoes both
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_start)

from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
    BitImageProcessorPil,
)

from .configuration_lvvit import LVViTConfig  # noqa: E402
from .modeling_lvvit import (  # noqa: E402
    LVViTBackbone,
    LVViTForImageClassification,
    LVViTForSemanticSegmentation,
    LVViTModel,
    LVViTPreTrainedModel,
)


def _register(auto_class, model_class):
    # the first call lets a program that imported this package load by name; the second makes `save_pretrained` write
    # the code next to the weights, for programs that did not
    auto_class.register(LVViTConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)


AutoConfig.register(LVViTConfig.model_type, LVViTConfig, exist_ok=True)
LVViTConfig.register_for_auto_class()
_register(AutoModel, LVViTModel)
_register(AutoModelForImageClassification, LVViTForImageClassification)
_register(AutoBackbone, LVViTBackbone)
_register(AutoModelForSemanticSegmentation, LVViTForSemanticSegmentation)
_processors = {"torchvision": BitImageProcessor, "pil": BitImageProcessorPil}
AutoImageProcessor.register(LVViTConfig, image_processor_classes=_processors, exist_ok=True)

__version__ = "0.1.0"
__all__ = [
    "LVViTBackbone",
    "LVViTConfig",
    "LVViTForImageClassification",
    "LVViTForSemanticSegmentation",
    "LVViTModel",
    "LVViTPreTrainedModel",
]
