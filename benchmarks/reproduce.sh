#!/bin/sh
# Measures what the README and docs/ say of a GPU, one step after the other.
#
#   benchmarks/reproduce.sh MASK_DIR OUT_DIR [STEP ...]
#
# MASK_DIR has llama3.1-8b.yaml and qwen2.5-7b.yaml (`leank mask import`). Each step leaves OUT_DIR/STEP.json
# or a log; figures in benchmarks/results/ are copies. COMMIT names the commit where there is no git.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
masks=$(cd "$1" && pwd)
mkdir -p "$2" && out=$(cd "$2" && pwd)
shift 2
commit=${COMMIT:-$(git -C "$root" rev-parse HEAD)}
llama="--model $root/benchmarks/shapes/llama-3.1-8b --mask $masks/llama3.1-8b.yaml --load-format dummy"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$root/benchmarks" PYTHONSAFEPATH=1
# Not in the root, whose kernels/ would be taken for the PyPI package of that name.
cd "$out"

sweep() { # requests, tokens
    for case in 1,4096 1,16384 1,65536 1,131072 16,4096 16,16384 16,65536 64,4096 64,16384 64,32768; do
        printf -- '--case %s ' "$case"
    done
}

run() {
    case $1 in
    kernel_tests) python3 -m pytest -q -p no:cacheprovider "$root/tests/test_kernels.py" ;;
    engine_tests) engine_tests ;;
    attention_llama) leank bench attention --commit "$commit" --query-heads 32 --mask "$masks/llama3.1-8b.yaml" \
        --case 64,32768 --out attention_llama.json ;;
    attention_qwen) leank bench attention --commit "$commit" --query-heads 28 --mask "$masks/qwen2.5-7b.yaml" \
        --case 64,32768 --out attention_qwen.json ;;
    attention_llama_small) leank bench attention --commit "$commit" --query-heads 32 \
        --mask "$masks/llama3.1-8b.yaml" --case 1,131072 --case 16,8192,64,256 --case 8,1024 \
        --out attention_llama_small.json ;;
    attention_sweep) # shellcheck disable=SC2046
        leank bench attention --commit "$commit" --query-heads 32 --mask "$masks/llama3.1-8b.yaml" \
            --layers 0,28 $(sweep) --out attention_sweep.json ;;
    prompt_chunk) python3 "$root/benchmarks/prompt_chunk.py" --commit "$commit" --query-heads 32 \
        --mask "$masks/llama3.1-8b.yaml" --layers 0,10,20,28 \
        --launch 64,64,4,3 64,64,4,2 128,64,4,2 128,32,4,3 128,32,4,2 --out prompt_chunk.json ;;
    serve_llama) # shellcheck disable=SC2086
        leank bench serve $llama --commit "$commit" --variants flash,leank,flash-fp8 --prompt-tokens 32000 \
            --output-tokens 96 --lone-prompts 2 --num-prompts 100 --time-limit 170 --out serve_llama.json ;;
    serve_llama_short) # shellcheck disable=SC2086
        leank bench serve $llama --commit "$commit" --variants flash,leank --num-prompts 8 --prompt-tokens 1024 \
            --max-model-len 4096 --engine-args '{"max_num_seqs": 8}' --out serve_llama_short.json ;;
    soak) soak ;;
    learn_cost) python3 -m learn_cost --model "$root/benchmarks/shapes/llama-3.1-8b" --commit "$commit" \
        --tokens 4096 32768 98304 --repeats 2 --out learn_cost.json ;;
    recall_engine) python3 -m recall.evaluate_engine --dtype bfloat16 --samples 128 --commit "$commit" \
        --attention dense leank leank-pruned \
        --gpu-memory-utilization 0.1 --kv-cache-memory-bytes 17179869184 --out recall_engine.json ;;
    serve_llama_prefill) # shellcheck disable=SC2086
        leank bench serve $llama --commit "$commit" --variants flash,leank-pruned \
            --prompt-tokens 32000 --output-tokens 64 --lone-prompts 4 --num-prompts 8 --time-limit 60 \
            --out serve_llama_prefill.json ;;
    *) echo "there is no step $1" && return 2 ;;
    esac
}

engine_tests() { # each in a process of its own, four at a time
    tests="$root/tests"
    python3 -m pytest -q --collect-only -p no:cacheprovider "$tests"/test_gpu_engine.py "$tests"/test_gpu_mixed.py >engine_tests.txt
    sed -n "s|.*\(test_gpu_[a-z]*.py::\)|$tests/\1|p" engine_tests.txt |
        xargs -P 4 -n 1 python3 -m pytest -q -p no:cacheprovider
}

soak() {
    python3 -m vllm.entrypoints.cli.main serve "$root/benchmarks/shapes/llama-3.1-8b" --served-model-name llama --load-format dummy --tokens-only \
        --attention-backend leank --additional-config "{\"leank\": {\"mask\": \"$masks/llama3.1-8b.yaml\"}}" \
        --max-model-len 9216 --kv-cache-memory-bytes 42949672960 --port 8123 >server.log 2>&1 &
    server=$!
    for _ in $(seq 150); do
        curl -sf localhost:8123/health >/dev/null && break
        kill -0 $server || return 1
        sleep 2
    done
    python3 "$root/benchmarks/soak.py" --base-url http://localhost:8123 --tokens-only --requests 4000 --round 1000 \
        --prompt-tokens 8192 --output-tokens 256 --vocabulary 128000 --concurrency 256 --pid $server \
        --commit "$commit" --out soak.json || { kill $server && return 1; }
    kill $server
}

steps=${*:-attention_llama attention_qwen attention_llama_small attention_sweep prompt_chunk serve_llama serve_llama_short \
    serve_llama_prefill recall_engine learn_cost soak}
status=0
for step in $steps; do
    echo "== $step, $(date -u +%T)"
    if run "$step" >"$step.log" 2>&1; then
        tail -n 3 "$step.log"
    else
        status=1
        echo "failed:" && tail -n 20 "$step.log"
    fi
done
exit $status
