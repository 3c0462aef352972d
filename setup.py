"""Packaging of `modeling_lvvit`: pins, extras and the data files inside the package."""

from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "modeling_lvvit" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

# Lower bounds: transformers 5.19 is the first release whose Trainer lets a subclass say that its own loss is not yet
# divided by the accumulation count (`loss_is_scaled_for_ga`). Upper bounds: next major release.
INSTALL_REQUIRES = [
    "accelerate>=1.12,<2",
    "datasets>=5.1,<6",  # shuffles streams in another order than before: a run continued over that change would read other images
    "evaluate>=0.4.6,<0.5",
    "filelock>=3.13",
    "huggingface-hub>=1.31,<3",
    "matplotlib>=3.9,<4",
    "numpy>=2.0,<3",
    "pandas>=2.2.2",  # index of keys; `datasets` needs it too
    "pillow>=11.3,<13",  # the first with AVIF; 13 is not yet allowed by gradio either, and resizes thin boxes to other pixels (tests/data/decoding/test_crops.py)
    "psutil>=5.9.0",
    "pyarrow>=26",  # reads Parquet lists of a fixed size some of which are missing, of label sets
    "PyYAML>=6.0,<7",
    "safetensors>=0.8,<1",
    "scikit-learn>=1.6,<2",  # `evaluate` computes with it, and the embedded digits come from it
    "scipy>=1.13",  # intervals of the study
    "shtab>=1.11,<2",  # shell completion
    "tensorboard>=2.18,<3",  # logs of training runs
    "timm>=1.0.26,<2",  # loads safetensors of local folders, and builds all networks without memory; annotators, operations of RandAugment
    "torch>=2.11,<3",
    "torchvision>=0.26,<1",
    "transformers>=5.19,<6",
]
DEMO = ["gradio>=6,<7"]
# Regions of JPEG files. Not in the default install: 25 MB, a young version, none for macOS, and a gain of a sixth for images of 500 x 375.
FAST = ['nvidia-nvimgcodec-cu13>=0.9,<1; sys_platform != "darwin"']
# onnxscript: before 0.7.1, files for images of any size were wrong for those of a single row or column of patches
EXPORT = ["onnx>=1.19,<2", "onnxruntime>=1.22,<2", "onnxscript>=0.7.1,<1"]
EXTRAS_REQUIRE = {
    "demo": DEMO,
    "export": EXPORT,
    "fast": FAST,
    "dev": [
        "pytest>=8.4,<10",
        "pytest-xdist>=3.7,<4",
        "ruff>=0.14,<1",
        "parameterized>=0.9,<1",
        *DEMO,
        *EXPORT,
        *FAST,
    ],
}

DATA_FOLDERS = ("accelerate_configs", "card_templates", "demo/static", "recipes", "segmentation/recipes")

setup(
    name="modeling-lvvit",
    version=VERSION,
    description="LV-ViT and token labeling for the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["modeling_lvvit", "modeling_lvvit.*"]),
    py_modules=["train_tl"],
    entry_points={"console_scripts": ["lvvit = modeling_lvvit.cli.command:main"]},
    package_data={"modeling_lvvit": [f"{folder}/**/*" for folder in DATA_FOLDERS]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
