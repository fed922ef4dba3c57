#!/usr/bin/env bash
# Every study of MENAS, a line each; the tables and figures of the README come from what they write under results/.
#
#   ./experiments.sh                    all of it; a finished run is skipped, an interrupted one goes on
#   SMOKE=1 ./experiments.sh            the same studies at toy sizes, minutes on a laptop, under runs/smoke
#   PRESET=paper ./experiments.sh       the published schedules, on a GPU box
#   LAUNCH="srun --gres=gpu:1 -c 4" ./experiments.sh     a prefix for every run
#
# Hardware and hours: --preset ptb is for a laptop: on two CPU cores with bfloat16 half an hour to an hour a network or
# search, about twenty hours in all. --preset paper is the published schedule, for a GPU; it was not run by us.
set -euo pipefail
cd "$(dirname "$0")"
preset=${PRESET:-ptb} out=${OUT:-results} tiny=tiny
[ -z "${SMOKE:-}" ] || { preset=smoke tiny=smoke out=${OUT:-runs/smoke}; }

run() { # folder, study, settings
    local folder=$1; shift
    ${LAUNCH:-} python menas.py "$@" --out "$out/$folder"
}

# Does it work? The toy corpus: a cell found in a minute, beside an LSTM. Expected: within 1.3 times the floor of 5.83.
run tiny-search search --preset $tiny --retrain

# What do the baselines reach under one budget? Expected on PTB: an LSTM below 102, the ENAS cell below 105 (test).
run $preset-lstm train --preset $preset --cell lstm
run $preset-enas train --preset $preset --cell enas
run $preset-darts_v2 train --preset $preset --cell darts_v2
run $preset-enas_lm train --preset $preset --cell enas_lm
run $preset-chain train --preset $preset --cell chain
run $preset-random-1 train --preset $preset --cell random:1
run $preset-random-2 train --preset $preset --cell random:2
# The LSTM with as many recurrent weights as the ENAS cell at 200 units: 400 units, projected to 200.
run $preset-lstm-400 train --preset $preset --cell lstm --lstm_hidden 400

# ENAS itself, and random search with weight sharing: the same loop, the controller left untrained.
run $preset-search search --preset $preset
run $preset-random-search search --preset $preset --controller untrained
# The cell found, and the best of as many uniform architectures under the same shared weights.
run $preset-found train --preset $preset --cell "$out/$preset-search/cell.json"
run $preset-uniform-best train --preset $preset --cell "$out/$preset-search/uniform_cell.json"

# The extra gradient, first where everything is known: ten seconds, every check must hold.
${LAUNCH:-} python toy_enas.py "$out/toy_enas.png"
# What does it cost, and how noisy is it? Expected: unrolled below 5 times the plain controller step.
run cost cost --preset $tiny --threads 1
run cost-$preset cost --preset $preset --batch 20 --shared_steps 20 --controller_steps 5 --threads 1
# Is the gradient that looks ahead closer to the next one? Expected: yes, a fresh one on the same samples.
run similarity similarity --preset $tiny
# Does it find better cells? Expected: no, but for a task made so that it must. Half an hour, two hours, and ten minutes.
run extra-toy extra --preset $tiny
run extra-$preset extra --preset $preset
run extra-frozen extra --preset $tiny --task frozen --lr 2 --clip 1 --retrain false --replicas 4

# What is in the space, and does it matter? Expected on the toy corpus: see the README. Half an hour, then minutes each.
run spaces spaces --preset $tiny
run state state --preset $tiny
run anneal anneal --preset $tiny
run optimizer optimizer --preset $tiny
run conditional conditional --preset $tiny
# The same on Penn Treebank, not run by us: one and a half to three hours each on a laptop.
for study in spaces state anneal optimizer; do
    [ -n "${SMOKE:-}" ] || run $study-$preset $study --preset $preset
done

# How fast? Ratios to the plain loop. Expected: above 1, but for scoring at 1000 units in float32.
run bench bench --preset $preset --hidden $([ -z "${SMOKE:-}" ] && echo 1000 || echo 32)

python menas.py report --out "$out"
