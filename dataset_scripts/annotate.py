"""Program of `modeling_lvvit.cli.annotation`: images to a label set."""

import sys

from modeling_lvvit.cli.annotation.__main__ import main


if __name__ == "__main__":
    main(sys.argv[1:])
