#!/usr/bin/env bash
# Makes data/smollm2-tasks: SmolLM2-135M-Instruct on ListOps and ARC-Easy, a LoRA as the fine-tune,
# adapters trained, and adapters fitted to the LoRA without a gradient; one rate and one seed each.
#
#     bash recipes/smollm2_tasks.sh arc_easy_train.jsonl arc_easy_test.jsonl [WORK]
#
# The files are JSON lines with prompt, response, answer. About an hour on two cores.
set -euo pipefail
train=$1 test=$2 work=${3:-smollm2-tasks}
base=SmolLM2-135M-Instruct
out=$(dirname "$0")/../data/smollm2-tasks
mkdir -p "$work" "$out"

run() {
    local task=$1 files=$2 examples=$3 shown=$4
    local common="--task $task $files --examples $examples --validation 100 --batch-size 8 --quiet"
    oracle finetune $base $common --method lora --rate 1e-3 --out "$work/$task-lora"
    python - "$task" "$work/$task-documents.jsonl" "$examples" $files <<'PY'
import json, sys
from toolkit.tasks import make_task
name, path, n, *files = sys.argv[1:]
rows = make_task(name, *files[1::2]).examples("train", int(n))
with open(path, "w") as file:
    file.writelines(json.dumps({"prompt": r.prompt, "response": r.response}) + "\n" for r in rows)
PY
    for fit in forced sequential; do
        oracle steer fit $base "$work/$task-lora" --data "$work/$task-documents.jsonl" --quiet \
            --rank 8 --fit $fit --out "$work/$task-$fit"
    done
    oracle steer train $base $common --rate 3e-3 --out "$work/$task-post-block-r8"
    [ "$task" = listops ] && oracle steer train $base $common --rate 3e-3 --kind loreft \
        --location post_mlp --out "$work/$task-reft-r8"
    for which in forced sequential post-block-r8 reft-r8; do
        [ -d "$work/$task-$which" ] || continue
        oracle steer eval $base --adapters "$work/$task-$which" --tuned "$work/$task-lora" \
            --task $task $files --n "$shown" --quiet --out "$out/$task-$which.json"
        [ -f "$work/$task-$which/training.json" ] &&
            cp "$work/$task-$which/training.json" "$out/$task-$which-training.json"
    done
    cp "$work/$task-lora/training.json" "$out/$task-lora-training.json"
}

run listops "" 400 200
run arc-easy "--train $train --test $test" 240 200
