import itertools
import os
import shutil
import signal
from functools import partial

import pytest
import torch

from flowsteer.policies.checkpoint import load_trainer, read_tensors
from flowsteer.policies.counting import counting
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.dppo import DPPO
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.exploration import NoiseFloor
from flowsteer.rl_finetune.fpo import FPO
from flowsteer.rl_finetune.gaussian_ppo import GaussianPPO
from flowsteer.rl_finetune.on_policy import FIRST_SEED, OnPolicy
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig
from flowsteer.sim.backends import BACKENDS

ALGORITHMS = {
    "dppo": ("diffusion", partial(DPPO, exploration=partial(NoiseFloor, first=0.2, last=0.2), fine_tuned_steps=2)),
    "dppo_flow": ("flow", partial(DPPO, exploration=partial(NoiseFloor, first=0.2, last=0.2), fine_tuned_steps=4)),
    "fpo": ("flow", partial(FPO, pairs=4)),
    "ppo": ("gaussian", GaussianPPO),
}
SHORT = {
    "decisions": 6,
    "epochs": 2,
    "target_kl": 0.1,
    "max_kl": 10.0,
    "batch_size": 40,
    "critic_batch_size": 24,
    "evaluate_every": 0,
    "save_every": 2,
}


class Record:
    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))


@pytest.fixture
def make_loop(make_policy, make_env):
    def make(name="fpo", folder=None, env_options=None, fresh=False, **config):
        family, algorithm = ALGORITHMS[name]
        policy = make_policy(family, fresh=fresh)
        torch.manual_seed(1)
        options = OnPolicyConfig(**{**SHORT, "env_steps": 400, **config})
        describe = {"policy": {"_target_": "x"}, "spec": policy.spec.to_dict()}
        env = make_env(**(env_options or {}))
        return OnPolicy(algorithm(policy=policy), Critic(2, [32]), env, options, folder=folder, describe=describe)

    return make


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_to_aim(make_loop, name):
    options = {"env_steps": 7500, "epochs": 4, "lr": 1e-2, "gamma": 0.2, "save_every": 10**6}
    # As many decisions in each minibatch, whatever rows a decision has.
    rows = {"dppo": 80, "dppo_flow": 160}.get(name, 40)
    loop = make_loop(name, fresh=True, env_options={"num_envs": 32}, batch_size=rows, **options)
    log = Record()
    assert loop.train(log)
    returns = [row["collect/return"] for _, row in log.rows]
    # At first about -20: the better the aim, the less each of the 12 steps costs.
    assert sum(returns[-5:]) > 0.6 * sum(returns[:5])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_was_stopped_equals_one_that_went_on(make_loop, tmp_path, name):
    whole = make_loop(name, folder=tmp_path / "whole", env_steps=300)
    whole.train(Record())
    wanted = read_tensors(tmp_path / "whole" / "last" / "trainer.safetensors")
    assert any(name.startswith("optimizer.exp_avg.") for name in wanted)
    for steps, iterations in ((90, 1), (180, 2), (270, 3)):
        folder = tmp_path / str(steps)
        make_loop(name, folder=folder, env_steps=steps).train(Record())
        again = make_loop(name, folder=folder, env_steps=300)
        again.resume(folder)
        assert 0 < again.progress.env_steps < whole.progress.env_steps
        assert again.progress.iteration == iterations
        again.train(Record())
        found = read_tensors(folder / "last" / "trainer.safetensors")
        assert found.keys() == wanted.keys()
        assert load_trainer(folder / "last").values == load_trainer(tmp_path / "whole" / "last").values
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=f"stopped after {steps}: {key}")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_minibatch_in_parts_is_the_same_minibatch(make_loop, name):
    whole, parts = (make_loop(name, env_steps=200, micro_batch_size=size) for size in (1000, 7))
    one, other, sizes, step = Record(), Record(), set(), parts.update.step
    parts.update.step = lambda sample, batch: sizes.add(len(batch)) or step(sample, batch)
    whole.train(one)
    parts.train(other)
    assert max(sizes) == 7, "the checks before an update as well"
    for key, value in one.rows[-1][1].items():
        if not key.startswith("time/"):
            assert other.rows[-1][1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for weight, other_weight in zip(whole.algorithm.parameters(), parts.algorithm.parameters(), strict=True):
        torch.testing.assert_close(other_weight, weight, rtol=0, atol=2e-5)


def test_a_compiled_run_learns_the_same_resumes_exactly_and_saves_plain_weights(quick_compiler, make_loop, tmp_path):
    # A network of few kernels, which compiles soonest.
    eager, compiled = (
        make_loop("ppo", folder=tmp_path / str(flag), env_steps=300, compile=flag) for flag in (False, True)
    )
    started = [weight.clone() for weight in compiled.algorithm.parameters()]
    assert compiled.algorithm.network._compiled_call_impl is not None
    assert eager.algorithm.network._compiled_call_impl is None
    for loop in (eager, compiled):
        loop.train(Record())
    for weight, other, before in zip(
        eager.algorithm.parameters(), compiled.algorithm.parameters(), started, strict=True
    ):
        torch.testing.assert_close(other, weight, rtol=1e-3, atol=1e-4)
        assert not torch.equal(other, before)
    one, other = (read_tensors(tmp_path / str(flag) / "last" / "trainer.safetensors") for flag in (False, True))
    assert one.keys() == other.keys()
    part = tmp_path / "part"
    make_loop("ppo", folder=part, env_steps=150, compile=True).train(Record())
    again = make_loop("ppo", folder=part, env_steps=300, compile=True)
    again.resume(part)
    again.train(Record())
    for key, value in read_tensors(part / "last" / "trainer.safetensors").items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=0, msg=key)


def test_the_network_of_a_compiled_run_is_counted_when_it_is_judged(quick_compiler, make_loop):
    loop = make_loop("fpo", env_steps=100, compile=True)
    loop.train(Record())
    with counting(loop.acting) as counter:
        loop.acting.act({"target": torch.zeros(3, 1, 2)})
    assert counter.evaluations == 3 * 4
    assert all(p is q for p, q in zip(loop.acting.parameters(), loop.algorithm.policy.parameters(), strict=True))


def test_a_checkpoint_between_restarts_resumes_exactly(make_loop, tmp_path):
    """What runs in a simulator cannot be saved: episodes start anew at a checkpoint, in both runs."""
    options = {"restart_every": 4, "save_every": 3}
    whole = make_loop("fpo", folder=tmp_path / "whole", env_steps=600, **options)
    save, middle = whole.save, tmp_path / "middle"

    def saving():
        save()
        if whole.progress.iteration == 3:
            shutil.copytree((tmp_path / "whole" / "last").resolve(), middle)

    whole.save = saving
    whole.train(Record())
    assert whole.progress.iteration > 5
    again = make_loop("fpo", folder=tmp_path / "again", env_steps=600, **options)
    again.resume(middle)
    again.train(Record())
    ends = [load_trainer(tmp_path / run / "last") for run in ("whole", "again")]
    assert ends[0].values == ends[1].values
    assert all(value.equal(ends[1].tensors[key]) for key, value in ends[0].tensors.items())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_compiled_is_what_learns(make_loop, name):
    algorithm = make_loop(name).algorithm
    learning = {parameter for parameter in algorithm.parameters() if parameter.requires_grad}
    assert set(algorithm.network.parameters()) <= learning


@pytest.mark.parametrize("train_encoder", [True, False])
def test_from_images_the_encoder_learns_if_it_is_told_to(seeing_aim, tmp_path, train_encoder):
    task, make_policy = seeing_aim

    def make(env_steps, env):
        policy = make_policy()
        algorithm = FPO(policy, pairs=2, train_encoder=train_encoder)
        config = OnPolicyConfig(**{**SHORT, "env_steps": env_steps, "critic_warmup": 0, "micro_batch_size": 16})
        describe = {"policy": {"_target_": "x"}, "spec": policy.spec.to_dict()}
        critic = Critic(policy.encoder.feature_dim)
        return OnPolicy(algorithm, critic, env, config, folder=tmp_path / "run", describe=describe)

    with BACKENDS["gym"](task, 4, 1, workers=0, device="cpu") as env:
        loop = make(96, env)
        before = {key: value.clone() for key, value in loop.algorithm.policy.state_dict().items()}
        log = Record()
        loop.train(log)
        assert all(row["train/first_log_ratio"] < 1e-4 for _, row in log.rows)
        assert log.rows[-1][1]["train/minibatches"] > 1
        moved = {key for key, value in loop.algorithm.policy.state_dict().items() if not value.equal(before[key])}
        assert any(key.startswith("network.") for key in moved)
        assert any(key.startswith("encoder.") for key in moved) == train_encoder
        again = make(192, env)
        again.resume(tmp_path / "run")
        again.train(Record())


def test_the_loop_counts_and_logs(make_loop):
    log = Record()
    loop = make_loop("dppo")
    loop.train(log)
    steps = [step for step, _ in log.rows]
    assert steps == sorted(steps)
    assert steps[-1] >= 400
    last = log.rows[-1][1]
    assert last["count/decisions"] == 8 * 6 * len(log.rows)
    for name in ("kl", "clipped", "loss", "value_loss", "explained_variance", "noise_std", "signal", "advantage_std"):
        assert f"train/{name}" in last
    assert {"clipped/0", "clipped/1", "time/collect_s", "time/update_s", "collect/return", "collect/success"} <= set(
        last
    )
    # The critic learns alone first.
    assert "train/kl" not in log.rows[0][1]


def test_episodes_have_seeds_that_no_evaluation_has_and_none_twice(make_loop, tmp_path):
    loop = make_loop(folder=tmp_path / "run")
    started = []
    reset = loop.env.reset
    loop.env.reset = lambda seeds: (started.append(loop.progress.next_seed), reset(seeds))[1]
    loop.train(Record())
    assert started[0] == FIRST_SEED
    assert started == sorted(set(started))
    assert min(b - a for a, b in itertools.pairwise(started)) >= 8


def test_a_ratio_that_is_not_one_before_the_first_update_stops_the_run(make_loop):
    loop = make_loop("dppo", critic_warmup=0)
    explore = loop.algorithm.explore

    def forgetful(obs, features, generator):
        explored = explore(obs, features, generator)
        explored.memory["log_prob"] += 0.01
        return explored

    loop.algorithm.explore = forgetful
    with pytest.raises(FinetuneError, match=r"before the first update the log-ratio is 0\.01 where it must be 0"):
        loop.train(Record())


@pytest.mark.parametrize("broken", ["target", "reward"])
def test_what_is_not_finite_names_its_environment_and_seed(make_loop, tmp_path, broken):
    loop = make_loop(folder=tmp_path / "run", env_options={"nan_seed": FIRST_SEED + 3, "nan_in": broken})
    with pytest.raises(
        FinetuneError,
        match=rf"environment 3 gave a {broken} that is not finite in the episode of seed {FIRST_SEED + 3}: ",
    ):
        loop.train(Record())
    assert load_trainer(tmp_path / "run" / "last").values["progress"]["env_steps"] == 0


def test_a_policy_that_moves_too_far_ends_the_run_and_keeps_the_last_checkpoint(make_loop, tmp_path):
    loop = make_loop("ppo", folder=tmp_path / "run", lr=10.0, target_kl=0.1, max_kl=0.5, save_every=1)
    with pytest.raises(FinetuneError, match=r"moved the policy by a KL of .* \(train\.max_kl=0\.5\): lower train\.lr"):
        loop.train(Record())
    kept = read_tensors(tmp_path / "run" / "last" / "policy.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())


def test_the_last_step_of_an_update_is_looked_at_as_well(make_loop):
    options = {"epochs": 1, "batch_size": 10**6, "critic_warmup": 0}
    with pytest.raises(FinetuneError, match=r"moved the policy by a KL of .* \(train\.max_kl=0\.5\)"):
        make_loop("ppo", lr=10.0, target_kl=0.1, max_kl=0.5, **options).train(Record())
    log = Record()
    make_loop("ppo", **options).train(log)
    assert all(row["train/minibatches"] == 1 and row["train/kl"] > 0 for _, row in log.rows)


def test_augmentation_is_no_step_of_the_policy(seeing_aim):
    """Log-ratios to what was seen without it would end every update before it has begun."""
    task, make_policy = seeing_aim
    policy = make_policy()
    algorithm = FPO(policy, pairs=2, train_encoder=True)
    forward = policy.encoder.forward
    # What augments in training mode; all that is seen is another picture.
    policy.encoder.forward = lambda obs: forward(
        {key: 255 - value if policy.encoder.training else value for key, value in obs.items()}
    )
    config = OnPolicyConfig(**{**SHORT, "env_steps": 96, "critic_warmup": 0, "target_kl": 1e-9, "lr": 1e-12})
    log = Record()
    with BACKENDS["gym"](task, 4, 1, workers=0, device="cpu") as env:
        OnPolicy(algorithm, Critic(policy.encoder.feature_dim), env, config).train(log)
    assert all(row["train/minibatches"] > 1 for _, row in log.rows)


def test_an_iteration_of_which_nothing_is_left_is_refused(make_loop):
    loop = make_loop("fpo")
    rollout = loop.collect()
    rollout.kept[:] = False
    with pytest.raises(FinetuneError, match="the simulator lost the episode of every decision of an iteration"):
        loop.update(rollout, critic_alone=True)


def test_a_weight_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(make_loop, tmp_path):
    loop = make_loop("ppo", folder=tmp_path / "run", critic_warmup=0)
    update = loop.update._update_critic

    def spoil(sample):
        next(loop.critic.parameters()).data.fill_(torch.nan)
        return update(sample)

    loop.update._update_critic = spoil
    with pytest.raises(FinetuneError, match=r"a weight is not finite after the update: lower train.lr or train.critic"):
        loop.train(Record())
    assert load_trainer(tmp_path / "run" / "last").values["progress"]["env_steps"] == 0


def test_the_update_ends_where_the_target_is_passed(make_loop):
    longest = []
    for target_kl in (1e-6, 1e6):
        log = Record()
        make_loop("ppo", lr=0.03, batch_size=8, target_kl=target_kl, max_kl=1e6).train(log)
        longest.append(max(row["train/minibatches"] for _, row in log.rows if "train/minibatches" in row))
    # 48 decisions are 6 minibatches, twice; one step passes the small target, which the next minibatch finds.
    assert longest == [1, 12]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_checked_and_told_of_the_signal_is_the_first_minibatch_itself(make_loop, name):
    loop = make_loop(name, critic_warmup=0, epochs=1)
    step, calls = loop.update.step, []
    loop.update.step = lambda sample, batch: calls.append(batch) or step(sample, batch)
    numbers = loop.update(loop.collect(), critic_alone=False)
    minibatches = max(1, 48 * loop.algorithm.rows // 40)
    assert numbers["train/minibatches"] == minibatches
    # The first in two halves, the others, and a look at the last one.
    assert len(calls) == minibatches + 2
    rows = torch.cat(calls[:-1])
    assert sorted(rows.tolist()) == list(range(48 * loop.algorithm.rows)), "each row once"
    assert -1 <= numbers["train/signal"] <= 1


def test_the_signal_by_hand(make_loop):
    loop = make_loop("ppo", critic_warmup=0)
    update = loop.update
    sample, _ = update.sample(loop.collect())
    batch = torch.arange(48)
    _, step, numbers = update._first_minibatch(sample, batch, num_envs=8)
    whole = update._gradient()
    parts = []
    for side in (0, 1):
        update.optimizer.zero_grad()
        half = batch[batch % 8 % 2 == side]
        update.step(sample, half).loss.backward()
        parts.append(update._gradient())
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)
    assert numbers["train/signal"] == pytest.approx(torch.cosine_similarity(*parts, dim=0).item(), abs=1e-4)
    assert len(step.log_ratio) == 48


def test_a_sum_has_as_much_more_rounding_as_it_has_elements(make_loop):
    loop = make_loop("ppo", critic_warmup=0)
    assert loop.algorithm.scale == 4, "2 executed steps of 2 dimensions"
    rollout = loop.collect()
    rollout.memory["log_prob"] += 2e-4
    loop.update(rollout, critic_alone=False)
    rollout = loop.collect()
    rollout.memory["log_prob"] += 1e-3
    with pytest.raises(FinetuneError, match=r"before the first update the log-ratio is 0\.001"):
        loop.update(rollout, critic_alone=False)


def test_what_chunks_lead_to_is_the_next_observation_or_the_end_of_the_episode(make_loop):
    loop = make_loop("fpo", decisions=8)
    finals, step_chunk = [], loop.env.step_chunk
    loop.env.step_chunk = lambda actions: finals.append(result := step_chunk(actions)) or result
    rollout = loop.collect()
    assert 0 < rollout.ended.sum() < rollout.ended.numel()
    expected = torch.stack([loop.algorithm.policy.features(result.final_obs) for result in finals])
    torch.testing.assert_close(loop.update._led_to(rollout), expected)
    encoded = [loop.algorithm.policy.features({"target": obs}) for obs in rollout.obs["target"]]
    torch.testing.assert_close(rollout.features, torch.stack(encoded))


def test_the_critic_learns_what_a_trained_encoder_will_show_it(seeing_aim):
    task, make_policy = seeing_aim
    policy = make_policy()
    config = OnPolicyConfig(**{**SHORT, "env_steps": 96, "critic_warmup": 0, "lr": 0.01, "target_kl": 1.0})
    with BACKENDS["gym"](task, 4, 1, workers=0, device="cpu") as env:
        loop = OnPolicy(FPO(policy, train_encoder=True), Critic(policy.encoder.feature_dim), env, config)
        shown, learn = [], loop.update._update_critic
        loop.update._update_critic = lambda sample: shown.append(sample) or learn(sample)
        rollout = loop.collect()
        loop.update(rollout, critic_alone=False)
    now = policy.features({key: array.flatten(0, 1) for key, array in rollout.obs.items()})
    assert (now - rollout.features.flatten(0, 1)).abs().max() > 1e-3
    torch.testing.assert_close(shown[0].features, now)


def test_a_lost_episode_teaches_nothing_whatever_it_ended_with(make_loop):
    loop = make_loop("fpo")
    rollout = loop.collect()
    lost = s, n = tuple(rollout.ended.nonzero()[0].tolist())
    rollout.kept[lost] = False
    rollout.reward[lost] = float("nan")
    rollout.ended_obs["target"][0] = float("nan")
    sample, numbers = loop.update.sample(rollout)
    assert s * 8 + n not in sample.kept.tolist()
    assert len(sample.kept) == 47
    assert numbers["collect/lost"] == 1
    assert sample.advantage[sample.kept].isfinite().all()
    assert loop.update.reward_scale.std > 0
    numbers = loop.update(rollout, critic_alone=False)
    assert all(value == value for value in numbers.values())


def test_a_policy_whose_actions_are_relative_is_tuned_as_any(make_policy, make_env):
    policy = make_policy("flow", relative_to="target")
    algorithm = DPPO(policy, partial(NoiseFloor, first=0.2, last=0.2), fine_tuned_steps=2)
    options = OnPolicyConfig(**{**SHORT, "env_steps": 300, "critic_warmup": 0})
    assert OnPolicy(algorithm, Critic(2), make_env(), options).train(Record())


def test_an_option_that_is_changed_when_resuming_counts(make_loop, tmp_path):
    make_loop("dppo", folder=tmp_path / "run").train(Record())
    again = make_loop("dppo")
    again.algorithm.clip.fill_(0.5)
    again.algorithm.exploration.floor.fill_(0.7)
    again.resume(tmp_path / "run")
    assert again.algorithm.clip.tolist() == [0.5, 0.5]
    assert again.algorithm.exploration.floor.tolist() == pytest.approx([0.7, 0.7])


def test_a_simulator_that_fails_while_judging_costs_nothing(make_loop, tmp_path):
    loop = make_loop("fpo", folder=tmp_path / "run", evaluate_every=2, save_every=100)
    judged = iter(range(100))

    def evaluate(policy, step):
        if next(judged):
            raise OSError("the simulator is gone")
        return {}, 0.0

    with pytest.raises(OSError, match="the simulator is gone"):
        loop.train(Record(), evaluate)
    progress = load_trainer(tmp_path / "run" / "last").values["progress"]
    assert progress["iteration"] == 2
    assert progress["next_seed"] > max(loop.env.seeds), "no episode is met twice"


def test_judging_comes_first_and_the_best_is_kept(make_loop, tmp_path):
    scores = iter([0.5, 0.9, 0.1, 0.2, 0.3, 0.4, 0.2, 0.1])
    judged = []

    def evaluate(policy, step):
        judged.append((policy, step))
        return {"eval/success": 0.0}, next(scores)

    loop = make_loop("dppo", folder=tmp_path / "run", evaluate_every=1, save_every=100)
    loop.train(Record(), evaluate)
    assert judged[0][1] == 0
    assert judged[0][0] is loop.acting
    assert (tmp_path / "run" / "best").resolve().name == f"{judged[1][1]:09d}"
    assert (tmp_path / "run" / "last").resolve().name == f"{loop.progress.env_steps:09d}"


def test_a_signal_saves_and_stops(make_loop, tmp_path):
    loop = make_loop("fpo", folder=tmp_path / "run", env_steps=10**9)
    collect, count = loop.collect, iter(range(100))

    def interrupted():
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect()

    loop.collect = interrupted
    assert not loop.train(Record())
    assert load_trainer(tmp_path / "run" / "last").values["progress"]["iteration"] == 4


def test_a_checkpoint_of_another_run_is_refused(make_loop, tmp_path):
    make_loop("fpo", folder=tmp_path / "run").train(Record())
    with pytest.raises(FinetuneError, match=r"the training state does not fit \(.+ .+\): it cannot be resumed"):
        make_loop("ppo").resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_steps": 0}, "train.env_steps must be at least 1, got 0"),
        ({"lr": float("nan")}, "train.lr must be positive and finite, got nan"),
        (
            {"target_kl": 0.2, "max_kl": 0.1},
            "train.target_kl=0.2, where an update ends, must not be above train.max_kl=0.1, where the run ends",
        ),
        ({"critic_warmup": -1}, "train.critic_warmup must not be negative, got -1"),
        ({"gamma": 1.5}, "train.gamma must be in [0, 1], got 1.5"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(FinetuneError) as error:
        OnPolicyConfig(**options)
    assert str(error.value) == message


UPDATE = """
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.gaussian_ppo import GaussianPPO
from flowsteer.rl_finetune.on_policy import OnPolicy
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig
from flowsteer.rl_finetune.rollout import Episodes, Rollout, collect
from flowsteer.sim.backends import BACKENDS

env = BACKENDS["gym"](kit.Aim(), 8, 1, workers=0, device="cpu")
config = OnPolicyConfig(decisions=6, epochs=1, batch_size=10**6, critic_batch_size=10**6, critic_warmup=0)
loop = OnPolicy(GaussianPPO(kit.policy_of("gaussian")), Critic(2), env, config, accelerator=accelerator)
episodes = Episodes(8, env.device)
rollout, _ = collect(loop.algorithm, env, env.reset(range(10**6)), 6, torch.Generator().manual_seed(0), episodes)
mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
half = lambda tensors: {name: value[:, mine] for name, value in tensors.items()}
ended_here = (rollout.ended.nonzero()[:, 1] // (8 // processes)) == rank
part = Rollout(half(rollout.obs), rollout.features[:, mine], {k: v[ended_here] for k, v in rollout.ended_obs.items()},
               {k: v[mine] for k, v in rollout.next_obs.items()}, half(rollout.memory), rollout.reward[:, mine],
               rollout.terminated[:, mine], rollout.ended[:, mine], rollout.kept[:, mine])
numbers = loop.update(part, critic_alone=False)
weights = [p.double().sum().item() for p in [*loop.algorithm.policy.parameters(), *loop.critic.parameters()]]
result = [weights, numbers["train/reward_std"], numbers["train/advantage_std"]]
"""


def test_two_processes_learn_what_one_learns_from_all_their_episodes(run_processes):
    (weights, *numbers), (shared_weights, *shared_numbers) = (run_processes(UPDATE, n) for n in (1, 2))
    assert shared_numbers == pytest.approx(numbers, rel=1e-5)
    assert shared_weights == pytest.approx(weights, rel=1e-4, abs=1e-4)


RUN = """
from functools import partial

from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.dppo import DPPO
from flowsteer.rl_finetune.exploration import LearnedNoise
from flowsteer.rl_finetune.on_policy import OnPolicy
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig
from flowsteer.sim.backends import BACKENDS


class Nothing:
    def log(self, step, values):
        pass


def make(env_steps, name):
    env = BACKENDS["gym"](kit.Aim(), 4, 1, workers=0, device="cpu")
    algorithm = DPPO(kit.policy_of("flow"), LearnedNoise, fine_tuned_steps=2)
    torch.manual_seed(1)
    config = OnPolicyConfig(decisions=6, epochs=2, batch_size=40, critic_batch_size=24, target_kl=0.1, max_kl=10.0,
                            evaluate_every=2, save_every=2, restart_every=2, env_steps=env_steps)
    describe = {"policy": {"_target_": "x"}, "spec": algorithm.policy.spec.to_dict()}
    return OnPolicy(algorithm, Critic(2, [16]), env, config, accelerator=accelerator, folder=Path(base, name),
                    describe=describe)


judge = lambda policy, step: ({}, 1e-6 * step)
whole = make(480, "whole")
whole.train(Nothing(), judge)
make(192, "part").train(Nothing(), judge)
accelerator.wait_for_everyone()
again = make(480, "part")
again.resume(Path(base, "part"))
again.train(Nothing(), judge)
weights = [torch.cat([v.flatten().float() for v in loop.algorithm.state_dict().values()]) for loop in (whole, again)]
everywhere = accelerator.gather(weights[0][None])
result = [torch.equal(*weights), all(torch.equal(row, weights[0]) for row in everywhere), whole.progress.env_steps]
"""


def test_two_processes_collect_learn_stop_and_resume_as_one_run(run_processes, tmp_path):
    """Bit for bit: the same weights in both, and after a stop."""
    resumed_exactly, same_everywhere, env_steps = run_processes(RUN, 2, base=str(tmp_path))
    assert resumed_exactly
    assert same_everywhere
    assert env_steps >= 480
