"""The choices of the command line against the rooms that they configure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from omegaconf import OmegaConf

from flowsteer.cli import collect, demo, eval, finetune, train
from flowsteer.cli.application import Application, Job
from flowsteer.configs import groups
from flowsteer.policies.build import build
from flowsteer.policies.checkpoint import build_policy
from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.sim.tasks.base import Task


def test_every_task_is_called_what_it_calls_itself() -> None:
    assert len(groups.SIMULATED) >= 14
    for name, config in groups.SIMULATED.items():
        task = build(OmegaConf.to_container(OmegaConf.structured(config)))
        assert isinstance(task, Task)
        assert task.spec.name == name


SMALL = {
    "mlp": ["policy.network.hidden=32", "policy.network.blocks=1"],
    "unet": ["policy.network.widths=[16,32]"],
    "transformer": ["policy.network.width=32", "policy.network.layers=1"],
    "energy_transformer": ["policy.network.width=32", "policy.network.layers=1"],
}
VECTORS = {"state": ArraySpec((5,))}
IMAGES = {"image": ArraySpec((96, 96, 3), "uint8"), **VECTORS}
CLOUD = {"point_cloud": ArraySpec((64, 3)), **VECTORS}
SEEN = {"low_dim": VECTORS, "image": IMAGES, "image_vit": IMAGES, "point_cloud": CLOUD}


def test_the_table_below_knows_every_choice() -> None:
    assert set(SMALL) == set(groups.NETWORKS)
    assert set(SEEN) == set(groups.ENCODERS)


NETWORKS_OF = {"gaussian": [None], "ebt": groups.NETWORKS, "diffusion": groups.DENOISERS, "flow": groups.DENOISERS}


@pytest.mark.parametrize(("policy", "network"), [(p, n) for p in groups.POLICIES for n in NETWORKS_OF[p]])
@pytest.mark.parametrize("encoder", sorted(groups.ENCODERS))
def test_every_combination_of_choices_builds(policy: str, network: str | None, encoder: str) -> None:
    chosen = [] if network is None else [f"network={network}", *SMALL[network]]
    config = train.application.compose(f"policy={policy}", f"encoder={encoder}", *chosen)
    spec = PolicySpec(SEEN[encoder], 2, 2, 16, 8, 10.0)
    stored = {"policy": OmegaConf.to_container(config.policy, resolve=True), "spec": spec.to_dict()}
    built = build_policy(stored)
    assert built.spec == spec
    assert sum(parameter.numel() for parameter in built.parameters() if torch.is_floating_point(parameter)) > 0


@pytest.mark.parametrize("application", [train.application, finetune.application, eval.main, collect.main, demo.main])
def test_launchers_can_send_a_job_to_another_process(application: Application, tmp_path: Path) -> None:
    """Submitit, joblib and ray pickle with cloudpickle; on the other side only the installed package is there."""
    job = tmp_path / "job.pkl"
    job.write_bytes(cloudpickle.dumps(Job(application)))
    assert cloudpickle.loads(job.read_bytes()).application.name == application.name
    if application is train.application:
        code = f"import cloudpickle, pathlib; print(cloudpickle.loads(pathlib.Path({str(job)!r}).read_bytes()))"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
        assert "name='train'" in done.stdout
