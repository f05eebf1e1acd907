from pathlib import Path

import pytest
import small_house


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """A small checkout that the test works in."""
    root = small_house.build(tmp_path / "a {house} with spaces")
    monkeypatch.delenv("FEDAL_HOME", raising=False)
    monkeypatch.delenv("FEDAL_PROGRESS", raising=False)
    monkeypatch.chdir(root)
    return root
