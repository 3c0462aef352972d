"""Program of `modeling_lvvit.segmentation.conversion.ade20k`: the scene-parsing release of ADE20K to Parquet files."""

import sys

from modeling_lvvit.segmentation.conversion.ade20k import main


if __name__ == "__main__":
    main(sys.argv[1:])
