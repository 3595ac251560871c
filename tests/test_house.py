"""The rooms: who may import whom, and that packaging knows all of them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"datasets", "policies", "sim", "rl_finetune", "real_robot", "configs", "cli"}
MAY_IMPORT: dict[str, set[str]] = {
    "datasets": set(),
    "policies": set(),
    "sim": {"policies.spec", "policies.errors"},
    "rl_finetune": {"policies", "sim", "datasets"},
    "real_robot": {"policies"},
    "configs": ROOMS - {"cli"},
    "cli": ROOMS,
}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the code imports, at whatever depth; `from a import b` may mean a or a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(room: str, module: str) -> bool:
    name = module.removeprefix("flowsteer.") + "."
    return any(name.startswith(part + ".") for part in {room, *MAY_IMPORT[room]})


def test_every_room_has_its_rule() -> None:
    assert set(MAY_IMPORT) == ROOMS
    assert all((ROOT / room / "__init__.py").is_file() for room in ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_run_downwards(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(room)
        for module in imported(ast.parse(path.read_text()))
        if module.startswith("flowsteer.") and not allowed(room, module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("room", "module", "verdict"),
    [
        ("datasets", "flowsteer.policies.spec.ArraySpec", False),
        ("datasets", "flowsteer.datasets.windows.Windows", True),
        ("sim", "flowsteer.policies.spec.ArraySpec", True),
        ("sim", "flowsteer.policies.specialist", False),
        ("sim", "flowsteer.policies.policy.Policy", False),
        ("real_robot", "flowsteer.sim.vec_env.VecEnv", False),
    ],
)
def test_the_rule_itself(room: str, module: str, verdict: bool) -> None:
    assert allowed(room, module) is verdict


def test_rooms_are_imported_as_parts_of_flowsteer_only() -> None:
    bare = [
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in [*ROOMS, "tests", "benchmarks"]
        for path in sources(folder)
        for module in imported(ast.parse(path.read_text()))
        if module.split(".")[0] in ROOMS
    ]
    assert bare == []


def test_packaging_lists_every_package_and_types_it() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {init.parent.relative_to(ROOT) for room in ROOMS for init in (ROOT / room).rglob("__init__.py")}
    assert set(setuptools["packages"]) == {"flowsteer." + ".".join(folder.parts) for folder in folders}
    assert setuptools["package-dir"] == {f"flowsteer.{room}": room for room in ROOMS}
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []
    # A folder of modules without __init__.py would be left out of a wheel in silence.
    modules = {path.parent.relative_to(ROOT) for room in ROOMS for path in sources(room)}
    assert modules == folders


def test_nothing_puts_the_root_on_the_path() -> None:
    """There a plain `import datasets` would find this project's folder instead of the package of that name."""
    scripts = [ROOT / name for name in (".ci/run", "Makefile", ".pre-commit-config.yaml", ".github/workflows/ci.yml")]
    forbidden = re.compile(r"python3? -m pytest|PYTHONPATH=\.?(\s|$)")
    assert [path for path in scripts if forbidden.search(path.read_text())] == []
    assert "--import-mode=importlib" in (ROOT / "pyproject.toml").read_text()
    assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}


def test_every_extra_that_a_message_names_exists() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    text = "".join(path.read_text() for room in ROOMS for path in sources(room))
    named = {*re.findall(r"flowsteer\[(\w+)\]", text), *re.findall(r"optional_module\([^()]*, \"(\w+)\"\)", text)}
    assert {"robosuite", "pusht", "lerobot"} <= named
    assert named - {"extra"} <= extras


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = {name for extra, names in extras.items() if extra not in ("all", "wandb") for name in names}
    wanted = {re.split(r"[\[<>=; ]", name)[0].lower().replace("_", "-") for name in [*project["dependencies"], *tested]}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    assert wanted - pinned == set()
