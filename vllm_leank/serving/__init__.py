"""The plugin: what vLLM loads."""
