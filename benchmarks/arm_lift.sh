#!/bin/bash
# arm_lift, as in benchmarks/README.md: benchmarks/arm_lift.sh flow|diffusion SEED [option=value ...]
# Clones runs/arm_POLICY from 30 demonstrations, stopped early, where it is not there yet; then fine-tunes it to
# runs/arm_POLICY_SEED. Both are judged, all on one thread. FILMS=0 leaves out the films.
set -e
policy=$1 seed=$2 base=runs/arm_$1 run=runs/arm_$1_$2
shift 2
export OMP_NUM_THREADS=1
films=${FILMS:-1}
[ -e data/arm ] || flowsteer data collect task=arm_lift episodes=30 noise.std=0.02 out=data/arm
if [ ! -e "$base" ]; then
    flowsteer train task=arm_lift dataset=data/arm/arm_lift.zarr policy="$policy" out="$base" \
        horizon.observation_steps=1 horizon.prediction_steps=8 horizon.execution_steps=4 \
        policy.network.hidden=128 policy.network.blocks=3 \
        train.steps=300 train.warmup_steps=50 train.batch_size=128 train.evaluate_every=0
    flowsteer eval checkpoint="$base" episodes=100 seed=10000 eval.videos="$films"
fi
flowsteer finetune algo=dppo checkpoint="$base" seed="$seed" out="$run" \
    algo.steps=5 algo.fine_tuned_steps=5 algo.clip_first=0.01 train.lr=2e-4 train.target_kl=0.01 train.batch_size=7500 \
    sim.num_envs=150 train.decisions=100 train.env_steps=1200000 train.evaluate_every=5 eval.episodes=100 eval.videos="$films" "$@"
flowsteer eval checkpoint="$run" episodes=100 seed=10000 eval.videos="$films"
