"""Program of `original.family_cards`: writes the cards of the published family."""

import sys

from .original.family_cards import main


if __name__ == "__main__":
    main(sys.argv[1:])
