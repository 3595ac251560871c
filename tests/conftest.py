from __future__ import annotations

import json
import multiprocessing
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

FORKED = """
import importlib.util, json, os
from pathlib import Path
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

torch.set_num_threads(1)
if processes > 1:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({"OMP_NUM_THREADS": "1"}, **{name: str(value) for name, value in told.items()})
where = InitProcessGroupKwargs(init_method=f"file://{meeting}")
accelerator = Accelerator(cpu=True, kwargs_handlers=[where])
assert (accelerator.process_index, accelerator.num_processes) == (rank, processes)
spec = importlib.util.spec_from_file_location("kit", kit)
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
"""
"""What every process does first: find the others, as `accelerator`, and read the `kit`."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}")
    return folder


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compile in this process and without vector instructions: to find which there are takes longer than to compile."""
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler: apt install g++")
    import torch
    from torch._inductor import config

    with config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):
        yield
    torch.compiler.reset()


@pytest.fixture
def run_processes(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Code, number of processes, what it knows by name -> the JSON that process 0 of them leaves in `result`.

    The code knows `rank`, `processes`, `accelerator` and `kit`, the conftest.py beside the test.
    """
    # They are forked from one process, since what they import takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "torch._dynamo", "flowsteer.rl_finetune.on_policy"])
    kit = str(request.path.with_name("conftest.py"))

    def run(code: str, processes: int, **known: Any) -> Any:
        own = Path(mkdtemp(dir=tmp_path))
        script, answer = own / "worker.py", own / "result.json"
        script.write_text(f"{FORKED}\n{code}\nif rank == 0: Path({str(answer)!r}).write_text(json.dumps(result))")
        known |= {"kit": kit, "processes": processes, "meeting": str(own / "meeting")}
        ranks = [{**known, "rank": rank} for rank in range(processes)]
        workers = [context.Process(target=runpy.run_path, args=(str(script), names), daemon=True) for names in ranks]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=180)
        ended = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
        assert ended == processes * [0]
        return json.loads(answer.read_text())

    return run
