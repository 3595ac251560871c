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


OPEN_BASES = {"ABC", "Protocol", "NamedTuple", "TypedDict", "Exception"}


def last_name(node: ast.expr) -> str:
    """`b` of `a.b[c](d)`."""
    return ast.unparse(node).partition("(")[0].partition("[")[0].rpartition(".")[2]


def abstract_or_final(node: ast.ClassDef, room: str) -> bool:
    """Whether the class says that nothing derives from it, or that it is there to be derived from."""
    marks, bases = {last_name(d) for d in node.decorator_list}, {last_name(base) for base in node.bases}
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    return (
        "final" in marks
        or bool(bases & OPEN_BASES)
        or any(base.endswith("Error") for base in bases)
        or any(last_name(d) == "abstractmethod" for method in methods for d in method.decorator_list)
        # Hydra's structured configs, which share fields by inheritance.
        or (room == "configs" and "dataclass" in marks)
    )


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_classes_are_abstract_or_final(room: str) -> None:
    neither = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not abstract_or_final(node, room)
    ]
    assert neither == []


@pytest.mark.parametrize(
    ("room", "source", "verdict"),
    [
        ("sim", "class A: ...", False),
        ("sim", "@final\nclass A: ...", True),
        ("sim", "@typing.final\n@dataclass(frozen=True)\nclass A(B): ...", True),
        ("sim", "class A(Env, abc.ABC): ...", True),
        ("sim", "class A(Protocol[T]): ...", True),
        ("sim", "class A:\n    @abstractmethod\n    def f(self): ...", True),
        ("sim", "class A(Env):\n    @property\n    def f(self): ...", False),
        ("sim", "class A(ValueError): ...", True),
        ("sim", "class A(NamedTuple): ...", True),
        ("configs", "@dataclass\nclass A(B): ...", True),
        ("sim", "@dataclass\nclass A(B): ...", False),
    ],
)
def test_the_rule_for_classes_itself(room: str, source: str, verdict: bool) -> None:
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    assert abstract_or_final(node, room) is verdict


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
