"""Options, refusals, help, folders and sweeps of any subcommand, on one small enough to see everything."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from flowsteer.cli import main as command
from flowsteer.cli.application import Application
from flowsteer.cli.dispatch import Command
from flowsteer.policies.errors import PolicyError


@dataclass
class Soup:
    """Warm.

    Attributes:
        salt: grams of it,
            per litre.
        hot: serve it hot.
    """

    salt: float = 1.5
    hot: bool = True


@dataclass
class Salad:
    leaves: int = 3


@dataclass
class Meal:
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"dish": "soup"}])
    dish: Any = MISSING
    guests: int = 2
    tags: list[str] = field(default_factory=list)
    sauces: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    mood: str = "good"
    out: str | None = None


store = ConfigStore.instance()
store.store(group="dish", name="soup", node=Soup)
store.store(group="dish", name="salad", node=Salad)


def cook(config: DictConfig, folder: Path) -> float:
    if config.mood == "bad":
        raise PolicyError("the cook is in a bad mood: mood=good")
    if config.mood == "odd":
        raise ZeroDivisionError("not meant for users")
    (folder / "served.json").write_text(json.dumps({"guests": config.guests, "recipe": config.recipe}))
    return float(config.guests)


serve = Application("meal", "Serve a meal.", Meal, cook, lambda composed: Path("served"), paths=("recipe",))


@pytest.fixture(autouse=True)
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(command.COMMANDS, "meal", Command(f"{__name__}:serve", "serve"))
    monkeypatch.setattr("flowsteer.cli.dispatch.Command.run", lambda self, args: serve(args))
    return tmp_path


def run(*args: str) -> int:
    return command.main(["meal", *args])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sauces={hot: a lot}", "add to option 'sauces' with +sauces.NAME=VALUE"),
        ("guest=3", "no option 'guest'; nearest: guests"),
        ("dish.sallt=3", "no option 'dish.sallt'; nearest: dish.salt"),
        ("dihs=soup", "no option 'dihs'; nearest: dish"),
        ("salt=3", "no option 'salt'; nearest: dish.salt"),
        ("+meat.salt=3", "no option 'meat.salt'; nearest: dish.salt"),
        ("dish=soop", "dish 'soop' is unknown; nearest: soup (known: salad, soup)"),
        ("guests=many", "option 'guests': value 'many' of type 'str' could not be converted to Integer"),
        ("dish.salt=much", "option 'dish.salt': value 'much' of type 'str' could not be converted to Float"),
        ("dish.hot=3.5", "option 'dish.hot': value '3.5' is not a valid bool (type float)"),
        ("guests", "'guests' is not of the form option=value; see --help"),
        ("guests=1,2", "option 'guests' has several values: add -m to run one job for each, or write guests=[a,b]"),
        ("mood=[a", "'mood=[a' is malformed"),
        ("~guests", "option 'guests' cannot be deleted"),
        ("~dish.salt", "option 'dish.salt' cannot be deleted"),
        ("~gests", "option 'gests' cannot be deleted"),
        ("--gests", "unrecognized arguments: --gests; see flowsteer meal --help"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    override: str, message: str, kitchen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(override) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(kitchen.iterdir()) == []


@pytest.mark.parametrize("override", ["dish=3", "dish=soup,soop", "guests=1,many,3"])
def test_a_wrong_value_anywhere_in_a_sweep_is_refused_before_it_starts(override: str, kitchen: Path) -> None:
    assert run("-m", override) == 2
    assert list(kitchen.iterdir()) == []


def test_a_run_writes_to_its_folder(kitchen: Path) -> None:
    assert run("guests=5", "recipe=books/soup.txt") == 0
    assert json.loads((kitchen / "served" / "served.json").read_text()) == {
        "guests": 5,
        "recipe": str(kitchen / "books" / "soup.txt"),
    }
    assert [path.name for path in (kitchen / "served").iterdir()] == ["served.json"]


@pytest.mark.parametrize(
    ("given", "kept"), [("books/a:b.txt", "{here}/books/a:b.txt"), ("minari:a/b-v0", "minari:a/b-v0")]
)
def test_only_a_scheme_makes_a_path_none(given: str, kept: str, kitchen: Path) -> None:
    assert run(f"recipe='{given}'") == 0
    served = json.loads((kitchen / "served" / "served.json").read_text())
    assert served["recipe"] == kept.format(here=kitchen)


def test_the_folder_may_have_any_name(kitchen: Path) -> None:
    name = "it's [a] table, x=1"
    assert run(f'out="{name}/b"') == 0
    assert (kitchen / name / "b" / "served.json").is_file()


def test_an_option_may_not_be_replaced_by_a_node(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("guests={a:1}") == 2
    assert "option 'guests': value" in capsys.readouterr().err


def test_a_users_error_is_one_line_and_leaves_no_folder(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mood=bad", "out=a/b/c") == 1
    assert capsys.readouterr().err == "error: the cook is in a bad mood: mood=good\n"
    assert list(kitchen.iterdir()) == []


def test_other_errors_and_debugging_keep_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run("mood=odd")
    monkeypatch.setenv("FLOWSTEER_DEBUG", "1")
    with pytest.raises(PolicyError):
        run("mood=bad")


def test_a_sweep_runs_each_job_in_a_folder_named_after_what_differs(kitchen: Path) -> None:
    assert run("-m", "dish=soup,salad", "guests=3,4", "tags=[x]", "out=all") == 0
    names = {f"dish={dish},guests={guests}" for dish in ("soup", "salad") for guests in (3, 4)}
    assert {path.name for path in (kitchen / "all").iterdir()} == {*names, "multirun.yaml"}
    assert json.loads((kitchen / "all" / "dish=salad,guests=4" / "served.json").read_text())["guests"] == 4


REASON = "the cook is in a bad mood: mood=good"


def test_a_failed_job_of_a_sweep_is_named_and_the_others_run(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", "mood=bad,good", "out=all") == 1
    assert capsys.readouterr().err == f"error: mood=bad: {REASON}\nerror: 1 of 2 jobs failed: mood=bad\n"
    assert sorted(os.listdir(kitchen / "all")) == ["mood=good", "multirun.yaml"]


def test_a_sweep_that_fails_leaves_nothing(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", "mood=bad", "guests=3,4", "out=deep/all") == 1
    assert capsys.readouterr().err == (
        f"error: guests=3: {REASON}\nerror: guests=4: {REASON}\nerror: 2 of 2 jobs failed: guests=3; guests=4\n"
    )
    assert list(kitchen.iterdir()) == []


def test_an_error_that_is_not_the_users_ends_a_sweep_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run("-m", "mood=good,odd")


def test_a_sweep_without_a_folder_gets_one(kitchen: Path) -> None:
    assert run("-m", "guests=3,4") == 0
    (folder,) = (kitchen / "runs").iterdir()
    assert folder.name.startswith("meal-sweep-")
    assert (folder / "guests=3" / "served.json").is_file()


def test_help_lists_choices_options_values_and_meanings(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help", "guests=7") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "flowsteer meal: Serve a meal."
    assert "  dish=soup  salad | soup" in lines
    assert "  guests=7" in lines
    assert "  dish.salt=1.5  grams of it, per litre." in lines
    assert list(kitchen.iterdir()) == []


def test_cfg_prints_the_config_and_stops(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cfg", "job", "dish=salad") == 0
    assert "dish:\n  leaves: 3\n" in capsys.readouterr().out
    assert list(kitchen.iterdir()) == []


def test_an_empty_folder_of_the_users_stays_when_a_run_fails(kitchen: Path) -> None:
    (kitchen / "mine").mkdir()
    assert run("mood=bad", "out=mine") == 1
    assert run("mood=bad", "out=new/deep") == 1
    assert sorted(path.name for path in kitchen.iterdir()) == ["mine"]
