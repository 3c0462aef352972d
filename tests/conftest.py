"""Fixtures: no network, small models, small data."""

import copy
import os
import signal
import time
from collections import Counter
from unittest import mock


os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported
# also for the processes that tests start: more threads than cores wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# a shell has its background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import datasets
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.data import loaders
from support.images import labelled_table
from support.local_hub import local_hub
from support.models import tiny_config


# workers take longer to start than the small data of most tests takes to load; tests of workers ask for them
loaders.MAX_WORKERS = 0


def pytest_collection_modifyitems(items):
    """Files with most slow tests first: with several workers, a long one at the end would be waited for."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    """Two threads in all: more of them than cores would wait for each other."""
    torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="module", autouse=True)
def _own_process_state():
    """Every file starts without the device, precision and variables that others chose; with several workers their order varies."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def _tiny_model() -> LVViTForImageClassification:
    torch.manual_seed(0)
    return LVViTForImageClassification(tiny_config())


@pytest.fixture
def tiny_model(_tiny_model) -> LVViTForImageClassification:
    """32 x 48 pixels in patches of 8: a grid of 4 rows and 6 columns."""
    return copy.deepcopy(_tiny_model)


@pytest.fixture
def labelled_rows() -> datasets.Dataset:
    return datasets.Dataset(labelled_table())


@pytest.fixture
def hub(monkeypatch):
    """A hub that the clients of this process take for the real one."""
    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's own repetitions
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
