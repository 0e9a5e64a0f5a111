"""Inference for any host: torch and safetensors only."""
