"""The frame around a run: how a user's mistake ends a script."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from core.run import Run


@dataclass
class Settings:
    MAY_CHANGE: ClassVar = ()
    lr: float = 1.0


def test_a_start_that_failed_its_checks_does_not_hold_the_directory(tmp_path):
    """Prevents advice that cannot be followed: mend the flag, run the same command, "--out holds another run"."""
    Run(str(tmp_path / "run"), Settings(), is_main=True)  # and then the data have a fault
    run = Run(str(tmp_path / "run"), Settings(lr=2.0), is_main=True)
    assert '"lr": 2.0' in (tmp_path / "run" / "config.json").read_text()
    run.start({}, 0)
    with pytest.raises(ValueError, match="its lr is 2.0, now 3.0"):
        Run(str(tmp_path / "run"), Settings(lr=3.0), is_main=True)
