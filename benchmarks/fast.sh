#!/bin/bash
# Fewer evaluations of a Push-T policy, as in benchmarks/README.md: benchmarks/fast.sh flow|diffusion SEED
# Judges runs/POLICY+SEED of pusht.sh with real-time iteration, at its own Ta and re-planning at every step, and a student
# of one step, runs/POLICY+SEED-1, on one thread. Each is judged in runs/.../eval-*.
set -e
run=runs/$1$2 seed=$2
export OMP_NUM_THREADS=1
judge() { flowsteer eval checkpoint="$1" episodes=100 seed=10000 out="$1/$2" "${@:3}"; }

every_step=horizon.execution_steps=1
judge "$run" eval-every-step $every_step
# Nothing may be good enough; the student does not need it.
if flowsteer rti checkpoint="$run" episodes=50; then
    judge "$run" eval-rti execution=rti
fi
if flowsteer rti checkpoint="$run" episodes=50 $every_step; then
    judge "$run" eval-rti-every-step execution=rti $every_step
fi

flowsteer distill checkpoint="$run" steps=1 train.steps=1000 train.warmup_steps=100 train.evaluate_every=0 seed="$seed" out="$run-1"
judge "$run-1" eval-100x10000
judge "$run-1" eval-every-step $every_step
