"""Program of `modeling_lvvit.visualization.check_labels`: looks over a label set."""

import sys

from modeling_lvvit.visualization.check_labels import main


if __name__ == "__main__":
    main(sys.argv[1:])
