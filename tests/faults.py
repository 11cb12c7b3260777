"""The faults that `mutations.py` plants, and the tests that should notice each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault: text of a module that is replaced, and the tests that should notice."""

    name: str
    module: str
    old: str
    new: str
    tests: str
    gpu: bool = False


REMOVED = "        self._remove_blocks_in_range(request_id, free.start, free.stop)\n"
FREED = (
    "        free = self._window.free_pages(processed_computed_tokens, exact_until, "
    f"self.block_size)\n{REMOVED}"
)
FREED_BY_WHAT_WAS_SCHEDULED = (
    """        scheduled = self.__dict__.setdefault("scheduled", {}).get(request_id, 0)
        processed_computed_tokens = max(processed_computed_tokens, scheduled)
"""
    + FREED
    + """
    def allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model):
        self.__dict__.setdefault("scheduled", {})[request_id] = num_tokens_main_model
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def pop_blocks_for_free(self, request_id):
        self.__dict__.setdefault("scheduled", {}).pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
"""
)
"""Neither steps in flight nor rejected drafts are taken off: what the last step was to compute."""

PROMPTS = "exact_until[: len(lengths)].copy_(lengths[: len(exact_until)], non_blocking=True)"

SPARE = "test_kernel_launches.py::test_a_long_request_among_many_has_programs_to_spare"
SINKS = "test_kernels.py::test_models_with_attention_sinks"
UNPACKED = "test_unpacked.py::test_queries_read_what_was_unpacked_and_the_rest"

FAULTS = (
    Fault(
        "all granules of a window page are read where its first lies",
        "kernels/pages.py",
        "return granule % (WINDOW_BLOCK // 32) * 32",
        "return granule % (WINDOW_BLOCK // 32) * 0",
        "test_kernels.py::test_window_pages_of_several_granules",
    ),
    Fault(
        "a head that one program decodes has no attention sink",
        "kernels/decode_kernel.py",
        "l += tl.exp2(load_sink_scores(",
        "l += 0 * tl.exp2(load_sink_scores(",
        SINKS,
    ),
    Fault(
        "a program writes queries that do not exist into its neighbour's memory",
        "kernels/packed_columns.py",
        "m_q = o_q < G\n    offset",
        "m_q = o_q < G_PAD\n    offset",
        "test_kernel_launches.py::test_programs_keep_to_their_own_memory",
    ),
    Fault(
        "queries of one head write to the same memory where many are read at once",
        "kernels/extend.py",
        "o_m // G * (H * G * D) + o_m % G * D,",
        "o_m // G * (H * G * D),",
        "test_kernels.py::test_every_query_reads_what_the_rule_says",
    ),
    Fault(
        "the last granule is in no program's part",
        "kernels/shares.py",
        "split * each + tl.minimum(split, units - splits * each)",
        "split * each",
        "test_shares.py::test_parts_are_of_equal_size_and_leave_nothing_out",
    ),
    Fault(
        "all parts of a head's channels are combined from the first",
        "kernels/combine.py",
        "tl.program_id(2) * PART + tl.arange(0, PART)",
        "tl.arange(0, PART)",
        "test_kernel_launches.py::test_a_request_split_over_many_programs_reads_the_same",
    ),
    Fault(
        "a head that several programs decode has no attention sink",
        "kernels/combine.py",
        "            l = 1.0\n",
        "            l = 0.0\n",
        SINKS,
    ),
    Fault(
        "extend knows no attention sinks",
        "kernels/extend.py",
        "l += tl.exp2(load_sink_scores(",
        "l += 0 * tl.exp2(load_sink_scores(",
        SINKS,
    ),
    Fault(
        "what was found in unpacked tokens has no weight",
        "kernels/merge.py",
        "return m_new, l * alpha + weight,",
        "return m_new, l * alpha,",
        UNPACKED,
    ),
    Fault(
        "blind heads read what nothing was unpacked to",
        "kernels/extend.py",
        'lse = tl.where(variant > 0, lse, float("-inf"))',
        'lse = tl.where(variant >= 0, lse, float("-inf"))',
        UNPACKED,
    ),
    Fault(
        "a piece reads what only its last query sees",
        "kernels/pieces.py",
        "window.boundary(position + 1)",
        "window.boundary(position + queries)",
        UNPACKED,
    ),
    Fault(
        "what is left of a page after unpacking is not cleared",
        "kernels/packed_unpack.py",
        "    if last > end:\n",
        "    if last < 0:\n",
        "test_unpacked.py::test_what_is_unpacked_is_what_the_reference_decodes",
    ),
    Fault(
        "the boundary is off by one",
        "core/window.py",
        "return self.sink + excess // GRANULE",
        "return self.sink + (excess + 1) // GRANULE",
        "test_window.py",
    ),
    Fault(
        "answers that are computed again find kernels compiled for one number of tokens",
        "kernels/warmup.py",
        "for part in _kinds(one, SELECTING_AT_ONCE):",
        "for part in [SELECTING_AT_ONCE]:",
        "test_warmup.py",
    ),
    Fault(
        "startup compiles for powers of two of requests alone",
        "kernels/warmup.py",
        "*_kinds(cache, attention.max_reqs)}",
        "}",
        "test_warmup.py",
    ),
    Fault(
        "one of many requests has a program too few for its heads",
        "kernels/shares.py",
        "tl.cdiv(of_request, programs - (H - 1))",
        "tl.cdiv(of_request, programs)",
        "test_shares.py::test_no_request_of_many_has_more_parts_than_programs",
    ),
    Fault(
        "the next head of one of many requests begins where the last one does",
        "kernels/decode_kernel.py",
        "tl.where(o_row < row, of_rows, 0)",
        "tl.where(o_row < row - 1, of_rows, 0)",
        SPARE,
    ),
    Fault(
        "of many results those that are loaded first are combined alone",
        "kernels/combine.py",
        "for start in range(0, splits, SPLITS):",
        "for start in range(0, min(splits, SPLITS), SPLITS):",
        SPARE,
    ),
    Fault(
        "results of a long request among many are looked for elsewhere",
        "kernels/combine.py",
        "tl.where(mine, ends - of_heads, 0)",
        "tl.where(mine, ends, 0)",
        SPARE,
    ),
    Fault(
        "the boundary is off by one on the device",
        "kernels/common.py",
        "tl.maximum(length - (SINK + RECENT), 0)",
        "tl.maximum(length - (SINK + RECENT) + 1, 0)",
        "test_kernels.py::test_decode_at_every_length_around_the_edges",
    ),
    Fault(
        "a page is freed a step too early",
        "serving/scheduler/managers.py",
        "        least = self._frees_at.get(request_id, 0)\n",
        "        processed_computed_tokens += 1\n"
        "        least = self._frees_at.get(request_id, 0)\n",
        "test_managers.py",
    ),
    Fault(
        "pages are freed under steps in flight",
        "serving/scheduler/managers.py",
        FREED,
        FREED_BY_WHAT_WAS_SCHEDULED,
        "test_managers.py::test_blocks_of_steps_still_running_are_kept",
    ),
    Fault(
        "pages are freed as if no draft were rejected",
        "serving/scheduler/managers.py",
        FREED,
        FREED_BY_WHAT_WAS_SCHEDULED,
        "test_engine_fuzz.py::test_random_traffic_with_drafts_is_answered_as_the_oracle_would",
    ),
    Fault(
        "pages that were given back are compacted again",
        "core/window.py",
        "else self.boundary(before)\n",
        "else max(self.sink, self.boundary(before) - GRANULE)\n",
        "test_engine_memory.py::test_memory_that_nobody_wrote_is_never_read",
    ),
    Fault(
        "the prompt is freed while it is computed",
        "core/window.py",
        "        if processed < exact_until:\n            return range(0)\n",
        "",
        "test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "a window page is freed in which the sink ends",
        "core/window.py",
        "first = -(-free.start // block)",
        "first = free.start // block",
        "test_managers.py::test_longer_window_pages_are_held_while_any_of_them_is_read",
    ),
    Fault(
        "a window page is freed that the boundary is in",
        "core/window.py",
        "max(free.stop // block, first)",
        "max(-(-free.stop // block), first)",
        "test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "a freed block is freed again",
        "serving/scheduler/managers.py",
        REMOVED,
        f"{REMOVED}        last = self.req_to_blocks[request_id][-1:]\n"
        "        self.block_pool.free_blocks(last if free else [])\n",
        "test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "pages of a request that waited are taken for freed",
        "serving/scheduler/managers.py",
        "        if request_id in self.req_to_blocks:  # one that waits holds none yet\n",
        "        if True:\n",
        "test_managers.py test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "a request is thought to hold the page that its next token needs",
        "core/window.py",
        "return boundary + self.recent + GRANULE\n",
        "return boundary + self.recent + GRANULE + 1\n",
        "test_managers.py test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "pages of a prompt that was just read are held on",
        "core/window.py",
        "            return exact_until\n        return self.moves_at(self.boundary(processed))\n",
        "            pass\n"
        "        return max(exact_until, self.moves_at(self.boundary(processed)))\n",
        "test_managers.py",
    ),
    Fault(
        "what was freed of a request is remembered when it starts again",
        "serving/scheduler/managers.py",
        "        self._frees_at.pop(request_id, None)\n",
        "",
        "test_managers.py test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "answers are offered to the prefix cache",
        "serving/vllm/prompt_pages.py",
        "request.num_prompt_tokens - 1)\n",
        "request.num_tokens)\n",
        "test_managers.py",
    ),
    Fault(
        "pages that a prompt's last token fills are not offered",
        "serving/vllm/prompt_pages.py",
        "request.num_computed_tokens >= request.num_prompt_tokens:",
        "request.num_computed_tokens >= request.num_prompt_tokens - 1:",
        "test_managers.py::test_a_last_token_that_comes_alone_offers_the_pages_that_it_fills",
    ),
    Fault(
        "a replay that goes on past the prompt is taken for decode",
        "serving/metadata.py",
        PROMPTS,
        PROMPTS + "\n                lengths = lengths.to(exact_until.device)\n"
        "                ends = common_attn_metadata.seq_lens[: len(lengths)]\n"
        "                exact_until[: len(lengths)] *= ends <= lengths",
        "test_engine_answers.py::test_preemption_does_not_matter",
    ),
    Fault(
        "a replay that goes on past the prompt is taken for the prompt",
        "serving/metadata.py",
        PROMPTS,
        PROMPTS + "\n                several = common_attn_metadata.query_start_loc.diff() > 1\n"
        "                ends = common_attn_metadata.seq_lens * several\n"
        "                exact_until.copy_(exact_until.maximum(ends))",
        "test_engine_answers.py::test_preemption_does_not_matter",
    ),
    Fault(
        "the archive page in which a prompt ends is shared",
        "serving/scheduler/managers.py",
        "kv_cache_spec.window.archived(prompt),",
        "kv_cache_spec.window.archived(prompt) + kv_cache_spec.block_size,",
        "test_managers.py",
    ),
    Fault(
        "archive pages of answers are shared",
        "serving/scheduler/managers.py",
        "self._window.archived(request.num_prompt_tokens)",
        "self._window.archived(request.num_tokens)",
        "test_managers.py",
    ),
    Fault(
        "a prefix is taken up without the end of its window",
        "serving/scheduler/pruned_managers.py",
        "length) // LEAST_BLOCK, length // LEAST_BLOCK)",
        "length) // LEAST_BLOCK, length // LEAST_BLOCK - 1)",
        "test_manager_fuzz.py::test_every_read_finds_what_was_written_for_it",
    ),
    Fault(
        "a prefix is taken up whose archive ends within a page",
        "core/window.py",
        "boundary = (longest - recent) // block * block",
        "boundary = longest - recent",
        "test_window.py",
    ),
    Fault(
        "a sink longer than any request is read whole",
        "kernels/reference_parts.py",
        "read = min(sink, max(row.after for row in rows))",
        "read = sink",
        "test_reference.py",
    ),
    Fault(
        "with a long window who stores more gets fewer programs",
        "kernels/tables.py",
        "far = max(NOMINAL_LENGTH, 2 * near) - near",
        "far = NOMINAL_LENGTH - near",
        "test_launch.py",
    ),
    Fault(
        "capacity forgets that the last prompt needs room",
        "core/capacity.py",
        "at_once=one + left / in_decode",
        "at_once=blocks / in_decode",
        "test_capacity.py",
    ),
    Fault(
        "who is left counts as a full engine",
        "bench/steady.py",
        "most = stretch.running if stretch.is_full else 0",
        "most = 0",
        "test_bench_serve.py",
    ),
    Fault(
        "drafts find no archive page",
        "serving/scheduler/managers.py",
        "request_id, self._window.archived(num_tokens), num_tokens_main_model",
        "request_id, self._window.archived(max(num_tokens - 6, 1)), num_tokens_main_model",
        "test_speculation.py",
    ),
    Fault(
        "a draft model gets the archive's block table",
        "serving/vllm/draft_model.py",
        "isinstance(self.drafter, DraftModelProposer) and is_selected",
        "False and is_selected",
        "test_speculation.py::test_tokens_are_those_without_speculation[model-chunked]",
    ),
    Fault(
        "drafts may leave the dense window",
        "serving/checks.py",
        "num_speculative_tokens) > recent",
        "num_speculative_tokens) > recent + 64",
        "test_refusals.py::test_more_drafts_than_are_dense",
    ),
    Fault(
        "every rank takes the mask of rank 0",
        "serving/impl.py",
        "settings.plan.rank_heads(rank)",
        "settings.plan.rank_heads(0)",
        "test_parallel.py::test_two_ranks_answer_like_one",
    ),
    Fault(
        "window and archive tables are swapped",
        "serving/metadata.py",
        "window_table=common.block_table_tensor,\n"
        "                archive_table=archive.common.block_table_tensor,",
        "archive_table=common.block_table_tensor,\n"
        "                window_table=archive.common.block_table_tensor,",
        "test_engine_answers.py::test_logits_are_those_of_the_definition",
    ),
    Fault(
        "K and V are swapped in the archive",
        "kernels/reference.py",
        "key, value = source[:, head].split",
        "value, key = source[:, head].split",
        "test_archive_pages.py test_reference.py",
    ),
    Fault(
        "FlashAttention plans steps of sliding layers ahead",
        "serving/sliding.py",
        "            self.aot_schedule = False\n",
        "",
        "test_sliding.py::test_flash_attention_plans_no_step_of_sliding_layers_ahead",
    ),
    Fault(
        "a step has the prompt lengths of an earlier one",
        "serving/metadata.py",
        "exact_until[: len(lengths)].copy_(",
        "exact_until.any() or exact_until[: len(lengths)].copy_(",
        "test_engine_answers.py::test_history_does_not_matter",
    ),
    Fault(
        "a captured graph keeps the prompt lengths of its capture",
        "serving/metadata.py",
        "exact_until = self._exact_until[: common_attn_metadata.num_reqs]",
        "exact_until = self._exact_until[: common_attn_metadata.num_reqs].clone()",
        "test_gpu_engine.py::test_a_prompt_whose_last_token_comes_alone_is_read_to_its_end[v2]",
        gpu=True,
    ),
    Fault(
        "compaction leaves old bytes in a page",
        "kernels/head_pages.py",
        "values[self._place(pages, granules)] = 0",
        "pass",
        "test_archive_pages.py test_reference.py",
    ),
    Fault(
        "compaction leaves old bytes in a page on the device",
        "kernels/whole_store.py",
        "if token + 32 == stop:",
        "if token + 32 > stop:",
        "test_kernels.py::test_pages_are_those_of_the_reference",
    ),
    Fault(
        "padded rows are stored in block 0",
        "kernels/store.py",
        "    if slot >= 0:",
        "    slot = tl.maximum(slot, 0)\n    if slot >= 0:",
        "test_kernels.py::test_decode_at_every_length_around_the_edges",
    ),
    Fault(
        "offsets have 32 bits",
        "kernels/pages.py",
        "p_tile = ptr + page.to(tl.int64) * stride_page",
        "p_tile = ptr + page * stride_page",
        "test_kernel_launches.py::test_addresses_beyond_two_to_the_31_elements",
        gpu=True,
    ),
    Fault(
        "masks share a compile cache",
        "serving/settings.py",
        "MASK_KEY: settings.mask.sha256",
        "MASK_KEY: settings.mask.model",
        "test_refusals.py::test_a_compile_cache_is_of_one_mask_and_one_window",
    ),
    Fault(
        "options without --attention-backend leank are ignored",
        "serving/checks.py",
        "if given_options(vllm_config.additional_config):",
        "if False:",
        "test_refusals.py",
    ),
    Fault(
        "a plugin that could not be set up leaves the backend's name",
        "serving/plugin.py",
        "        _register()\n    except",
        "        from vllm_leank.serving.vllm.backend_name import register_backend_name\n\n"
        '        register_backend_name("vllm_leank.serving.backend.LeanKBackend", load_backend)\n'
        "        _register()\n    except",
        "test_plugin.py",
    ),
    Fault(
        "a plugin that could not be set up lets its options pass",
        "serving/plugin.py",
        '        refuse_options("leank", error)\n',
        "        refuse_options\n",
        "test_plugin.py",
    ),
    Fault(
        "the plugin leaves vLLM's choice of a backend as it is",
        "serving/vllm/platform.py",
        "    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)\n",
        "",
        "test_engine_answers.py::test_logits_are_those_of_the_definition",
    ),
    Fault(
        "prompts may go on after their answer",
        "serving/vllm/streaming_input.py",
        "if resumable and is_selected",
        "if False and is_selected",
        "test_engine_features.py::test_streaming_input_is_refused",
    ),
    Fault(
        "pages of answers are offered where vLLM counts, in whole archive pages",
        "serving/scheduler/pruned_managers.py",
        "min(self._computed.get(request.request_id, num_tokens), request.num_tokens)",
        "num_tokens",
        "test_engine_pruned.py::test_answers_are_found_as_well",
    ),
    Fault(
        "a layer that has buffers already asks for no pages",
        "serving/impl.py",
        "if not self._asks_for_pages:",
        'if not hasattr(layer, "leank_channels"):',
        "test_engine_loading.py::test_buffers_that_another_process_exported",
    ),
    Fault(
        "what plans the cache in a spawned process knows nothing of states",
        "serving/scheduler/__init__.py",
        "\nhook_states()\n",
        "\n",
        "test_engine_loading.py::test_a_spawned_process_plans_states_as_leank_needs_them",
    ),
    Fault(
        "intervals of few samples are as those of many",
        "offline/intervals.py",
        "    out = 100 * NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1))\n",
        "    out = 2.5\n",
        "test_verify_parts.py::test_intervals_of_few_samples_hold",
    ),
)
