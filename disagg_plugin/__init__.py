"""Disaggregated prefill and decode for stock LLM engines: the engine-neutral core."""

__version__ = "0.1.0"
