#!/bin/bash
# Push-T from state, as in benchmarks/README.md: benchmarks/pusht.sh flow|diffusion|gaussian SEED [option=value ...]
# Trains and judges runs/POLICY+SEED on one thread; the demonstrations come from `flowsteer data fetch pusht data`.
set -e
policy=$1 seed=$2 run=runs/$1$2
shift 2
# The Gaussian has no network of its own to choose, and nothing to clip while it samples.
denoising=(policy.network.hidden=384 policy.clip=null)
[ "$policy" = gaussian ] && denoising=()
export OMP_NUM_THREADS=1
flowsteer train task=pusht_features dataset=data/pusht/pusht_cchi_v7_replay.zarr policy="$policy" seed="$seed" out="$run" \
    data.mirror=true data.hindsight=true policy.relative_to=agent_position 'policy.normalizers={action: mean_std}' \
    "${denoising[@]}" horizon.observation_steps=1 train.steps=10000 train.evaluate_every=2500 "$@"
flowsteer eval checkpoint="$run" episodes=100 seed=10000
