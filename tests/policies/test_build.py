import functools
from pathlib import Path
from typing import Any

import pytest

from flowsteer.policies.build import OBJECT, build, locate, path_of
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.paths import LinearPath, VariancePreservingPath, linear_betas
from flowsteer.policies.spec import ArraySpec, PolicySpec

PATH = "flowsteer.policies.paths.VariancePreservingPath"
BETAS = {"_target_": OBJECT, "path": "flowsteer.policies.paths.linear_betas"}


def test_builds_a_class_with_its_arguments() -> None:
    path = build({"_target_": PATH, "train_steps": 10})
    assert isinstance(path, VariancePreservingPath)
    assert path.train_steps == 10


def test_a_path_leads_back_to_what_it_names() -> None:
    assert path_of(PolicySpec) == "flowsteer.policies.spec.PolicySpec"
    assert locate(path_of(PolicySpec)) is PolicySpec


def test_functions_are_values_and_not_called() -> None:
    assert build(BETAS) is linear_betas
    built = build({"_target_": PATH, "betas": BETAS, "train_steps": 10})
    expected = VariancePreservingPath(linear_betas, 10)
    assert built.log_alpha_bar.tolist() == expected.log_alpha_bar.tolist()


def test_nested_configs_lists_and_plain_mappings_are_built() -> None:
    array = {"_target_": "flowsteer.policies.spec.ArraySpec", "shape": [2]}
    spec = build(
        {
            "_target_": "flowsteer.policies.spec.PolicySpec",
            "observations": {"state": array, "pair": [array]},
            "action_dim": 2,
            "observation_steps": 2,
            "prediction_steps": 16,
            "execution_steps": 8,
            "control_hz": 10.0,
        }
    )
    assert isinstance(spec, PolicySpec)
    assert spec.observations == {"state": ArraySpec([2]), "pair": [ArraySpec([2])]}  # type: ignore[arg-type]


def test_partial_waits_for_the_rest_and_keywords_win() -> None:
    partial = build({"_target_": PATH, "_partial_": True, "train_steps": 10})
    assert isinstance(partial, functools.partial)
    assert partial(betas=linear_betas).train_steps == 10
    assert build({"_target_": PATH, "train_steps": 10}, train_steps=7).train_steps == 7


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "subprocess.run",
        "builtins.eval",
        "torch.load",
        "flowsteer.datasets.temporary.ForgivingFile",
        "flowsteer.sim.errors.optional_module",
        "flowsteer.policies.checkpoint.save_checkpoint",
        "flowsteer.policies.random_state.seed_everything",
        "flowsteer.policies.ema.Ema",
        "flowsteer.cli.main.main",
        "flowsteer.policies.paths.Callable",
        "flowsteer.policies.build.Path.home",
        "flowsteer.policies.build.os.system",
        "flowsteer.policies.build.importlib.import_module",
        "flowsteer.policies.build.os",
        "flowsteer.policies.build.OBJECT",
        "flowsteer.policies.build._trusted",
        "flowsteer.policies.spec.PolicySpec.__init__.__globals__",
        "flowsteer.policiesx.build",
        "flowsteer.policies..build",
        "",
        ".",
        None,
        3,
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_foreign_code_is_never_reached(target: Any, partial: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = {"_target_": target, "_partial_": partial, "command": f"touch {marker}"}
    for hidden in (config, {"_target_": PATH, "betas": config}, {"_target_": OBJECT, "path": target}):
        with pytest.raises(PolicyError):
            build(hidden)
    assert not marker.exists()


def test_a_trusted_package_is_allowed_and_only_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyError, match=r"asks to run 'fractions\.Fraction'.* set FLOWSTEER_TRUST=fractions$"):
        build({"_target_": "fractions.Fraction", "numerator": 3})
    monkeypatch.setenv("FLOWSTEER_TRUST", "decimal, fractions")
    assert build({"_target_": "fractions.Fraction", "numerator": 3}) == 3
    with pytest.raises(PolicyError):
        build({"_target_": "fractionsx.Fraction"})


def test_a_name_imported_by_a_trusted_module_names_the_package_to_trust() -> None:
    with pytest.raises(PolicyError, match=r"FLOWSTEER_TRUST=torch$"):
        locate("flowsteer.policies.paths.Tensor")


@pytest.mark.parametrize("target", ["flowsteer.policies.paths.Cubic", "flowsteer.policies.nothing.Cubic"])
def test_a_missing_name_asks_for_the_version(target: str) -> None:
    with pytest.raises(PolicyError, match=f"^there is no '{target}': was the config written by another version"):
        build({"_target_": target})


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(PolicyError, match=r"ArraySpec does not fit its arguments: .*'steps'"):
        build({"_target_": "flowsteer.policies.spec.ArraySpec", "shape": [2], "steps": 3})
    with pytest.raises(PolicyError, match="needs '_target_', got the keys \\['steps'\\]"):
        build({"steps": 3})
    assert isinstance(build({"_target_": "flowsteer.policies.paths.LinearPath"}), LinearPath)


def test_what_a_stranger_nests_is_refused_before_anything_is_called(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    evil = {"_target_": "flowsteer.datasets.temporary.ForgivingFile", "file": str(precious), "mode": "w"}
    with pytest.raises(PolicyError, match=r"not a building block of flowsteer"):
        build({"_target_": PATH, "train_steps": evil})
    assert precious.read_text() == "mine"
