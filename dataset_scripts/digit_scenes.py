"""Program of `modeling_lvvit.cli.digit_scenes`: builds the embedded dataset."""

import sys

from modeling_lvvit.cli.digit_scenes import main


if __name__ == "__main__":
    main(sys.argv[1:])
