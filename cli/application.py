"""Subcommands whose options are Hydra overrides: parse, refuse in one line, launch (once, or a sweep with -m)."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, final

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from hydra_zen import launch
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.dispatch import Parser
from flowsteer.cli.errors import exit_code, report
from flowsteer.cli.files import absolute
from flowsteer.cli.help import help_text
from flowsteer.cli.refusals import VERSION_BASE, Composed, compose_or_refuse, parse

QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false")
"""Hydra keeps its hands off logging, the run folder and the working directory."""

SWEEP = "multirun.yaml"
"""What Hydra writes to the folder of a sweep."""

Run = Callable[[DictConfig, Path], "float | None"]
"""The resolved config and the folder to write to -> a score, for sweepers that optimise."""


@final
@dataclass(frozen=True)
class Application:
    """A subcommand as Hydra sees it. Importable by name, so that launchers can pickle it for other machines.

    Attributes:
        name: of the subcommand ("_" between its words) and of its config.
        summary: what it does, for `--help`.
        config: the typed top-level config; its field `out` is the folder to write to, or with `out_is_file` a file in
            that folder.
        run: does the work.
        default_out: the folder of a single run where the config's `out` is None.
        paths: options that name files; relative ones mean the directory of the launch.
        register: tells Hydra the groups to choose from.
    """

    name: str
    summary: str
    config: Any
    run: Run
    default_out: Callable[[Composed], Path]
    paths: tuple[str, ...] = ()
    register: Callable[[], None] | None = None
    out_is_file: bool = False

    @property
    def command(self) -> str:
        """As the user types it."""
        return "flowsteer " + self.name.replace("_", " ")

    def __call__(self, args: Sequence[str]) -> int:
        """Run a command line and return its exit code."""
        flags = _parse(self.command, args)
        with _own_hydra(self.register):
            return self._run(flags)

    def compose(self, *overrides: str) -> DictConfig:
        """The config that a command line gives, for programs that call `run` themselves.

        Raises:
            UsageError: as on the command line.
        """
        with _own_hydra(self.register):
            ConfigStore.instance().store(name=self.name, node=self.config)
            return compose_or_refuse(self.name, overrides).config

    def _run(self, flags: argparse.Namespace) -> int:
        ConfigStore.instance().store(name=self.name, node=self.config)
        composed = compose_or_refuse(self.name, flags.overrides, sweep=flags.multirun)
        if flags.help:
            print(help_text(self.command, self.summary, composed))
            return 0
        if flags.cfg:
            print(OmegaConf.to_yaml(composed.config), end="")
            return 0
        return self._launch(composed, flags.overrides, flags.multirun)

    def _launch(self, composed: Composed, overrides: list[str], multirun: bool) -> int:
        folder = self._folder(composed, multirun)
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        added = [*QUIET, f"hydra.mode={mode.name}", *_folder_overrides(folder, overrides)]
        options: dict[str, Any] = {"version_base": VERSION_BASE, "config_name": self.name, "job_name": self.name}
        options |= {"overrides": [*added, *overrides], "multirun": multirun, "with_log_configuration": False}
        with _no_empty_folders(folder):
            job = launch(self.config, Job(self), **options)
        return _exit_code(list(chain.from_iterable(job or ())) if multirun else [job])

    def _folder(self, composed: Composed, multirun: bool) -> Path:
        if composed.config.out is not None:
            out = Path(composed.config.out).expanduser().absolute()
            return out.parent if self.out_is_file else out
        if multirun:
            return Path("runs", f"{self.name}-sweep-{timestamp()}").absolute()
        return self.default_out(composed).absolute()


def timestamp() -> str:
    """Now, as a part of a folder's name."""
    return time.strftime("%Y%m%d-%H%M%S")


@final
@dataclass(frozen=True)
class Failure:
    """An error of a job that has been reported; `name` is what the job differs in from the others of its sweep."""

    code: int
    name: str


@final
@dataclass(frozen=True)
class Job:
    """One run, here or on the machine that a launcher chose."""

    application: Application

    def __call__(self, config: DictConfig) -> float | Failure | None:
        """Resolve the config, run, and tell the user's errors in one line."""
        hydra = HydraConfig.get()
        folder, sweep = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
        try:
            return self.application.run(self._resolved(config, Path(hydra.runtime.cwd)), folder)
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            report(error, f"{hydra.job.override_dirname}: " if sweep else "")
            if sweep and hydra.runtime.choices["hydra/sweeper"] != "basic":
                # Only an exception tells a sweeper that optimises that the job failed.
                raise
            return Failure(code, hydra.job.override_dirname)
        finally:
            if sweep:
                # Hydra has made it; the folder of a single run may be the user's own.
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _resolved(self, config: DictConfig, cwd: Path) -> DictConfig:
        OmegaConf.resolve(config)
        for key in self.application.paths:
            if config[key] is not None:
                config[key] = absolute(config[key], cwd)
        return config


@contextlib.contextmanager
def _own_hydra(register: Callable[[], None] | None) -> Iterator[None]:
    """Hydra has one store and one state for the process; here each use of it is alone, also inside another.

    What is a group of one subcommand may so be a plain option of another.
    """
    store, state = ConfigStore.instance(), GlobalHydra.instance()
    groups, store.repo = store.repo, dict(store.repo)
    outer, state.hydra = state.hydra, None
    try:
        if register is not None:
            register()
        yield
    finally:
        store.repo, state.hydra = groups, outer


def _parse(command: str, args: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=command, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job"])
    return parser.parse_intermixed_args(args)


def _exit_code(jobs: Sequence[JobReturn]) -> int:
    """Of one job or a sweep, at whose end those that failed, maybe on another machine, are told again by name."""
    failures = [job.return_value for job in jobs if isinstance(job.return_value, Failure)]
    if failures and len(jobs) > 1:
        names = "; ".join(failure.name for failure in failures)
        print(f"error: {len(failures)} of {len(jobs)} jobs failed: {names}", file=sys.stderr)
    return max((failure.code for failure in failures), default=0)


def _folder_overrides(folder: Path, overrides: list[str]) -> Iterator[str]:
    """Run in `folder`; jobs of a sweep in sub-folders named after what differs between them."""
    quoted = "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'"
    yield f"hydra.run.dir={quoted}"
    yield f"hydra.sweep.dir={quoted}"
    yield "hydra.sweep.subdir=${hydra.job.override_dirname}"
    same = [override.key_or_group for override in parse(overrides) if not override.is_sweep_override()]
    yield f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"


@contextlib.contextmanager
def _no_empty_folders(folder: Path) -> Iterator[None]:
    """Remove `folder` and its new parents again where nothing was written to them but Hydra's account of a sweep."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        if folder in created and [path.name for path in folder.glob("*")] == [SWEEP]:
            (folder / SWEEP).unlink()
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
