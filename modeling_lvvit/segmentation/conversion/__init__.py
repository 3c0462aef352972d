"""Other forms of segmentation data to Parquet files that training reads."""
