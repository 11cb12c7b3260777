"""What becomes of every flag of `vllm serve` with leank: the one place that says so.

A flag is refused, by `checks.py`; works with some values; has no effect on what leank serves; or
works. docs/flags.md is made from this file:

    python -m vllm_leank.serving.flags > docs/flags.md
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Refused:
    """A flag that ends startup.

    Attributes:
        flag: its name.
        reason: a sentence part that says why, and what to do.
        given: whether a config has it.
    """

    flag: str
    reason: str
    given: Callable[["VllmConfig"], bool]


def refused_flags(vllm_config: "VllmConfig") -> Iterator[str]:
    """Why a config's flags cannot be served."""
    return (one.reason for one in REFUSED if one.given(vllm_config))


REFUSED = (
    Refused(
        "--block-size",
        "--block-size follows from the mask: remove the flag",
        lambda config: config.cache_config.user_specified_block_size,
    ),
    Refused(
        "--prefix-match-unit",
        "--prefix-match-unit follows from the mask: remove the flag",
        lambda config: config.cache_config.prefix_match_unit is not None,
    ),
    Refused(
        "--kv-transfer-config",
        "KV connectors are not supported: remove --kv-transfer-config",
        lambda config: config.kv_transfer_config is not None,
    ),
    # vLLM makes a KV connector of it, after configs have been checked.
    Refused(
        "--kv-offloading-size",
        "offloading the KV cache is not supported: remove --kv-offloading-size",
        lambda config: config.cache_config.kv_offloading_size is not None,
    ),
    Refused(
        "--decode-context-parallel-size",
        "decode context parallelism is not supported: remove --decode-context-parallel-size",
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
    ),
    Refused(
        "--prefill-context-parallel-size",
        "prefill context parallelism is not supported: remove --prefill-context-parallel-size",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refused(
        "--enable-dbo",
        "dual batch overlap is not supported: remove --enable-dbo",
        lambda config: config.parallel_config.enable_dbo,
    ),
    Refused(
        "--ubatch-size",
        "microbatches are not supported: remove --ubatch-size",
        lambda config: config.parallel_config.ubatch_size > 1,
    ),
    Refused(
        "--disable-hybrid-kv-cache-manager",
        "it has two cache groups: remove --disable-hybrid-kv-cache-manager",
        lambda config: bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
    ),
    Refused(
        "--diffusion-config",
        "diffusion language models are not supported: remove --diffusion-config",
        # For models of this kind vLLM makes one itself; they are refused as models.
        lambda config: config.diffusion_config is not None and not config.model_config.is_diffusion,
    ),
    # vLLM keeps them by the prefix cache's pages, and expects those of answers to push old ones
    # out; leank has none of these, and its archive is no measure of what is found.
    Refused(
        "--enable-return-routed-experts",
        "routed experts are not returned with leank: remove --enable-return-routed-experts",
        lambda config: config.aux_output_config.enabled,
    ),
)

SOME_VALUES = {
    "--additional-config": "leank's options under the key `leank`; others must be right as well",
    "--attention-backend": "`leank`",
    "--aux-output-config": "all but `enable_return_routed_experts`",
    "--attention-config": "all but `backend_per_kind`, as leank serves all layers or none, and "
    "`flash_attn_version`",
    "--convert": "`auto` and `none`: leank serves text generation",
    "--disable-sliding-window": "for models without sliding layers",
    "--enable-prefix-caching": "off, for models with layers that keep states; `leank serve` turns "
    "it off",
    "--pipeline-parallel-size": "1, for models with sliding layers or states",
    "--dtype": "on a GPU 16 bits",
    "--load-format": "all but `tensorizer`",
    "--kv-cache-dtype": "the model's own: far tokens are made small by a mask of bits",
    "--prefix-cache-retention-interval": "0; with sliding layers multiples of leank's pages",
    "--runner": "`auto` and `generate`: leank serves text generation",
    "--spec-method": "as `--speculative-config`",
    "--spec-model": "as `--speculative-config`",
    "--spec-tokens": "at most `recent`, the tokens that stay dense",
    "--speculative-config": "the methods `ngram`, `ngram_gpu`, `suffix` and `draft_model`; no "
    "draft model beside sliding layers, none at all beside states",
}
"""Flags of which some values are refused: those that are served."""

_LAYERS = "for layers that no model served by leank has"
_DEPENDS = "goes with a flag that is refused"
_PREFIXES = "goes with prefix caching, which is refused for models with layers that keep states"
NO_EFFECT = {
    _LAYERS: """
        --engram-config --kda-prefill-backend --kda-decode-backend --kv-sharing-fast-prefill
        --sparse-indexer-topk-backend --swa-bounded-replay --enable-hc-sp
        --monokernel""",
    _PREFIXES: """
        --mamba-block-size --mamba-cache-mode --enable-mamba-shared-prefix-checkpoint""",
    _DEPENDS: """
        --kv-cache-dtype-skip-layers --kv-offloading-backend --dcp-comm-backend --dcp-q-replicate
        --dcp-kv-cache-interleave-size --cp-kv-cache-interleave-size --dbo-decode-token-threshold
        --dbo-prefill-token-threshold""",
    "for models that generate no text": "--pooler-config --enable-flash-late-interaction",
    "for a server without a language model, and so without a KV cache": "--mm-encoder-only",
    "leank has no cascade attention": "--disable-cascade-attn",
}
"""Flags that change nothing with leank, by the reason why."""

WORKS = {
    "The server": """
        --headless --api-server-count --config --grpc --disable-log-stats
        --aggregate-engine-logging --fail-on-environ-validation --shutdown-timeout
        --enable-log-requests --lora-modules --chat-template --chat-template-content-format
        --trust-request-chat-template --trust-request-mm-kwargs --default-chat-template-kwargs
        --response-role --return-tokens-as-token-ids --enable-auto-tool-choice
        --exclude-tools-when-tool-choice-none --tool-call-parser --tool-parser-plugin
        --tool-strict-level --tool-server --max-log-len --enable-prompt-tokens-details
        --enable-per-request-metrics --enable-server-load-tracking --enable-force-include-usage
        --sse-keep-alive-interval --enable-tokenizer-info-endpoint --enable-log-outputs
        --enable-log-deltas --cohere-is-reasoning-model --cohere-format
        --anthropic-disabled-thinking-effort --log-error-stack --tokens-only --enable-scale-out
        --fingerprint-mode --fingerprint-value --host --port --grpc-port
        --data-parallel-supervisor-port --dp-supervisor-probe-interval-s
        --dp-supervisor-probe-timeout-s --dp-supervisor-probe-failure-threshold --uds
        --uvicorn-log-level --disable-uvicorn-access-log --disable-access-log-for-endpoints
        --allow-credentials --allowed-origins --allowed-methods --allowed-headers --api-key
        --ssl-keyfile --ssl-certfile --ssl-ca-certs --enable-ssl-refresh --ssl-cert-reqs
        --ssl-ciphers --root-path --middleware --enable-request-id-headers --disable-fastapi-docs
        --h11-max-incomplete-event-size --h11-max-header-count --enable-offline-docs --help
        --logging-config --log-level --log-config-file --reasoning-effort-map""",
    "Model and weights": """
        --model --tokenizer --tokenizer-mode --trust-remote-code --seed --hf-config-path
        --allowed-local-media-path --allowed-media-domains --revision --code-revision
        --tokenizer-revision --max-model-len --quantization --quantization-config
        --allow-deprecated-quantization --enforce-eager
        --return-sampling-mask --max-logprobs --logprobs-mode --use-fp64-gumbel
        --enable-trace-replay --skip-tokenizer-init --enable-prompt-embeds --served-model-name
        --config-format --hf-token --hf-overrides --model-class-overrides --generation-config
        --override-generation-config --enable-sleep-mode --sleep-mode-backend
        --sleep-mode-offload-cudagraph --sleep-preserve-parameter-names
        --enable-cumem-allocator --enable-nccl-comm-suspend
        --model-impl --logits-processors --io-processor-plugin --renderer-num-workers
        --download-dir --safetensors-load-strategy
        --safetensors-prefetch-num-threads --safetensors-prefetch-block-size
        --model-loader-extra-config --ignore-patterns --use-tqdm-on-load --pt-load-map-location
        --weight-transfer-config --offload-backend --cpu-offload-gb --cpu-offload-params
        --offload-group-size --offload-num-in-group --offload-prefetch-step --offload-params""",
    "Reasoning, structured outputs, adapters": """
        --reasoning-parser --reasoning-parser-plugin --reasoning-config
        --structured-outputs-config --watermark-config --enable-lora --max-loras --max-lora-rank
        --lora-dtype --enable-tower-connector-lora --max-cpu-loras --fully-sharded-loras
        --lora-target-modules --default-mm-loras --specialize-active-lora
        --enable-mixed-moe-lora-format --enable-moe-shared-loras --max-lora-cls-labels""",
    "Layers that keep states": """
        --gdn-prefill-backend --mamba-backend --mamba-ssu-algorithm --mamba-cache-dtype
        --mamba-ssm-cache-dtype --enable-mamba-cache-stochastic-rounding
        --mamba-cache-philox-rounds --replayssm-buffer-len --use-replayssm""",
    "Images, video and sound": """
        --language-model-only --limit-mm-per-prompt --enable-mm-embeds --media-io-kwargs
        --mm-processor-kwargs --mm-processor-cache-gb --mm-processor-cache-type
        --mm-hasher-algorithm --mm-shm-cache-max-object-size-mb --mm-encoder-tp-mode
        --mm-encoder-attn-backend --mm-encoder-attn-dtype --mm-encoder-fp8-scale-path
        --mm-encoder-fp8-scale-save-path --mm-encoder-fp8-scale-save-margin
        --interleave-mm-strings --skip-mm-profiling --video-pruning-rate --video-pruning-method
        --mm-tensor-ipc --mm-processor-device --mm-ipc-gpu-memory-gb --mm-device-do-normalize
        --ec-transfer-config --ec-manager-config --disable-chunked-mm-input""",
    "Several GPUs and machines": """
        --distributed-executor-backend --master-addr --master-port
        --nnodes --node-rank --distributed-timeout-seconds --cpu-distributed-timeout-seconds
        --numa-bind --numa-bind-nodes --numa-bind-cpus --device-ids --tensor-parallel-size
        --data-parallel-size --data-parallel-rank --data-parallel-start-rank
        --data-parallel-size-local --data-parallel-address --data-parallel-rpc-port
        --data-parallel-backend --data-parallel-hybrid-lb --data-parallel-external-lb
        --data-parallel-multi-port-external-lb --enable-expert-parallel
        --enable-batch-sharded-sampling --enable-ep-weight-filter --all2all-backend
        --enable-shm-tensor-arena --enable-elastic-ep --elastic-ep-max-dp-size
        --dp-sync-interval --disable-nccl-for-dp-synchronization --enable-eplb --eplb-config
        --expert-placement-strategy --max-parallel-loading-workers --ray-workers-use-nsight
        --disable-custom-all-reduce --worker-cls --worker-extension-cls
        --enable-fault-tolerance --fault-tolerance-config""",
    "Cache, scheduler and compilation": """
        --gpu-memory-utilization --kv-cache-memory-bytes --num-gpu-blocks-override
        --prefix-caching-hash-algo
        --kv-events-config
        --max-num-batched-tokens --max-num-scheduled-tokens --max-num-seqs
        --max-num-active-seqs --max-num-queued-reqs --max-num-queued-tokens
        --long-prefill-token-threshold --long-prefill-token-threshold-adaptive
        --scheduling-policy --enable-chunked-prefill --scheduler-cls
        --scheduler-reserve-full-isl --watermark --prefill-schedule-interval --async-scheduling
        --stream-interval --cudagraph-capture-sizes --max-cudagraph-capture-size
        --ir-op-priority --enable-flashinfer-autotune --moe-backend --linear-backend
        --compilation-config --kernel-config --optimization-level --performance-mode""",
    "Observability": """
        --show-hidden-metrics-for-version --otlp-traces-endpoint --collect-detailed-traces
        --per-request-spec-decode-metrics --kv-cache-metrics --kv-cache-metrics-sample
        --custom-histogram-buckets --cudagraph-metrics --enable-layerwise-nvtx-tracing
        --enable-mfu-metrics --enable-logging-iteration-details --jit-monitor-mode
        --jit-monitor-verbose --profiler-config --watchdog-config""",
}
"""Flags that mean what they mean without leank, by what they are for."""


def all_flags() -> list[str]:
    """Every flag of the table."""
    lists = (*NO_EFFECT.values(), *WORKS.values())
    named = [flag for flags in lists for flag in flags.split()]
    return [*(one.flag for one in REFUSED), *SOME_VALUES, *named]


def flags_page() -> str:
    """The text of docs/flags.md."""

    def listed(flags: str) -> str:
        return ", ".join(f"`{flag}`" for flag in sorted(flags.split()))

    lines = [
        "# Flags of `vllm serve`",
        "",
        "Made from `vllm_leank/serving/flags.py`. A test compares it with vLLM's own parser, so",
        "that no flag is missing. `leank doctor -- vllm serve ...` says what becomes of a line.",
        "",
        "## Refused",
        "",
        "| flag | why, and what to do |",
        "|---|---|",
        *(f"| `{one.flag}` | {one.reason} |" for one in REFUSED),
        "",
        "## Some values work, others are refused",
        "",
        "| flag | what works |",
        "|---|---|",
        *(f"| `{flag}` | {served} |" for flag, served in SOME_VALUES.items()),
        "",
        "## No effect",
        "",
        "| flags | why |",
        "|---|---|",
        *(f"| {listed(flags)} | {why} |" for why, flags in NO_EFFECT.items()),
        "",
        "## As without leank",
        "",
        "What leank adds does not look at these, or adapts to them. Which features tests run with",
        "leank: [reliability.md](reliability.md).",
        "",
        "| for | flags |",
        "|---|---|",
        *(f"| {what} | {listed(flags)} |" for what, flags in WORKS.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(flags_page(), end="")
