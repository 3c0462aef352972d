"""Program of `original.convert`: a checkpoint of the authors' code to a folder that `AutoModel` loads."""

import sys

from .original.convert import main


if __name__ == "__main__":
    main(sys.argv[1:])
