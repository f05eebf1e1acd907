"""What all tests share: two cores are enough, no window opens, random cases are the same on every machine."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads that wait for a busy core are many times slower than one
if os.environ.get("FEDAL_DATA"):
    os.environ["FEDAL_DATA"] = str(Path(os.environ["FEDAL_DATA"]).expanduser().absolute())

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("fedal", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fedal")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """$FEDAL_DATA; the test is skipped where it is not set."""
    if not os.environ.get("FEDAL_DATA"):
        pytest.skip("FEDAL_DATA is not set: real data are tested where they are")
    return Path(os.environ["FEDAL_DATA"])
