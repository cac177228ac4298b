"""What vLLM is told, and what is refused."""
