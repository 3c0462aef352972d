"""The common model tests of transformers, run on LV-ViT.

The tests are read from the source distribution of the installed transformers version: from the folder that the
environment variable `TRANSFORMERS_TESTS` names (an extracted `transformers-X.Y.Z`), else from a copy that is downloaded
once into the user's cache. `PipelineTesterMixin` is left out: it needs files that the distribution lacks, and it tests
only models which the library's authors have put on the Hub.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from modeling_lvvit import (
    LVViTBackbone,
    LVViTConfig,
    LVViTForImageClassification,
    LVViTForSemanticSegmentation,
    LVViTModel,
)
from modeling_lvvit.modeling_lvvit import LVViTPatchEmbeddings


PACKAGE_ALIAS = "transformers_common_tests"  # their package is called `tests`, like this folder
DOWNLOAD_TIMEOUT = 300  # seconds

# Any values do that differ from the defaults of `PreTrainedConfig`.
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["LVViTForImageClassification"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
# The common tests import these modules, which a source distribution leaves out. Export and text generation are then
# not tested; the configuration tests run with the values above.
STAND_INS = {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils": {},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
}


def download_tests(folder: Path) -> None:
    """Fills `folder` with `tests/` of the source distribution of the installed transformers version.

    Raises:
        OSError, ValueError, subprocess.SubprocessError, tarfile.TarError: If it cannot be downloaded or stored.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    requirement = ["--no-binary", "transformers", f"transformers=={transformers.__version__}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # filled next to its final place and then renamed, so that an interrupted run leaves no half copy
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [*pip, "--dest", temporary, *requirement]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
        (archive,) = Path(temporary).glob("*.tar.gz")
        unpacked = Path(temporary) / "unpacked"
        (unpacked / "tests").mkdir(parents=True)
        with tarfile.open(archive) as tar:
            # only plain files directly under tests/, by their last name: nothing in an archive can point elsewhere
            for member in tar.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                    (unpacked / "tests" / parts[2]).write_bytes(tar.extractfile(member).read())
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # where it is, another process was faster
                raise


def find_tests() -> Path:
    """Folder with the common tests; where it can neither be found nor downloaded, this module is skipped.

    Raises:
        FileNotFoundError: If `TRANSFORMERS_TESTS` names a folder without them.
    """
    given = os.environ.get("TRANSFORMERS_TESTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvvit-tests"
    folder = Path(given) if given else cache / f"transformers-{transformers.__version__}"
    if not given and not folder.is_dir():
        try:
            download_tests(folder)
        except (OSError, ValueError, subprocess.SubprocessError, tarfile.TarError) as error:
            detail = str(getattr(error, "stderr", None) or error).strip().rpartition("\n")[2]
            pytest.skip(
                f"the source distribution of transformers {transformers.__version__} could not be downloaded "
                f"({detail}); set TRANSFORMERS_TESTS to an extracted one",
                allow_module_level=True,
            )
    if not (folder / "tests" / "test_modeling_common.py").is_file():
        raise FileNotFoundError(
            f"No tests/test_modeling_common.py in {folder}: expected an extracted `transformers-X.Y.Z.tar.gz`."
        )
    return folder / "tests"


def import_common_tests(folder: Path) -> tuple[types.ModuleType, ...]:
    """Imports the backbone, configuration and model tests of `folder` as one package of another name."""
    package = types.ModuleType(PACKAGE_ALIAS)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE_ALIAS] = package
    for name, attributes in STAND_INS.items():
        module = types.ModuleType(f"{PACKAGE_ALIAS}.{name}")
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[module.__name__] = module
    names = [f"{PACKAGE_ALIAS}.test_{subject}_common" for subject in ("backbone", "configuration", "modeling")]
    # the configuration tests ask for the library as it lies in its own repository, and then make no use of it
    repository = mock.patch("transformers.utils.direct_transformers_import", return_value=transformers)
    with repository, warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # their marks are not ours
        return tuple(importlib.import_module(name) for name in names)


backbone_common, configuration_common, modeling_common = import_common_tests(find_tests())


class LVViTModelTester:
    """The tiny configuration and inputs that the common tests ask for; they read the attributes too."""

    batch_size = 6
    image_size = (16, 24)  # height, width
    patch_size = 8
    seq_length = 1 + 2 * 3  # class token and the patches of a grid with 2 rows and 3 columns
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 5
    is_training = True

    def get_config(self) -> LVViTConfig:
        return LVViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            stem_hidden_size=9,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            drop_path_rate=0.1,
            num_labels=self.num_labels,
            segmentation_stages=["stem", "stage1", "stage2", "stage2"],  # in this short backbone
            neck_channels=8,
            decoder_channels=8,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LVViTConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        pixel_values = modeling_common.floats_tensor([self.batch_size, config.num_channels, *self.image_size])
        return config, {"pixel_values": pixel_values}


class LVViTModelTest(modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LVViTModel, LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTBackbone)
    test_resize_embeddings = False
    # the common test decides by a copyright line whether a model is recent enough to be checked
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = LVViTModelTester()
        # by these tables the common tests know which classes take labels and which have no loss
        for table, model_class in (
            (modeling_auto.MODEL_MAPPING_NAMES, LVViTModel),
            (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, LVViTForImageClassification),
            (modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, LVViTForSemanticSegmentation),
            (modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, LVViTBackbone),
        ):
            patch = mock.patch.dict(table, {LVViTConfig.model_type: model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)

    def test_config(self):
        sizes = {"hidden_size": 36, "num_attention_heads": 6, "image_size": [32, 48]}
        tester = configuration_common.ConfigTester(self, config_class=LVViTConfig, has_text_modality=False, **sizes)
        tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # the common test expects an `nn.Embedding`; the input embeddings of LV-ViT are its stem
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), LVViTPatchEmbeddings)
            replacement = LVViTPatchEmbeddings(model.config)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())

    @unittest.skip("LV-ViT takes images only; it has no `inputs_embeds`")
    def test_inputs_embeds(self):
        pass


class LVViTBackboneTest(backbone_common.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LVViTBackbone,)
    config_class = LVViTConfig

    def setUp(self):
        self.model_tester = LVViTModelTester()
