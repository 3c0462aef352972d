"""Program of `modeling_lvvit.original.label_import`: the authors' label files to a label set."""

import sys

from modeling_lvvit.original.label_import import main


if __name__ == "__main__":
    main(sys.argv[1:])
