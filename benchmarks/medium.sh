#!/bin/bash
# A medium runner, cloned and fine-tuned, as in benchmarks/README.md:
# benchmarks/medium.sh hopper|halfcheetah flow|diffusion SEED [option=value ...]
# Learns runs/TASK_medium from nothing, clones runs/TASK_medium_POLICY from its episodes, each where it is not there
# yet; then fine-tunes that to runs/TASK_medium_POLICY_SEED. All are judged, on one thread. FILMS=0 leaves out the films.
set -e
task=$1 policy=$2 seed=$3 base=runs/$1_medium_$2 run=runs/$1_medium_$2_$3
shift 3
export OMP_NUM_THREADS=1
films=${FILMS:-1}
declare -A learnt=([hopper]=800000 [halfcheetah]=300000)
if [ ! -e data/"$task" ]; then
    FILMS=0 RUN=runs/"$task"_medium benchmarks/runner.sh "$task" fpo 1 train.env_steps="${learnt[$task]}"
    flowsteer data collect checkpoint=runs/"$task"_medium only_successful=false episodes=200 out=data/"$task"
fi
if [ ! -e "$base" ]; then
    flowsteer train task="$task" dataset=data/"$task"/"$task".zarr policy="$policy" out="$base" \
        horizon.observation_steps=1 horizon.prediction_steps=4 horizon.execution_steps=4 \
        policy.network.hidden=128 policy.network.blocks=3 policy.steps=5 train.steps=5000 train.evaluate_every=0
    flowsteer eval checkpoint="$base" episodes=100 seed=10000 eval.videos="$films"
fi
flowsteer finetune algo=dppo checkpoint="$base" seed="$seed" out="$run" \
    algo.fine_tuned_steps=5 algo.clip_first=0.01 train.lr=2e-4 train.target_kl=0.01 train.batch_size=2000 \
    train.gamma=0.97 sim.num_envs=32 train.decisions=128 train.restart_every=8 \
    train.env_steps=1980000 train.evaluate_every=10 eval.episodes=20 eval.videos="$films" "$@"
flowsteer eval checkpoint="$run" episodes=100 seed=10000 eval.videos="$films"
