"""A score of a part of the evaluation images is called one, in the file of results and in the card."""

import json

from huggingface_hub import ModelCard
from pyarrow import parquet

import train_tl
from support.images import labelled_table
from support.programs import options


def test_card_and_results_say_that_a_part_was_evaluated(tmp_path):
    parquet.write_table(labelled_table(8), tmp_path / "train.parquet")
    parquet.write_table(labelled_table(6, seed=1), tmp_path / "test.parquet")
    small = ("--max_steps", "1", "--max_eval_samples", "4", "--save_picture", "false", "--disable_tqdm", "true")
    train_tl.main(options(tmp_path, tmp_path / "run", *small))
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert (results["eval_samples"], results["eval_split"]) == (4, "test")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "| metric | 4 images of test |" in card.text
    assert {result.dataset_split for result in card.data.eval_results} == {"4 images of test"}
