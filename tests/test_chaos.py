"""Short versions of the scripts in tests/chaos; docs/reliability.md has the results of the long ones."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

import kill
import soak


def test_a_pipeline_that_is_killed_ends_as_one_that_was_not(capsys):
    assert kill.main(["--kills", "2", "--seed", "2", "--recipe", "tests/chaos/quick.py"]) == 0
    assert "2 kills in" in capsys.readouterr().out


def test_nothing_piles_up(tmp_path, monkeypatch, capsys):
    for name in ("ALIGN_HOME", "ALIGN_IN_PROCESS"):
        monkeypatch.setenv(name, "")  # to be taken back at the end
    soak.soak(12, 6, tmp_path)
