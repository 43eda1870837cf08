"""Everything that this connector takes from SGLang, checked by ``register`` before anything else of it is imported.

``tools/compat.py`` checks the same table against SGLang's wheels, and ``tests/unit/sglang/test_surface.py`` that the
code uses nothing else. ``hooks.py`` says what is called at the hooked functions; their parameters stand here only.
``without`` says what is lost where a name is missing; everything else then works.
"""

from disagg_plugin.surface import Surface, calls, overrides, reads

_ARGUMENTS = "sglang.srt.arg_groups"
_FIELDS = f"{_ARGUMENTS}.fields"
_UTILS = "sglang.srt.disaggregation.utils"
_BACKEND = "sglang.srt.disaggregation.base.conn"
_SCHEDULER = "sglang.srt.managers.scheduler"
_PARTS = "sglang.srt.managers.scheduler_components"
_HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager"
_MESSAGES = "sglang.srt.managers.io_struct"
_BATCH = "sglang.srt.managers.schedule_batch"
_CACHE = "sglang.srt.mem_cache"
_NOT_USED = "counts as not used"

_REGISTRATION = (
    *reads("sglang.version", "__version__"),
    *calls("sglang.srt.plugins.hook_registry", "HookRegistry.register(cls, target, hook, hook_type)"),
    *reads(
        "sglang.srt.plugins.hook_registry",
        *("HookType.BEFORE", "HookType.AFTER", "HookType.AROUND", "HookType.REPLACE"),
    ),
    *reads(f"{_ARGUMENTS}.choices", "DISAGG_TRANSFER_BACKEND_CHOICES", "add_disagg_transfer_backend_choices"),
    *calls(f"{_ARGUMENTS}.resolution_hooks", "register_resolution_hook(name)"),
    *overrides(f"{_ARGUMENTS}.pd_disaggregation_hook", "handle_pd_disaggregation(server_args)"),
    *overrides("sglang.srt.server_args", "ServerArgs.add_cli_args(parser)"),
    *reads(_UTILS, "TransferBackend"),
    *overrides(_UTILS, "get_kv_class(transfer_backend, class_type)"),
    *reads(
        _UTILS,
        *("KVClassType.KVARGS", "KVClassType.MANAGER", "KVClassType.SENDER", "KVClassType.BOOTSTRAP_SERVER"),
    ),
)

# of ServerArgs, which is put together from these classes as it is imported
_SERVER_ARGUMENTS = (
    *calls(
        f"{_ARGUMENTS}.overrides",
        "declare_resolution(server_args, source, **fields)",
        "resolving_view(server_args)",
    ),
    *reads(
        f"{_FIELDS}.disagg",
        *("Disagg.disaggregation_mode", "Disagg.disaggregation_transfer_backend"),
        *("Disagg.disaggregation_bootstrap_port", "Disagg.disaggregation_enable_kv_checksum"),
        *("Disagg.enable_pd_role_switch", "Disagg.optimistic_prefill_attempts", "Disagg.encoder_only"),
    ),
    *reads(
        f"{_FIELDS}.parallel",
        *("Parallel.tp_size", "Parallel.pp_size", "Parallel.dp_size", "Parallel.dcp_size"),
        *("Parallel.attn_cp_size", "Parallel.nnodes"),
    ),
    *reads(
        f"{_FIELDS}.schedule",
        *("Schedule.chunked_prefill_size", "Schedule.schedule_policy", "Schedule.enable_priority_scheduling"),
        *("Schedule.schedule_low_priority_values_first", "Schedule.default_priority_value"),
        "Schedule.disable_priority_preemption",
    ),
    *reads(
        f"{_FIELDS}.memory",
        *("Memory.disable_radix_cache", "Memory.enable_hierarchical_cache", "Memory.enable_hisparse"),
        "Memory.enable_lmcache",
    ),
    *reads(f"{_FIELDS}.serving", "Serving.served_model_name", "Serving.tokenizer_worker_num"),
    *reads(f"{_FIELDS}.model", "Model.load_format", "Model.download_dir"),
    *reads(f"{_FIELDS}.spec", "Spec.speculative_algorithm"),
    *reads("sglang.srt.environ", "Envs.SGLANG_RUST_SERVER", without=_NOT_USED),
)

_API_PROCESS = (
    *overrides(
        _HTTP_SERVER,
        "_setup_and_run_http_server(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
        "subprocess_watchdog, execute_warmup_func, launch_callback)",
    ),
    *reads(_HTTP_SERVER, "app"),
    *overrides(
        _TOKENIZER,
        "async TokenizerManager._send_one_request(self, tokenized_obj)",
        "async TokenizerManager._send_batch_request(self, tokenized_objs)",
        "TokenizerManager.collect_metrics(self, state, recv_obj, i)",
    ),
    *reads(
        _TOKENIZER,
        *("TokenizerManager.gracefully_exit", "ReqState.finished", "ReqState.time_stats"),
    ),
    *reads(
        _MESSAGES,
        *("TokenizedGenerateReqInput.rid", "TokenizedGenerateReqInput.input_ids"),
        *("TokenizedGenerateReqInput.cache_salt", "TokenizedGenerateReqInput.lora_id"),
        *("TokenizedGenerateReqInput.priority", "TokenizedGenerateReqInput.sampling_params"),
        *("BatchStrOutput.rids", "BatchStrOutput.finished_reasons"),
    ),
    *reads(_MESSAGES, "BatchStrOutput.completion_tokens", without="requests that were served are not measured"),
    *reads("sglang.srt.sampling.sampling_params", "SamplingParams.custom_params"),
    *calls(
        "sglang.srt.observability.req_time_stats",
        "APIServerReqTimeStats.get_first_token_latency(self)",
        "APIServerReqTimeStats.get_time_per_output_token(self, completion_tokens)",
        "APIServerReqTimeStats.get_e2e_latency(self)",
    ),
)

_SCHEDULER_PROCESS = (
    *overrides(
        _SCHEDULER,
        "Scheduler.__init__(self, server_args, port_args)",
        "Scheduler.ingest_requests(self, stop_at_pause)",
        "Scheduler._add_request_to_queue(self, req, is_retracted)",
        "Scheduler._abort_on_queued_limit(self, recv_req)",
        "Scheduler._release_aborted_request(self, req)",
        "Scheduler.abort_request(self, recv_req)",
        "Scheduler.is_fully_idle(self, for_health_check, ignore_waiting)",
        "Scheduler.run_batch(self, batch, pp_proxy_tensors)",
        "Scheduler.flush_cache(self, empty_cache)",
    ),
    *calls(_SCHEDULER, "Scheduler.publish_load_snapshot(self, force)"),
    *reads(
        _SCHEDULER,
        *("Scheduler.server_args", "Scheduler.model_config", "Scheduler.tree_cache", "Scheduler.page_size"),
        *("Scheduler.token_to_kv_pool_allocator", "Scheduler.max_total_num_tokens", "Scheduler.forward_stream"),
        *("Scheduler.waiting_queue", "Scheduler.max_queued_requests", "Scheduler.enable_priority_scheduling"),
        *("Scheduler.running_batch", "Scheduler.last_batch", "Scheduler.chunked_req", "Scheduler._engine_paused"),
        *("Scheduler.grammar_manager", "Scheduler.load_inquirer", "Scheduler.disagg_prefill_bootstrap_queue"),
    ),
    *reads("sglang.srt.constrained.grammar_manager", "GrammarManager.grammar_queue"),
    *overrides(f"{_PARTS}.load_inquirer", "SchedulerLoadInquirer.get_loads(self)"),
    *reads(
        "sglang.srt.managers.load_snapshot",
        *("LoadSnapshot.num_waiting_reqs", "LoadSnapshot.token_usage", "LoadSnapshot.max_total_num_tokens"),
        *("LoadSnapshot.max_running_requests", "LoadSnapshot.disaggregation", "DisaggregationMetrics.mode"),
        *("DisaggregationMetrics.decode_prealloc_queue_reqs", "DisaggregationMetrics.decode_transfer_queue_reqs"),
    ),
    *overrides(
        f"{_PARTS}.weight_updater",
        "SchedulerWeightUpdaterManager.record_weight_version_after_update(self, weight_version)",
    ),
    *reads(
        "sglang.srt.configs.model_config",
        *("ModelConfig.context_len", "ModelConfig.hf_config", "ModelConfig.model_path", "ModelConfig.revision"),
        "ModelConfig.quantization",
    ),
    *calls("sglang.srt.configs.model_config", "ModelConfig.get_total_num_kv_heads(self)"),
)

_REQUESTS = (
    *reads("sglang.srt.constants", "HEALTH_CHECK_RID_PREFIX"),
    *reads(_UTILS, "FAKE_BOOTSTRAP_HOST"),
    *reads(_MESSAGES, "AbortReq.rid", "AbortReq.abort_all"),
    *reads(
        _BATCH,
        *("Req.rid", "Req.origin_input_ids", "Req.priority", "Req.cache_salt", "Req.extra_key", "Req.sampling_params"),
        *("Req.bootstrap_host", "Req.bootstrap_port", "Req.bootstrap_room", "Req.disagg_kv_sender", "Req.to_finish"),
        *("Req.prefix_len", "Req.extend_end", "Req.seqlen", "Req.session", "Req.lora_id", "Req.token_type_ids"),
        *("Req.input_embeds", "Req.positional_embed_overrides", "Req.multimodal_inputs", "Req.return_logprob"),
        *("Req.logprob_start_len", "Req.return_hidden_states", "Req.return_routed_experts"),
        "Req.skip_radix_cache_insert",
        *("ScheduleBatch.reqs", "ScheduleBatch.forward_mode"),
    ),
    *calls(_BATCH, "Req.finished(self)", "ScheduleBatch.is_empty(self)"),
    *calls("sglang.srt.model_executor.forward_batch_info", "ForwardMode.is_extend(self)"),
)

_CACHES = (
    *reads(
        f"{_CACHE}.memory_pool",
        *("MHATokenToKVPool.k_buffer", "MHATokenToKVPool.v_buffer", "MHATokenToKVPool.page_size"),
        *("MHATokenToKVPool.head_num", "MHATokenToKVPool.head_dim", "MHATokenToKVPool.v_head_dim"),
        *("MHATokenToKVPool.dtype", "MHATokenToKVPool.device", "MHATokenToKVPool.kv_cache_layout"),
        "MHATokenToKVPool.is_quantized_kv_cache",
    ),
    *reads(f"{_CACHE}.allocator.base", "BaseTokenToKVPoolAllocator.page_size"),
    *calls(
        f"{_CACHE}.allocator.base",
        "BaseTokenToKVPoolAllocator.get_kvcache(self)",
        "BaseTokenToKVPoolAllocator.available_size(self)",
        "BaseTokenToKVPoolAllocator.alloc(self, need_size)",
        "BaseTokenToKVPoolAllocator.free(self, free_index)",
    ),
    # the prefix cache of a plain server; tree_pages.py asks the one that there is, which may be another
    *calls(
        f"{_CACHE}.unified_radix_cache",
        "UnifiedRadixCache.match_prefix(self, params)",
        "UnifiedRadixCache.insert(self, params)",
        "UnifiedRadixCache.lock(self, node_id)",
        "UnifiedRadixCache.unlock(self, lock)",
        "UnifiedRadixCache.path_device_indices(self, node)",
        "UnifiedRadixCache.evictable_size(self)",
    ),
    *reads(
        f"{_CACHE}.base_prefix_cache",
        *("MatchPrefixParams.key", "InsertParams.key", "InsertParams.value", "InsertParams.prev_prefix_len"),
        *("MatchResult.device_prefix_len", "MatchResult.last_device_node", "InsertResult.last_device_node"),
    ),
    *calls(
        f"{_CACHE}.radix_cache",
        "RadixKey.__init__(self, token_ids, extra_key, cache_salt)",
        "RadixKey.__getitem__(self, idx)",
        "RadixKey.page_aligned(self, page_size)",
    ),
    *calls(f"{_CACHE}.common", "evict_from_tree_cache(tree_cache, num_tokens)"),
)

_TRANSFER_BACKEND = (
    *overrides(
        _BACKEND,
        "BaseKVManager.__init__(self, args, disaggregation_mode, server_args, is_mla_backend)",
        "BaseKVManager.register_to_bootstrap(self)",
        "BaseKVSender.__init__(self, mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)",
        "BaseKVSender.init(self, num_kv_indices, aux_index)",
        "BaseKVSender.send(self, kv_indices, state_indices, num_kv_tokens)",
        "BaseKVSender.get_transfer_metric(self)",
        "BaseKVSender.poll(self)",
        "BaseKVSender.failure_exception(self)",
        "BaseKVSender.clear(self)",
        "BaseKVSender.abort(self)",
        "BaseKVBootstrapServer.__init__(self, host, port)",
    ),
    *reads(
        _BACKEND,
        *("KVArgs", "KVTransferMetric"),
        *("KVPoll.Failed", "KVPoll.Bootstrapping", "KVPoll.WaitingForInput", "KVPoll.Transferring", "KVPoll.Success"),
    ),
    # SGLang sets it on any sender; 0.5.22 too, but its own backends do not declare it
    *reads("sglang.srt.disaggregation.common.conn", "CommonKVSender._early_send_wait_event", first="0.5.23"),
    *overrides("sglang.srt.disaggregation.prefill", "PrefillBootstrapQueue.create_sender(self, req, num_kv_heads)"),
    *reads("sglang.srt.disaggregation.prefill", "PrefillBootstrapQueue.kv_manager"),
)

SURFACE = Surface(
    engine="SGLang",
    package="sglang",
    oldest="0.5.22",
    newest="0.5.23",
    run=("0.5.22", "0.5.23"),
    names=(
        *(*_REGISTRATION, *_SERVER_ARGUMENTS, *_API_PROCESS, *_SCHEDULER_PROCESS),
        *(*_REQUESTS, *_CACHES, *_TRANSFER_BACKEND),
    ),
)
