"""Rollout throughput of this project's engine, vLLM and transformers."""
