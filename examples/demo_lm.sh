#!/bin/sh
# A real language model learns to search, on two CPU cores: SmolLM2-135M-Instruct in a world that nobody can know.
#
#   sh examples/demo_lm.sh [STEPS]        # `make demo-lm` installs everything first
#
# Every line below is a command that you can run yourself. What was done is not done again: an interrupted
# demonstration resumes.
set -eu

steps=${1:-6}
igpo=${IGPO:-igpo}
out=outputs/demo-lm
start=examples/smollm2-world      # an adapter that knows how to search, see its README
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

say() { printf '\n==> %s\n' "$*"; }

# bfloat16 is fast only on processors that compute in it.
precision="--bf16 false --dtype float32" dtype=float32
if grep -qs -e avx512_bf16 -e amx_bf16 /proc/cpuinfo; then
    precision="--bf16 true --dtype bfloat16" dtype=bfloat16
fi

say "1 of 6: the model, 135 million parameters"
[ -f outputs/smollm2/config.json ] || "$igpo" get smollm2 outputs/smollm2

say "2 of 6: what it searches, 2,000 passages about people and places that do not exist"
[ -f "$out/index/manifest.json" ] || "$igpo" index --corpus world --out "$out/index"

evaluate() {
    "$igpo" eval --model "$1" --config configs/smollm2-135m-world.yaml --dtype "$dtype" \
        --data world:test --limit 20 --batch-size 20 --index "$out/index" --out "$2"
}

say "3 of 6: 20 questions before training"
evaluate "$start" "$out/before"
"$igpo" view "$out/before"

say "4 of 6: $steps steps of IGPO, 16 rollouts each; trained further is the adapter"
if [ -f "$out/train/adapter_model.safetensors" ]; then
    echo "Done already."
else
    resume=""
    if ls -d "$out"/train/checkpoint-* > /dev/null 2>&1; then resume="--resume_from_checkpoint true"; fi
    # shellcheck disable=SC2086  # several options in one variable
    "$igpo" train --config configs/smollm2-135m-world.yaml --index "$out/index" --output_dir "$out/train" \
        --model_name_or_path "$start" --warmup_steps 0 \
        --num_eval_questions 0 --max_steps "$steps" --save_steps 1 $precision $resume
fi

say "5 of 6: the same 20 questions after training"
evaluate "$out/train" "$out/after"
"$igpo" eval compare "$out/before" "$out/after"

say "6 of 6: a rollout of the trained model, and all of them on a page"
"$igpo" view "$out/after" --save "$out/rollout.png"
"$igpo" view "$out/before" "$out/after" --html "$out/before-and-after.html"
"$igpo" view "$out/train" --html "$out/training.html"

say "Ask it yourself; \`$igpo data show world:test\` has questions:"
echo "  $igpo ask --model $out/train --index $out/index"
