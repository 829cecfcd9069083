"""`python -m convert`: public releases and chat files → flat jsonl."""

import sys

from convert.conversion import main

main(sys.argv[1:])
