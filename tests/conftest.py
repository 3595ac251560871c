from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}")
    return folder


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compile without vector instructions, which take longer and prove nothing more."""
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler: apt install g++")
    import torch
    from torch._inductor import config

    with config.patch({"cpp.simdlen": 1}):
        yield
    torch.compiler.reset()
