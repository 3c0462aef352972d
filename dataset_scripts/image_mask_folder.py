"""Program of `modeling_lvvit.segmentation.conversion.image_mask_folder`: folders of images and masks to Parquet files."""

import sys

from modeling_lvvit.segmentation.conversion.image_mask_folder import main


if __name__ == "__main__":
    main(sys.argv[1:])
