from pathlib import Path

import numpy as np
import pytest

from flowsteer.cli.main import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


def test_a_run_becomes_one_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "policy.onnx"
    assert main(["export", f"checkpoint={trained}", f"out={file}", "steps=2"]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: ")
    assert [path.name for path in file.parent.iterdir()] == ["policy.onnx"]
    session = runtime.InferenceSession(str(file))
    inputs = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
    (action,) = session.run(["action"], inputs)
    assert action.shape == (1, 8, 2)
    assert np.isfinite(action).all()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "checkpoint= is missing: name a run folder, RUN/best or RUN/checkpoints/STEP"),
        (["checkpoint={run}", "out={tmp}/a.pt"], 2, "out=a.pt is no name of an ONNX file: end it in .onnx"),
        (["checkpoint={run}", "out={tmp}/a.onnx", "steps=0"], 2, "steps must be positive, got 0"),
        (["checkpoint={run}", "out={tmp}/a.onnx", "batch=0"], 2, "batch must be positive, got 0"),
        (["checkpoint={run}", "out={tmp}/a.onnx", "weights=eam"], 2, "weights 'eam' is unknown; nearest: ema"),
        (["checkpoint={tmp}/none", "out={tmp}/a.onnx"], 1, "checkpoint {tmp}/none does not exist"),
        (["chekpoint={run}"], 2, "no option 'chekpoint'; nearest: checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    capsys.readouterr()
    assert main(["export", *(option.format(run=trained, tmp=tmp_path) for option in options)]) == code
    told = capsys.readouterr().err.removeprefix("error: ")
    assert told.startswith(message.format(tmp=tmp_path)), told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
