import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from flowsteer.policies import onnx_export
from flowsteer.policies.denoising import DiffusionPolicy, FlowPolicy
from flowsteer.policies.ebt import EnergyPolicy
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.resnet import ResNet18
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.networks.transformer import DiffusionTransformer
from flowsteer.policies.networks.unet1d import ConditionalUnet1d
from flowsteer.policies.onnx_export import export_onnx
from flowsteer.policies.spec import ArraySpec, PolicySpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

SPEC = PolicySpec({"state": ArraySpec((3,)), "observation.finger": ArraySpec((2,))}, 2, 2, 8, 3, 10.0)
SEEN = PolicySpec({"camera": ArraySpec((40, 40, 3), "uint8")}, 2, 1, 8, 3, 10.0)
MLP = partial(ResidualMLP, hidden=16, blocks=1)
SMALL_TRANSFORMER = partial(DiffusionTransformer, width=16, layers=1)
POLICIES = {
    "diffusion": partial(DiffusionPolicy, encoder=LowDim, network=MLP, steps=3),
    "flow_sde": partial(FlowPolicy, encoder=LowDim, network=MLP, steps=2, eta=0.5, relative_to="observation.finger"),
    "heun": partial(FlowPolicy, encoder=LowDim, network=MLP, steps=2, solver="heun"),
    "staged": partial(FlowPolicy, encoder=LowDim, network=partial(StagedNetwork, network=MLP, switch=0.4), steps=2),
    "gaussian": partial(GaussianPolicy, encoder=LowDim, hidden=(16,), temperature=1.0),
    "unet": partial(FlowPolicy, encoder=LowDim, network=partial(ConditionalUnet1d, widths=(16, 32)), steps=1),
    "transformer": partial(
        FlowPolicy, encoder=LowDim, network=partial(DiffusionTransformer, width=16, layers=1), steps=1
    ),
}


def fitted(make, spec=SPEC):
    torch.manual_seed(0)
    policy = make(spec=spec)
    for parameter in policy.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for name, buffer in policy.normalizer.named_buffers():
        buffer.copy_(torch.full_like(buffer, 0.5 if name.startswith("scale") else 0.25))
    return policy.eval()


def observed(batch, spec=SPEC):
    generator = torch.Generator().manual_seed(5)
    return {key: torch.randn(batch, 2, *a.shape, generator=generator) for key, a in spec.observations.items()}


@pytest.mark.parametrize("name", POLICIES)
def test_the_file_makes_the_actions_of_the_policy(name, tmp_path):
    policy = fitted(POLICIES[name])
    assert export_onnx(policy, tmp_path / "policy.onnx", batch=2) < 1e-4
    session = runtime.InferenceSession(str(tmp_path / "policy.onnx"))
    stochastic = ["step_noise"] if name == "flow_sde" else []
    assert [i.name for i in session.get_inputs()] == ["state", "observation.finger", "noise", *stochastic]
    obs, generator = observed(2), torch.Generator().manual_seed(3)
    expected = policy.act(obs, generator=generator)
    generator.manual_seed(3)
    noises = {"noise": torch.randn(2, 8, 2, generator=generator)}
    noises |= {key: torch.stack([torch.randn(2, 8, 2, generator=generator) for _ in range(2)]) for key in stochastic}
    (action,) = session.run(["action"], {key: value.numpy() for key, value in {**obs, **noises}.items()})
    assert action.shape == (2, 3, 2)
    np.testing.assert_allclose(action, expected.numpy(), atol=2e-4)


def test_from_images(tmp_path):
    camera = partial(Cameras, backbone=partial(ResNet18, keypoints=4))
    policy = fitted(partial(FlowPolicy, encoder=camera, network=MLP, steps=1), SEEN)
    export_onnx(policy, tmp_path / "policy.onnx")
    session = runtime.InferenceSession(str(tmp_path / "policy.onnx"))
    assert [(i.name, i.type) for i in session.get_inputs()[:1]] == [("camera", "tensor(uint8)")]


def test_the_file_tells_what_it_needs(tmp_path):
    export_onnx(fitted(POLICIES["gaussian"]), tmp_path / "policy.onnx")
    model = onnx.load(tmp_path / "policy.onnx")
    (spec,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "spec"]
    assert PolicySpec.from_dict(spec) == SPEC
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]


def test_the_number_of_steps_is_the_files_own(tmp_path):
    policy = fitted(POLICIES["diffusion"])
    export_onnx(policy, tmp_path / "policy.onnx", steps=1)
    obs, noise = observed(1), torch.zeros(1, 8, 2)
    session = runtime.InferenceSession(str(tmp_path / "policy.onnx"))
    (action,) = session.run(None, {**{key: value.numpy() for key, value in obs.items()}, "noise": noise.numpy()})
    policy.set_steps(1)
    np.testing.assert_allclose(action, policy.act(obs, noise=noise).numpy(), atol=2e-4)


def test_an_operator_that_onnx_lacks_is_named_and_nothing_is_written(tmp_path):
    policy = fitted(POLICIES["gaussian"])
    inner = policy.mean

    class Odd(nn.Module):
        def forward(self, x):
            return inner(x) + torch.linalg.eigvals(x @ x.T).real.sum()

    policy.mean = Odd()
    with pytest.raises(PolicyError, match=r"this policy cannot be written as ONNX \(.*linalg_eig") as error:
        export_onnx(policy, tmp_path / "policy.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_descends_a_gradient_is_refused(tmp_path):
    with pytest.raises(PolicyError) as error:
        export_onnx(fitted(partial(EnergyPolicy, encoder=LowDim, network=MLP)), tmp_path / "policy.onnx")
    assert str(error.value) == (
        "EnergyPolicy takes gradients, for which ONNX has no operator: export a diffusion or flow policy"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    (tmp_path / "policy.onnx").write_text("what was there")
    with pytest.raises(PolicyError, match=r"policy.onnx is not written: its error of .* is above the -1 allowed"):
        export_onnx(fitted(POLICIES["gaussian"]), tmp_path / "policy.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there"]


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(PolicyError, match=r"onnxruntime is missing: pip install 'flowsteer\[onnx\]'"):
        export_onnx(fitted(POLICIES["gaussian"]), tmp_path / "policy.onnx")


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(PolicyError, match="batch must be at least 1, got 0"):
        export_onnx(fitted(POLICIES["gaussian"]), tmp_path / "policy.onnx", batch=0)
    with pytest.raises(PolicyError, match="steps=2: GaussianPolicy does not denoise, leave steps out"):
        export_onnx(fitted(POLICIES["gaussian"]), tmp_path / "policy.onnx", steps=2)
    spec = PolicySpec({"noise": ArraySpec((3,))}, 2, 2, 8, 3, 10.0)
    with pytest.raises(PolicyError, match="observation 'noise' has the name of another input or output of the file"):
        export_onnx(fitted(POLICIES["gaussian"], spec), tmp_path / "policy.onnx")
