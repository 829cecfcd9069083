"""`python -m tools.inspect FILE --model DIR`: counts, lengths, and one sample with its loss mask."""

import sys

from tools.check import main

main(["inspect", *sys.argv[1:]])
