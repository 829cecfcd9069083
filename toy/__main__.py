"""`python -m toy`: the miniature."""

import sys

from toy.world import main

main(sys.argv[1:])
