"""The encoded model classes that vLLM loads by name."""
