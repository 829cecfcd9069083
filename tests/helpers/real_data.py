"""Real data sets for tests, outside the repository: XREASONER_TEST_DATA names their folder.

Tests that need them are marked `@needs_real` and are skipped, with this reason, where it is not
set.
"""

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("XREASONER_TEST_DATA")
REAL = Path(FOLDER).resolve() if FOLDER else None
if REAL is not None and not REAL.is_dir():
    raise ValueError(f"XREASONER_TEST_DATA={FOLDER}: no such folder")

needs_real = pytest.mark.skipif(
    REAL is None, reason="real data: set XREASONER_TEST_DATA to their folder"
)
