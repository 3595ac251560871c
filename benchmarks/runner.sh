#!/bin/bash
# A runner from nothing, as in benchmarks/README.md: benchmarks/runner.sh hopper|halfcheetah fpo|ppo SEED [option=value ...]
# Learns runs/TASK_ALGO_SEED, or the folder RUN, and judges it, on one thread. FILMS=0 leaves out the films.
set -e
task=$1 algo=$2 seed=$3 run=${RUN:-runs/$1_$2_$3}
shift 3
export OMP_NUM_THREADS=1
films=${FILMS:-1}
flow="policy=flow policy.network.hidden=64 policy.network.blocks=2 policy.steps=5 algo.perturbation=0.3 algo.surrogate=aspo train.target_kl=0.01 train.batch_size=256"
gaussian="policy=gaussian policy.hidden=[128,128]"
declare -A own=(
    [hopper fpo]="$flow algo.as_eps=true" [hopper ppo]="$gaussian"
    [halfcheetah fpo]="$flow policy.prediction=x0 algo.clip=0.01" [halfcheetah ppo]="$gaussian"
)
# shellcheck disable=SC2086 # one option a word
flowsteer finetune task="$task" algo="$algo" seed="$seed" out="$run" ${own[$task $algo]} \
    horizon.observation_steps=1 horizon.prediction_steps=4 horizon.execution_steps=4 train.gamma=0.97 \
    sim.num_envs=32 train.decisions=128 train.restart_every=8 train.env_steps=1980000 train.evaluate_every=10 \
    eval.episodes=20 eval.videos="$films" "$@"
flowsteer eval checkpoint="$run" episodes=100 seed=10000 eval.videos="$films"
