"""A home that is read-only or not there: programs say what to set."""

import datasets
import pytest
from pyarrow import parquet

from modeling_lvvit.cli import digit_scenes
from modeling_lvvit.data.sources import open_splits
from support.images import labelled_table


def test_without_a_place_for_the_cache_the_variable_is_named(tmp_path, monkeypatch):
    """The place lies below a file, where not even an administrator can make a folder."""
    (tmp_path / "home").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    parquet.write_table(labelled_table(4), tmp_path / "train.parquet")
    with pytest.raises(OSError, match="Nothing can be written to the cache .*home/datasets.*Set .* HF_HOME"):
        open_splits(str(tmp_path / "train.parquet"))


def test_the_embedded_data_names_it_too(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("")
    monkeypatch.setattr(digit_scenes, "HF_HOME", str(tmp_path / "home"))
    with pytest.raises(OSError, match="Nothing can be written to the cache .*home/lvvit.* HF_HOME"):
        digit_scenes.build_or_reuse()
