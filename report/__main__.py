"""`python -m report`: runs → one offline HTML page."""

import sys

from report.page import main

main(sys.argv[1:])
