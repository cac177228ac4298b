"""SCX-vLLM: the attention of chosen vLLM layers encoded, as in SCX.

Importing this package loads neither torch nor vLLM, because vLLM imports it
in every process it starts, with or without a use for it.
"""

__version__ = "0.1.0"


def init_vllm_plugin() -> None:
    """Join vLLM: the entry point of the group ``vllm.general_plugins``.

    vLLM calls it once in each of its processes; calling it again changes
    nothing. Raises SCXConfigError where an SCX_* variable is malformed.
    """
    from scx.engine import register

    register()
