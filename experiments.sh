#!/usr/bin/env bash
# Every study of MENAS, a line each; the tables and figures of the README come from what they write under results/.
#
#   ./experiments.sh                    all of it; a finished run is skipped, an interrupted one goes on
#   SMOKE=1 ./experiments.sh            the same studies at toy sizes, minutes on a laptop, under runs/smoke
#   PRESET=paper ./experiments.sh       the published schedules, on a GPU box
#   LAUNCH="srun --gres=gpu:1 -c 4" PARTS=8 ./experiments.sh
#                                       on a cluster: independent runs at once, each behind this prefix, and the
#                                       sub-runs of a study shared out among so many commands
#   LAUNCH=echo ./experiments.sh        only shows the commands
#
# Hardware and hours: --preset ptb is for a laptop: on two CPU cores with bfloat16 half an hour to an hour a network or
# search, about twenty hours in all. --preset paper is the published schedule, for a GPU; it was not run by us.
set -euo pipefail
cd "$(dirname "$0")"
[[ ${PARTS:-1} =~ ^[1-9][0-9]*$ ]] || { echo "PARTS=$PARTS is not a number of commands" >&2; exit 2; }
preset=${PRESET:-ptb} out=${OUT:-results} tiny=tiny jobs=()
[ -z "${SMOKE:-}" ] || { preset=smoke tiny=smoke out=${OUT:-runs/smoke}; }

run() { # folder, study, settings: with LAUNCH in the background
    local folder=$1; shift
    if [ -n "${LAUNCH:-}" ]; then $LAUNCH python menas.py "$@" --out "$out/$folder" & jobs+=($!)
    else python menas.py "$@" --out "$out/$folder"; fi
}

finish() { # wait for what runs in the background; stop if something failed
    local job; for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job"; done; jobs=()
}

share() { # the same for a study: its searches, then its networks shared out, then the study itself
    local part stage
    for stage in searches networks; do
        for part in $([ "${PARTS:-1}" -eq 1 ] || seq "$PARTS"); do run "$@" --part "$part/$PARTS"; done
        [ "${PARTS:-1}" -eq 1 ] || finish
    done
    run "$@"
}

# Does it work? The toy corpus: a cell found in a minute, beside an LSTM. Expected: within 1.3 times the floor of 5.83.
run tiny-search search --preset $tiny --retrain

# What do the baselines reach under one budget? Expected on PTB (test): LSTM below 102, ENAS below 105, chain 650.
run $preset-lstm train --preset $preset --cell lstm
run $preset-enas train --preset $preset --cell enas
run $preset-darts_v2 train --preset $preset --cell darts_v2
run $preset-enas_lm train --preset $preset --cell enas_lm
run $preset-chain train --preset $preset --cell chain
run $preset-random-1 train --preset $preset --cell random:1 --replicas 3
run $preset-random-2 train --preset $preset --cell random:2
# The LSTM with as many recurrent weights as the ENAS cell at 200 units: 400 units, projected to 200.
run $preset-lstm-400 train --preset $preset --cell lstm --lstm_hidden 400

# ENAS itself, and random search with weight sharing: the same loop, the controller left untrained.
run $preset-search search --preset $preset
run $preset-random-search search --preset $preset --controller untrained
finish
# The cells found, and the best of as many uniform architectures under the shared weights of the first search.
run $preset-found train --preset $preset --cell "$out/$preset-search/cell.json" --replicas 3
run $preset-random-found train --preset $preset --cell "$out/$preset-random-search/cell.json"
run $preset-uniform-best train --preset $preset --cell "$out/$preset-search/uniform_cell.json"

# The extra gradient, first where everything is known: ten seconds, every check must hold.
${LAUNCH:-} python toy_enas.py "$out/toy_enas.png"
# What does it cost, and how noisy is it? Expected: unrolled below 5 times the plain step, on PTB with a fold of 1 only.
run cost cost --preset $tiny --threads 1
run cost-$preset cost --preset $preset --batch 20 --shared_steps 20 --controller_steps 5 --threads 1
# Is the gradient that looks ahead closer to the next one? Expected: yes, a fresh one on the same samples.
run similarity similarity --preset $tiny
# Does it find better cells? Expected: no, but in a task made so that it must. Half an hour, two hours, ten minutes.
share extra-toy extra --preset $tiny
[ -n "${SMOKE:-}" ] || share extra-$preset extra --preset $preset
share extra-frozen extra --preset $tiny --task frozen --lr 2 --clip 1 --retrain false --replicas 4

# What is in the space, and does it matter? Expected on the toy corpus: see the README. Half an hour, then minutes each.
for study in spaces state anneal optimizer; do share $study $study --preset $tiny; done
run conditional conditional --preset $tiny
# The same on Penn Treebank: half an hour to an hour each on one core. Expected: widths are worse, the rest null.
for study in spaces state anneal optimizer; do
    [ -n "${SMOKE:-}" ] || share $study-$preset $study --preset $preset
done

# What makes a cell good, and does the controller know? Expected: a little. Two hours on one core.
for study in compare ablate factors capacity robust hidden; do share $study $study --preset $tiny; done
run progress progress --preset $tiny
# The same on Penn Treebank: half an hour to two hours each on one core.
for study in compare ablate factors capacity robust hidden; do
    [ -n "${SMOKE:-}" ] || share $study-$preset $study --preset $preset
done
[ -n "${SMOKE:-}" ] || run progress-$preset progress --preset $preset

# How fast? Ratios to the plain loop. Expected: above 1, but for scoring at 1000 units in float32.
finish
run bench bench --preset $preset --hidden $([ -z "${SMOKE:-}" ] && echo 1000 || echo 32)
finish

${LAUNCH:-} python menas.py report --out "$out"
