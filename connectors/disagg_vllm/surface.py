"""Everything that this connector takes from vLLM, checked by ``register`` before anything else of it is imported.

``tools/compat.py`` checks the same table against vLLM's wheels, and ``tests/unit/vllm/test_surface.py`` that the code
uses nothing else. ``without`` says what is lost where a name is missing; everything else then works.
"""

from disagg_plugin.surface import Surface, calls, overrides, reads

_KV = "vllm.distributed.kv_transfer.kv_connector"
_BASE = f"{_KV}.v1.base"
_METRICS = f"{_KV}.v1.metrics"
_NOT_USED = "counts as not used"
_FRONTEND = ("FrontendArgs.middleware", "FrontendArgs.api_key")
_NO_FRONTEND = "early rejection and the admin route are not active"

_REGISTRATION = (
    *reads("vllm", "__version__"),
    *overrides("vllm.engine.arg_utils", "EngineArgs.add_cli_args(parser)"),
    *calls(
        f"{_KV}.factory",
        "KVConnectorFactory.register_connector(cls, name, module_path, class_name)",
        "KVConnectorFactory.get_connector_class(cls, kv_transfer_config)",
    ),
    *reads(f"{_KV}.factory", "KVConnectorFactory._registry"),
    *overrides("vllm.config.kv_transfer", "KVTransferConfig.__post_init__(self)"),
    *reads(
        "vllm.config.kv_transfer",
        *("KVTransferConfig.kv_connector", "KVTransferConfig.kv_role", "KVTransferConfig.kv_load_failure_policy"),
        *("KVTransferConfig.kv_connector_extra_config", "KVTransferConfig.engine_id"),
    ),
    *reads("vllm.entrypoints.launchers.cli_args", *_FRONTEND, last="0.32", without=_NO_FRONTEND),
    *reads("vllm.entrypoints.common.cli_args", *_FRONTEND, first="0.33.0", without=_NO_FRONTEND),
    *reads(
        "vllm.engine.arg_utils",
        *("EngineArgs.scheduling_policy", "EngineArgs.kv_transfer_config", "EngineArgs.data_parallel_rank"),
        *("EngineArgs.data_parallel_size", "EngineArgs.data_parallel_size_local"),
        "EngineArgs.data_parallel_start_rank",
        "AsyncEngineArgs",
    ),
)

_CONNECTOR = (
    *overrides(
        _BASE,
        "KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)",
        # scheduler process
        "KVConnectorBase_V1.bind_kv_cache_manager(self, kv_cache_manager)",
        "KVConnectorBase_V1.bind_gpu_block_pool(self, gpu_block_pool)",
        "KVConnectorBase_V1.set_xfer_handshake_metadata(self, metadata)",
        "KVConnectorBase_V1.on_new_request(self, request)",
        "KVConnectorBase_V1.get_num_new_matched_tokens(self, request, num_computed_tokens)",
        "KVConnectorBase_V1.update_state_after_alloc(self, request, blocks, num_external_tokens)",
        "KVConnectorBase_V1.build_connector_meta(self, scheduler_output)",
        "KVConnectorBase_V1.update_connector_output(self, connector_output)",
        "KVConnectorBase_V1.request_finished(self, request, block_ids)",
        "KVConnectorBase_V1.has_pending_push_work(self)",
        "KVConnectorBase_V1.has_pending_block_frees(self)",
        "KVConnectorBase_V1.take_events(self)",
        "KVConnectorBase_V1.reset_cache(self)",
        "KVConnectorBase_V1.get_kv_connector_stats(self)",
        # API server
        "KVConnectorBase_V1.build_kv_connector_stats(cls, data)",
        "KVConnectorBase_V1.build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues)",
        "KVConnectorBase_V1.get_required_kvcache_layout(cls, vllm_config)",
        # worker
        "KVConnectorBase_V1.register_kv_caches(self, kv_caches)",
        "KVConnectorBase_V1.get_handshake_metadata(self)",
        "KVConnectorBase_V1.bind_connector_metadata(self, connector_metadata)",
        "KVConnectorBase_V1.clear_connector_metadata(self)",
        "KVConnectorBase_V1.handle_preemptions(self, kv_connector_metadata)",
        "KVConnectorBase_V1.start_load_kv(self, forward_context, **kwargs)",
        "KVConnectorBase_V1.wait_for_layer_load(self, layer_name)",
        "KVConnectorBase_V1.save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs)",
        "KVConnectorBase_V1.wait_for_save(self)",
        "KVConnectorBase_V1.get_finished(self, finished_req_ids)",
        "KVConnectorBase_V1.get_block_ids_with_load_errors(self)",
        "KVConnectorBase_V1.build_connector_worker_meta(self)",
        "KVConnectorBase_V1.get_kv_connector_kv_cache_events(self)",
        "KVConnectorBase_V1.set_host_xfer_buffer_ops(self, copy_operation)",
        "KVConnectorBase_V1.finish_forward(self)",
        "KVConnectorBase_V1.reset_capture_state(self)",
        "KVConnectorBase_V1.shutdown(self)",
        "KVConnectorWorkerMetadata.aggregate(self, other)",
    ),
    # the base class's own, which come back to ours
    *calls(
        _BASE,
        "KVConnectorBase_V1.get_transfer_results(self, finished_req_ids)",
        "KVConnectorBase_V1.set_xfer_handshake_metadata_pp_aware(self, metadata)",
        "KVConnectorBase_V1.get_finished_count(self)",
    ),
    *reads(_BASE, "KVConnectorBase_V1.requires_kv_delivery", "KVConnectorTransferResults.finished_recving"),
    *reads(_BASE, "KVConnectorTransferResults.finished_sending"),
    # the engine asks an older connector for none of these
    *overrides(_BASE, "KVConnectorBase_V1.get_mem_pool_context(self)", first="0.31.0"),
    *overrides(
        _BASE, "KVConnectorBase_V1.get_external_cache_hit_sources(self, request, num_external_tokens)", first="0.32.0"
    ),
    *overrides(
        _BASE,
        "KVConnectorBase_V1.unregister_kv_caches(self)",
        "KVConnectorBase_V1.restore_kv_caches(self)",
        first="0.33.0",
    ),
    *reads("vllm.v1.metrics.cache_hit_source", "CacheHitSource.HOST", "CacheHitSource.P2P", first="0.32.0"),
    *reads(
        _BASE,
        *("KVConnectorBase_V1._kv_transfer_config", "KVConnectorBase_V1._connector_metadata"),
        *("KVConnectorHandshakeMetadata", "KVConnectorMetadata"),
        *("KVConnectorRole.SCHEDULER", "KVConnectorRole.WORKER"),
    ),
    *reads("vllm.distributed.kv_events", "KVCacheEvent", "KVConnectorKVEvents"),
    *reads("vllm.forward_context", "ForwardContext"),
)

_STATS = (
    *overrides(
        _METRICS,
        "KVConnectorPromMetrics.__init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues)",
        "KVConnectorPromMetrics.observe(self, transfer_stats_data, engine_idx)",
        "KVConnectorStats.reset(self)",
        "KVConnectorStats.aggregate(self, other)",
        "KVConnectorStats.reduce(self)",
        "KVConnectorStats.is_empty(self)",
    ),
    *reads(_METRICS, "KVConnectorStats.data"),
    *overrides(
        "vllm.v1.metrics.loggers",
        "StatLoggerBase.__init__(self, vllm_config, engine_index)",
        "StatLoggerBase.record(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)",
        "StatLoggerBase.log_engine_initialized(self)",
        "StatLoggerBase.log(self)",
    ),
    *reads(
        "vllm.v1.metrics.stats",
        *("SchedulerStats.kv_connector_stats", "IterationStats.finished_requests", "MultiModalCacheStats"),
        *("FinishedRequestStats.finish_reason", "FinishedRequestStats.num_generation_tokens"),
        *("FinishedRequestStats.e2e_latency", "FinishedRequestStats.decode_time"),
        "FinishedRequestStats.mean_time_per_output_token",
    ),
    *reads(
        "vllm.v1.metrics.stats",
        "FinishedRequestStats.request_id",
        without="requests that ended are not counted by class",
    ),
    *reads(
        "vllm.envs",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
        "VLLM_USE_RUST_FRONTEND",
        without=_NOT_USED,
    ),
)

_SCHEDULER = (
    *reads(
        "vllm.v1.request",
        *("Request.request_id", "Request.status", "Request.sampling_params", "Request.pooling_params"),
        *("Request.prompt_token_ids", "Request.prompt_embeds", "Request.mm_features", "Request.lora_request"),
        *("Request.cache_salt", "Request.priority", "Request.trace_headers", "Request.kv_transfer_params"),
        *("Request.num_prompt_tokens", "Request.num_output_tokens", "Request.num_preemptions"),
        *("Request.block_hashes", "RequestStatus.FINISHED_STOPPED", "RequestStatus.FINISHED_LENGTH_CAPPED"),
    ),
    *reads("vllm.v1.request", "Request.skip_reading_prefix_cache", "Request.resumable", without=_NOT_USED),
    *reads("vllm.lora.request", "LoRARequest.lora_name", "LoRARequest.lora_path"),
    *reads("vllm.sampling_params", "SamplingParams.prompt_logprobs", "SamplingParams.extra_args"),
    *reads(
        "vllm.v1.core.sched.output",
        *("SchedulerOutput.total_num_scheduled_tokens", "SchedulerOutput.num_scheduled_tokens"),
        *("SchedulerOutput.preempted_req_ids", "SchedulerOutput.kv_connector_block_state"),
        *("SchedulerOutput.scheduled_new_reqs", "SchedulerOutput.scheduled_cached_reqs"),
        *("NewRequestData.req_id", "NewRequestData.num_computed_tokens"),
        *("CachedRequestData.req_ids", "CachedRequestData.num_computed_tokens", "CachedRequestData.new_token_ids"),
        *("CachedRequestData.new_block_ids", "CachedRequestData.num_output_tokens"),
    ),
    *calls("vllm.v1.core.sched.output", "KVConnectorBlockState.get_block_ids(self, req_id)"),
    *calls("vllm.v1.core.kv_cache_manager", "KVCacheBlocks.get_block_ids(self)"),
    *reads("vllm.v1.core.kv_cache_manager", "KVCacheManager"),
    *reads("vllm.v1.core.block_pool", "BlockPool.num_gpu_blocks"),
    *calls("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks(self)", "BlockPool.get_usage(self)"),
    *overrides(
        "vllm.v1.core.block_pool",
        "BlockPool.get_cached_block(self, block_hash, kv_cache_group_ids)",
        without="prompts are decided on late",
    ),
    *reads(
        "vllm.v1.core.block_pool",
        "BlockPool.cached_block_hash_to_block",
        without="decode engines hear late that a prefill engine emptied its prefix cache",
    ),
    *reads(
        "vllm.v1.outputs",
        *("KVConnectorOutput.finished_sending", "KVConnectorOutput.finished_recving"),
        "KVConnectorOutput.kv_connector_worker_meta",
    ),
)

_CONFIG = (
    *reads(
        "vllm.config",
        *("VllmConfig.kv_transfer_config", "VllmConfig.model_config", "VllmConfig.parallel_config"),
        *("VllmConfig.cache_config", "VllmConfig.scheduler_config", "VllmConfig.load_config"),
        *("VllmConfig.speculative_config", "VllmConfig.compilation_config"),
    ),
    *reads("vllm.config", "VllmConfig.weight_transfer_config", without=_NOT_USED),
    *reads("vllm.config", "VllmConfig.aux_output_config", first="0.31.0", without=_NOT_USED),
    *reads("vllm.config.aux_output", "AuxOutputConfig.enable_return_routed_experts", first="0.31.0", without=_NOT_USED),
    *reads("vllm.config.model", "ModelConfig.enable_return_routed_experts", last="0.30", without=_NOT_USED),
    *reads(
        "vllm.config.model",
        *("ModelConfig.max_model_len", "ModelConfig.hf_config", "ModelConfig.model", "ModelConfig.served_model_name"),
        *("ModelConfig.revision", "ModelConfig.dtype", "ModelConfig.quantization"),
    ),
    *calls("vllm.config.model", "ModelConfig.get_total_num_kv_heads(self)"),
    *reads(
        "vllm.config.model",
        *("ModelConfig.is_encoder_decoder", "ModelConfig.runner_type", "ModelConfig.enable_sleep_mode"),
        "ModelConfig.model_weights",
        without=_NOT_USED,
    ),
    *reads(
        "vllm.config.parallel",
        *("ParallelConfig.rank", "ParallelConfig.tensor_parallel_size", "ParallelConfig.pipeline_parallel_size"),
        "ParallelConfig.data_parallel_rank",
    ),
    *reads(
        "vllm.config.parallel",
        *("ParallelConfig.decode_context_parallel_size", "ParallelConfig.prefill_context_parallel_size"),
        *("ParallelConfig.data_parallel_index", "ParallelConfig.data_parallel_rank_local"),
        *("ParallelConfig.data_parallel_external_lb", "ParallelConfig.data_parallel_hybrid_lb"),
        "ParallelConfig._api_process_count",
        without=_NOT_USED,
    ),
    *reads(
        "vllm.config.cache",
        *("CacheConfig.block_size", "CacheConfig.cache_dtype", "CacheConfig.enable_prefix_caching"),
    ),
    *reads("vllm.config.cache", "CacheConfig.kv_sharing_fast_prefill", without=_NOT_USED),
    *reads(
        "vllm.config.scheduler",
        *("SchedulerConfig.policy", "SchedulerConfig.max_num_batched_tokens", "SchedulerConfig.max_num_seqs"),
    ),
    *reads("vllm.config.load", "LoadConfig.load_format", "LoadConfig.download_dir"),
    *reads("vllm.config.compilation", "CompilationConfig.static_forward_context"),
    *reads("vllm.config.speculative", "SpeculativeConfig.method", without=_NOT_USED),
)

_CACHES = (
    *calls("vllm.v1.kv_cache_interface", "get_kv_cache_spec_kind(kv_cache_spec)"),
    *reads(
        "vllm.v1.kv_cache_interface",
        *("KVCacheConfig.kv_cache_groups", "KVCacheGroupSpec.kv_cache_spec", "KVCacheSpec.block_size"),
        *("FullAttentionSpec.num_kv_heads", "FullAttentionSpec.head_size", "FullAttentionSpec.head_size_v"),
        *("FullAttentionSpec.dtype", "UniformTypeKVCacheSpecs.kv_cache_specs"),
    ),
    *reads(
        "vllm.v1.kv_cache_interface",
        *("FullAttentionSpec.sliding_window", "FullAttentionSpec.attention_chunk_size"),
        *("FullAttentionSpec.kv_quant_mode", "FullAttentionSpec.page_size_padded", "KVQuantMode.FP8_PER_TENSOR"),
        *("FullAttentionSpec.non_causal", "FullAttentionSpec.num_head_slots"),
        *("FullAttentionSpec.state_content_bytes", "FullAttentionSpec.tokens_per_state"),
        without=_NOT_USED,
    ),
    *calls(
        "vllm._custom_ops",
        "cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, k_scale, v_scale, "
        "kv_cache_dtype)",
        without="CPU engines take no part",
    ),
    *calls(
        "vllm.v1.attention.backends.cpu_attn",
        "_get_attn_isa(dtype, block_size, head_size, kv_cache_dtype)",
        without="CPU engines take no part",
    ),
)

_ADMISSION = (
    *overrides(
        "vllm.v1.engine.async_llm",
        "async AsyncLLM._add_request(self, request, prompt, parent_req, index, queue)",
        without="early rejection checks requests once, before they are tokenized",
    ),
    *reads(
        "vllm.v1.engine",
        *("EngineCoreRequest.request_id", "EngineCoreRequest.prompt_token_ids", "EngineCoreRequest.lora_request"),
        *("EngineCoreRequest.cache_salt", "EngineCoreRequest.priority", "EngineCoreRequest.sampling_params"),
        "EngineCoreRequest.external_req_id",
        without="early rejection checks requests once, before they are tokenized",
    ),
    *reads("vllm.v1.engine.async_llm", "AsyncLLM.vllm_config", without="early rejection is not active"),
    *calls(
        "vllm.exceptions",
        "GracefulHTTPError.__init__(self, message, http_status)",
        without="an early rejection by the second stage answers 400",
    ),
)

SURFACE = Surface(
    engine="vLLM",
    package="vllm",
    oldest="0.30.0",
    newest="0.33.0",
    run=("0.30.0", "0.31.0", "0.32.0"),
    names=(*_REGISTRATION, *_CONNECTOR, *_STATS, *_SCHEDULER, *_CONFIG, *_CACHES, *_ADMISSION),
)
