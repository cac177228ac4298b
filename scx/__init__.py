"""SCX-vLLM: the attention of chosen vLLM layers encoded, as in SCX.

Importing this package loads neither torch nor vLLM, because vLLM imports it
in every process it starts, with or without a use for it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _init_vllm_plugin() -> None:
    """Join vLLM: the entry point of the group ``vllm.general_plugins``.

    vLLM calls it once in each of its processes; calling it again changes
    nothing. Raises SCXConfigError if an SCX_* variable is malformed, and
    SCXUnsupportedError if vLLM lacks a method that this package wraps.
    """
    with _plugins_count_as_loaded_after():
        from scx.plugin import architectures, register

        register.join()
        architectures.register()


if TYPE_CHECKING:
    init_vllm_plugin = _init_vllm_plugin


def __getattr__(name: str) -> Callable[[], None]:
    """`init_vllm_plugin`, and what must not wait for its call.

    vLLM looks up all plugins, then calls one after another, and does neither again in
    that process. If another plugin raises before ours is called, and the engine is
    tried once more, only the lookup has happened: so it joins vLLM already.
    """
    if name != "init_vllm_plugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # vLLM logs what a lookup raises and goes on plain. The call does the same again, and
    # what it raises ends the engine.
    with contextlib.suppress(Exception), _plugins_count_as_loaded_after():
        from scx.plugin import register

        register.join()
    return _init_vllm_plugin


@contextlib.contextmanager
def _plugins_count_as_loaded_after() -> Iterator[None]:
    """If the body fails, vLLM loads plugins once more in this process.

    It notes that they are loaded before it loads them. If that stood, a second attempt
    would meet no error of ours, and go on plain.
    """
    import vllm.plugins

    loaded, vllm.plugins.plugins_loaded = vllm.plugins.plugins_loaded, False
    yield
    vllm.plugins.plugins_loaded = loaded
