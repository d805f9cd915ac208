#!/usr/bin/env bash
# Makes data/smollm2-tasks: SmolLM2-135M-Instruct on ListOps and ARC-Easy, a LoRA as the fine-tune,
# adapters trained, and adapters fitted to the LoRA without a gradient; one rate and one seed each.
#
#     bash data/recipes/smollm2_tasks.sh [arc_easy_train.jsonl arc_easy_test.jsonl [WORK]]
#
# The files are JSON lines with prompt, response, answer; without them ListOps alone is made, and
# ARC-Easy's results stay as they are. About an hour on two cores.
set -euo pipefail
train=${1:-} test=${2:-} work=${3:-smollm2-tasks}
base=SmolLM2-135M-Instruct
out=$(dirname "$0")/../smollm2-tasks
mkdir -p "$work" "$out"

# run TASK FILES EXAMPLES DOCUMENTS QUESTIONS
run() {
    local task=$1 files=$2 examples=$3 documents=$4 questions=$5
    local common="--task $task $files --examples $examples --validation 60 --batch-size 8 --quiet"
    oracle finetune $base $common --method lora --rate 1e-3 --out "$work/$task-lora"
    python - "$task" "$work/$task-documents.jsonl" "$documents" $files <<'PY'
import json, sys
from toolkit.documents.tasks import make_task
name, path, n, *files = sys.argv[1:]
rows = make_task(name, *files[1::2]).examples("train", int(n))
with open(path, "w") as file:
    file.writelines(json.dumps({"prompt": r.prompt, "response": r.response}) + "\n" for r in rows)
PY
    for fit in forced sequential; do
        date +%s > "$work/clock"
        oracle steer fit $base "$work/$task-lora" --data "$work/$task-documents.jsonl" --quiet \
            --rank 8 --fit $fit --out "$work/$task-$fit"
        echo "$task $fit: $(($(date +%s) - $(cat "$work/clock"))) seconds" | tee -a "$out/seconds.txt"
    done
    oracle steer train $base $common --rate 3e-3 --out "$work/$task-post-block"
    oracle steer eval $base --tuned "$work/$task-lora" --task $task $files --n "$questions" \
        --adapters "$work/$task-forced" --adapters "$work/$task-sequential" \
        --adapters "$work/$task-post-block" --quiet --out "$out/$task.json"
    for which in lora post-block; do
        cp "$work/$task-$which/training.json" "$out/$task-$which-training.json"
    done
}

run listops "" 240 100 150
if [[ -z $train ]]; then
    echo "ARC-Easy is left as it is: give the files of its training and test examples" >&2
    exit 0
fi
run arc-easy "--train $train --test $test" 120 60 100
