#!/bin/bash
# Fine-tuning on Push-T, as in benchmarks/README.md: benchmarks/pusht_finetune.sh weak|strong dppo|fpo SEED [option=value ...]
# Clones runs/pusht_weak from the human demonstrations, stopped early (or runs/pusht_strong, not stopped and with their
# ends moved onto the goal), where it is not there yet; then fine-tunes it to runs/pusht_weak_ALGO_SEED. Both are judged,
# all on one thread; the demonstrations come from `flowsteer data fetch pusht data`. FILMS=0 leaves out the films.
set -e
kind=$1 algo=$2 seed=$3 base=runs/pusht_$1 run=runs/pusht_$1_$2_$3
shift 3
export OMP_NUM_THREADS=1
films=${FILMS:-1}
declare -A cloned=([weak]="train.steps=3000" [strong]="train.steps=15000 data.hindsight=true")
if [ ! -e "$base" ]; then
    # shellcheck disable=SC2086 # one option a word
    flowsteer train task=pusht_features dataset=data/pusht/pusht_cchi_v7_replay.zarr policy=flow out="$base" \
        data.mirror=true policy.relative_to=agent_position 'policy.normalizers={action: mean_std}' policy.clip=null \
        policy.network.hidden=128 policy.network.blocks=3 policy.steps=5 horizon.observation_steps=1 \
        ${cloned[$kind]} train.warmup_steps=200 train.evaluate_every=0
    flowsteer eval checkpoint="$base" episodes=100 seed=10000 eval.videos="$films"
fi
declare -A own=(
    [dppo]="algo.fine_tuned_steps=5 algo.clip_first=0.01 train.lr=2e-4 train.target_kl=0.01 train.batch_size=5000"
    [fpo]="algo.surrogate=aspo algo.perturbation=0.1 train.lr=5e-5 train.target_kl=0.01 train.batch_size=1000"
)
# shellcheck disable=SC2086 # one option a word
flowsteer finetune algo="$algo" checkpoint="$base" seed="$seed" out="$run" ${own[$algo]} \
    sim.num_envs=128 train.decisions=76 train.env_steps=2900000 train.evaluate_every=5 eval.episodes=100 eval.videos="$films" "$@"
flowsteer eval checkpoint="$run" episodes=100 seed=10000 eval.videos="$films"
