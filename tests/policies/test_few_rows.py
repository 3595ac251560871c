"""Packed layers are the layers they were made of, for any number of rows, inputs and outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowsteer.policies import few_rows
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.few_rows import PackedLinear, with_packed_weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler: apt install g++")


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * outputs)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_a_packed_layer_is_the_layer(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    layer = linear(inputs, outputs, bias)
    x = torch.randn(rows, inputs)
    torch.testing.assert_close(PackedLinear(layer, torch.float32)(x), layer(x))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 70))
def test_in_bfloat16_only_the_weights_are_rounded(rows: int, inputs: int, outputs: int) -> None:
    layer = linear(inputs, outputs)
    packed = PackedLinear(layer, torch.bfloat16)
    layer.weight.copy_(layer.weight.bfloat16().float())
    x = torch.randn(rows, inputs)
    torch.testing.assert_close(packed(x), layer(x))


def test_by_hand() -> None:
    layer = nn.Linear(2, 3)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2], [3, 4], [5, 6]]), "bias": torch.tensor([0.5, 0, -1])})
    assert PackedLinear(layer, torch.bfloat16)(torch.tensor([[10.0, 1]])).tolist() == [[12.5, 34.0, 55.0]]


def test_leading_dimensions_and_gaps_in_memory_are_as_in_any_layer() -> None:
    layer = linear(5, 7)
    packed = PackedLinear(layer, torch.float32)
    for x in (torch.randn(2, 3, 5), torch.randn(5, 3).t(), torch.randn(3, 10)[:, ::2], torch.randn(5)):
        torch.testing.assert_close(packed(x), layer(x))


def test_what_is_large_is_dealt_over_threads_and_stays_the_same() -> None:
    layer = linear(512, 600)
    packed, x, before = PackedLinear(layer, torch.float32), torch.randn(7, 512), torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append(packed(x))
    torch.set_num_threads(before)
    assert answers[0].equal(answers[1])


def test_every_plain_layer_is_packed_and_no_other() -> None:
    holder = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), nn.Conv1d(4, 4, 1))
    with_packed_weights(holder, torch.float32)
    kinds = [type(module).__name__ for module in holder.modules()]
    assert kinds == ["Sequential", "PackedLinear", "Sequential", "PackedLinear", "LayerNorm", "Conv1d"]


@pytest.mark.parametrize(
    ("x", "outputs"), [(torch.zeros(2, 6), 7), (torch.zeros(2, 4), 7), (torch.tensor(1.0), 7), (torch.zeros(2, 5), 17)]
)
def test_sizes_that_do_not_fit_are_refused(x: torch.Tensor, outputs: int) -> None:
    packed = PackedLinear(linear(5, 7), torch.float32)
    packed.outputs = outputs
    with pytest.raises(RuntimeError, match=r"few_rows: (x .* does not fit panels|panels .* are not of 17 outputs)"):
        packed(x)


def test_it_takes_float32_only() -> None:
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        PackedLinear(linear(5, 7), torch.float32)(torch.zeros(2, 5, dtype=torch.float64))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(few_rows, "LOADED", set())
    return tmp_path / "flowsteer"


def test_what_does_not_compile_is_named_and_leaves_nothing(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return x; }")
    monkeypatch.setattr(few_rows, "SOURCE", broken)
    monkeypatch.setenv("CXX", "g++ -Wall")
    with pytest.raises(PolicyError) as error:
        few_rows.load_product()
    start = "'g++ -Wall' cannot compile broken.cpp, name another compiler in CXX: "
    assert str(error.value).startswith(start)
    assert "broken.cpp:1:18: error: 'x' was not declared" in str(error.value)
    assert not list(empty_cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(few_rows, "LOADED", set())
    with pytest.raises(PolicyError, match=r"file/flowsteer/few_rows-\w+.so cannot be made .*: set XDG_CACHE_HOME to"):
        few_rows.load_product()


def test_a_broken_library_is_named(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_compile", lambda compiler, library: library.write_bytes(b"cut off"))
    with pytest.raises(PolicyError, match=r"few_rows-\w+.so cannot be loaded \(.*\): delete it"):
        few_rows.load_product()


def test_it_is_compiled_once_for_each_source(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compiler = [], few_rows._compile
    monkeypatch.setattr(few_rows, "SOURCE", tmp_path / "tiny.cpp")
    monkeypatch.setattr(few_rows, "_compile", lambda *args: (compiled.append(args), compiler(*args)))
    for text in ["int f() { return 1; }", "int f() { return 1; }", "int f() { return 2; }"]:
        few_rows.SOURCE.write_text(text)
        assert few_rows._library().is_file()
    assert len(compiled) == 2
    assert len(list(empty_cache.iterdir())) == 2


@pytest.mark.parametrize("gone", [Path("/nothing/here"), None])
def test_the_library_belongs_to_a_processor(gone: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if gone is not None:
        monkeypatch.setattr(Path, "read_text", lambda path: (gone / "x").read_bytes().decode())
    assert few_rows._processor()
