"""Program of `modeling_lvvit.annotators.annotate`: images to a label set."""

import sys

from modeling_lvvit.annotators.annotate import main


if __name__ == "__main__":
    main(sys.argv[1:])
