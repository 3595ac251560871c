#!/bin/bash
# Push-T from state, as in benchmarks/README.md: benchmarks/pusht.sh flow|diffusion|gaussian|ebt SEED [option=value ...]
# Trains and judges runs/POLICY+SEED on one thread; the demonstrations come from `flowsteer data fetch pusht data`.
set -e
policy=$1 seed=$2 run=runs/$1$2
shift 2
# The Gaussian has no network of its own to choose, and neither it nor an energy has anything to clip while it samples.
declare -A own=(
    [flow]="policy.network.hidden=384 policy.clip=null train.steps=10000"
    [diffusion]="policy.network.hidden=384 policy.clip=null train.steps=10000"
    [gaussian]="train.steps=10000"
    [ebt]="network=mlp train.lr=0.003 train.steps=8000"
)
export OMP_NUM_THREADS=1
# shellcheck disable=SC2086 # one option a word
flowsteer train task=pusht_features dataset=data/pusht/pusht_cchi_v7_replay.zarr policy="$policy" seed="$seed" out="$run" \
    data.mirror=true data.hindsight=true policy.relative_to=agent_position 'policy.normalizers={action: mean_std}' \
    horizon.observation_steps=1 train.evaluate_every=2500 ${own[$policy]:?is for no policy of that name} "$@"
flowsteer eval checkpoint="$run" episodes=100 seed=10000
