#!/usr/bin/env bash
# Every study of MENAS, a line each; `report` makes the tables and figures of what they write.
#
#   ./experiments.sh                  all of it, under runs/; an interrupted search or training goes on
#   SMOKE=1 ./experiments.sh          the same at smoke sizes: minutes on a laptop, under runs/smoke
#   PRESET=day ./experiments.sh       Penn Treebank at twice the width, a search of 3,920 controller updates: days
#   PRESET=paper ./experiments.sh     the published schedules, on a GPU
#   OUT=folder ./experiments.sh       somewhere else; results/ is what the project's own runs left
#   LAUNCH="srun --gres=gpu:1 -c 4" ./experiments.sh
#                                     on a cluster: the runs of a study at once, each behind this prefix
#   LAUNCH=echo ./experiments.sh      only shows the commands
#
# A run is one seed. It writes OUT/STUDY/SEED, of a sweep OUT/STUDY/ARM/SEED: an arm is a search with the flags that
# stand here. Hours are those of one core with AVX2; the toy studies are about fifteen in all, Penn Treebank 25.
# --preset paper was not run by us.
set -euo pipefail
cd "$(dirname "$0")"
preset=${PRESET:-ptb} toy=tiny out=${OUT:-runs} seeds=10 few=3
sweep="--epochs 6 --warm_epochs 1 --settle 1 --shared_samples 1 --derive_samples 24 --retrain 0"
[ -z "${SMOKE:-}" ] || { preset=smoke toy=smoke out=${OUT:-runs/smoke} seeds=1 few=1 sweep="--settle 1 --retrain 0"; }
jobs=()

run() { # folder under OUT, command, its flags
    local folder=$1; shift
    if [ -f "$out/$folder/result.json" ]; then
        local made; made=$(python - "$out/$folder/result.json" <<< \
            'import json, sys; r = json.load(open(sys.argv[1])); print(r["date"], "on", r["machine"])')
        echo "skipped, as $out/$folder was made $made"; return
    fi
    if [ -n "${LAUNCH:-}" ]; then $LAUNCH python menas.py "$@" --out "$out/$folder" & jobs+=($!)
    else python menas.py "$@" --out "$out/$folder"; fi
}

finish() { # wait for what runs in the background; stop if something failed
    local job; for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job"; done; jobs=()
}

arm() { # study/arm, number of seeds, flags: a search of the sweep for each seed
    local folder=$1 n=$2 seed; shift 2
    for seed in $(seq "$n"); do run "$folder/$seed" search --preset $toy $sweep --seed "$seed" "$@"; done
}

# Does it work? A minute. Expected: a cell found, test perplexity within 1.3 times the floor of 5.83; every check of the
# toy holds, in ten seconds.
run quick/1 search --preset $toy
${LAUNCH:-} python toy_enas.py --out "$out/toy_enas.png"

# Searches on the toy corpus, of which the studies of cells are. 5 minutes.
arm search $seeds
finish
# The cell found, trained from scratch and from the shared weights. Twenty minutes.
for seed in $(seq $seeds); do
    run train-start/scratch/$seed train --preset $toy --cell "$out/search/$seed" --seed $seed
    run train-start/shared/$seed train --preset $toy --cell "$out/search/$seed" --supernet "$out/search/$seed" --seed $seed
done
finish
# Is a trained controller better than chance? Two hours. Expected: by .02 nats.
for seed in $(seq $seeds); do run compare/$seed compare --preset $toy --supernet "$out/search/$seed" --seed $seed; done
finish
# Connections or activations? An hour and a half. Expected: connections, by .03 nats.
for seed in $(seq $seeds); do run factors/$seed factors --preset $toy --supernet "$out/search/$seed" --seed $seed; done
finish
# What in a cell matters? Seven hours. Expected: relu or sigmoid alone are worse, by .1 and .2 nats; three searches, in
# which darts_v2 counts once, could not show it.
for seed in $(seq $([ -z "${SMOKE:-}" ] && echo 4 || echo 1)); do run ablate/$seed ablate --preset $toy --supernet "$out/search/$seed" --seed $seed; done
finish
# How much does a cell learn by heart in the same time? An hour. Expected: tanh alone more than mixed activations.
for seed in $(seq $few); do run capacity/$seed capacity --preset $toy --seed $seed; done
finish
# Does the controller's state know the cell? Minutes. Expected: less than the untrained one's.
for seed in $(seq $seeds); do run hidden/$seed hidden --preset $toy --supernet "$out/search/$seed" --seed $seed; done
finish
# What is wrong with a reward whose hidden state comes from another cell? Half an hour. Expected: .01 nats.
for seed in $(seq $few); do run state/$seed state --preset $toy --supernet "$out/search/$seed" --seed $seed; done
finish

# The term that ENAS leaves out. Is a gradient that looks ahead closer to the next one? Twenty minutes. Expected: (fresh,
# none) yes, the unrolled one not seen.
for seed in $(seq $seeds); do run similarity/$seed similarity --preset $toy --seed $seed; done
finish
run cost/1 cost --preset $toy --threads 1
# Does it find better cells? An hour, twice. Expected: no. The second time with smaller steps, at which
# (fresh, unrolled) does not explode; there four times the controller steps are .17 nats better.
for study in extra $([ -n "${SMOKE:-}" ] || echo extra-slow); do
    lr=$([ $study = extra ] && echo 10 --settle 2 || echo 2.5)
    arm $study/plain $seeds --lr $lr
    arm $study/plain-4x-steps $seeds --lr $lr --controller_steps $([ -z "${SMOKE:-}" ] && echo 80 || echo 20)
    arm $study/momentum $seeds --lr $lr --lookahead momentum
    arm $study/recent $seeds --lr $lr --lookahead recent
    arm $study/fresh $seeds --lr $lr --lookahead fresh
    arm $study/fresh-unrolled $seeds --lr $lr --lookahead fresh --response unrolled
    arm $study/fresh-sampled $seeds --lr $lr --lookahead fresh --response sampled
    finish
done
# In a task made so that only the response knows what is good? Half an hour. Expected: partly, by .34 nats.
arm extra-frozen/plain $seeds --task frozen --lr 2 --clip 1
arm extra-frozen/fresh-unrolled $seeds --task frozen --lr 2 --clip 1 --lookahead fresh --response unrolled
arm extra-frozen/fresh-sampled $seeds --task frozen --lr 2 --clip 1 --lookahead fresh --response sampled
finish

# Do other spaces hold better cells? An hour and a quarter. Expected: tanh alone scores better in as many steps, chains and
# gated cells worse.
gated=highway,glu,gate,sum nodes=$([ -z "${SMOKE:-}" ] && echo 3 || echo 2) half=$([ -z "${SMOKE:-}" ] && echo 16 || echo 8)
arm spaces/ENAS $seeds
arm spaces/tanh-only $seeds --activations tanh
arm spaces/chain $seeds --connections chain
arm spaces/tree $seeds --connections tree
arm spaces/one-activation $seeds --one_activation
arm spaces/fewer-nodes $seeds --min_nodes $nodes
arm spaces/two-widths $seeds --widths $half,$((2 * half))
arm spaces/gated $seeds --operations $gated
arm spaces/gated-memory $seeds --operations $gated --memory --min_nodes 4  # which holds the LSTM
finish
# Can the learning rate be a decision? An hour. Expected: a constant rate of the same mean does as well.
rates=0.25,0.5,1,2,4  # 1.55 on average, so larger-rate has 2.5 times that
arm optimizer/no-choice $seeds --lr 2.5
arm optimizer/larger-rate $seeds --lr 3.875
arm optimizer/at-random $seeds --lr 2.5 --rates $rates --controller uniform
arm optimizer/control $seeds --lr 2.5 --rates $rates --lookahead fresh
arm optimizer/sampled $seeds --lr 2.5 --rates $rates --lookahead fresh --response sampled
arm optimizer/unrolled $seeds --lr 2.5 --rates $rates --lookahead fresh --response unrolled
finish
# The entropy turned into a penalty, which narrows the policy. Half an hour. Expected: no better a cell.
arm anneal/best-of-sample $seeds --retrain 1
arm anneal/annealed $seeds --retrain 1 --anneal $([ -z "${SMOKE:-}" ] && echo 3 || echo 1)
finish
# How h is kept between segments with other cells; rewards on perturbed text. Half an hour each. Expected: no
# difference seen.
for state in carry zero warm; do arm kept/$state $seeds --state $state; done
for input in plain words noise; do arm robust/$input $seeds --reward_input $input --retrain 1 --perturb; done
finish
# A controller that is told what to aim for; a search, watched. Minutes. Expected: it follows in weights and paths.
for seed in $(seq $seeds); do run conditional/$seed conditional --preset $toy --seed $seed; done
run progress/1 progress --preset $toy
finish

# Penn Treebank. ENAS, and random search with weight sharing: the same loop, the controller untrained. Preset ptb: 240
# controller updates, half an hour each; day: 3,920, 3.9 and 2.4 hours. Expected of day: the policy's cells at 126 under
# their shared weights, the untrained one's at 195.
run search-$preset/trained/1 search --preset $preset --retrain 0
run search-$preset/untrained/1 search --preset $preset --retrain 0 --controller untrained
finish
${LAUNCH:-} python menas.py draw --cell "$out/search-$preset/trained/1" --out "$out/search-$preset"
# Cells of known names, LSTMs, the cells found and a random one, from scratch. Preset ptb: an hour to an hour and a half
# each. Expected (test; ours in bfloat16, the preset is float32): LSTM 98, with as many weights 88, ENAS's cell 98, chain
# 650. Preset day: five to ten hours each, judged by speed; not run by us.
run train-$preset/lstm/1 train --preset $preset --cell lstm
run train-$preset/lstm-as-many-weights/1 train --preset $preset --cell lstm:enas
for cell in enas darts_v2 enas_lm chain; do run train-$preset/$cell/1 train --preset $preset --cell $cell; done
random=12-0-0-0-0-0-0-0-1-1-0-0-1-2-0-0-1-1-0-0-0-4-0-0-3-2-0-0-2-5-0-0-3-1-0-0-1-5-0-0-3-2-0-0-1-9-0-0-3-9-0-0-3
for seed in $(seq $few); do
    run train-$preset/random-cell-1/$seed train --preset $preset --cell $random --seed $seed
    run train-$preset/found/$seed train --preset $preset --cell "$out/search-$preset/trained/1" --seed $seed
    run train-$preset/random-search/$seed train --preset $preset --cell "$out/search-$preset/untrained/1" --seed $seed
done
# The best of the search of 3,920 updates, where it was run, at the size and under the schedule of the others. Expected: 93.
[ $preset != ptb ] || [ ! -f "$out/search-day/trained/1/result.json" ] ||
    run train-ptb/found-day/1 train --preset ptb --cell "$out/search-day/trained/1"
# From the shared weights, where trainings are as wide as searches.
case $preset in smoke | ptb)
    run train-$preset/from-shared-weights/1 train --preset $preset --cell "$out/search-$preset/trained/1" \
        --supernet "$out/search-$preset/trained/1" ;;
esac
finish

# How fast? Ratios to the plain loop. Minutes, of which most go to bfloat16 where the CPU lacks it; on a GPU add
# --hidden 850. Expected in float32: 1.5 with 32 cells of 32 units, 1.1 with one of 200.
run bench/1 bench --preset $toy
finish
${LAUNCH:-} python menas.py report --out "$out"
