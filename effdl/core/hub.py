"""The one door to the Hugging Face hub, which closes quickly and politely where there is no network.

Without it a missing network costs 23-46 s of retries and ends in a page of traceback. Here the endpoint is
probed once for 3 s; where it cannot be reached the offline flags are set, so that a cached file still serves and a
missing one fails at once with one sentence that names the local alternative.

Example::

    from datasets import load_dataset
    from effdl.core.hub import from_hub

    data = from_hub(load_dataset, "cifar10", instead="a folder of images or an .npz file")
"""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from effdl.core.errors import ConfigurationError

T = TypeVar("T")

PROBE_SECONDS = 3.0
LOCAL_ALTERNATIVE = "a local folder, a parquet or .npz file for data, a folder or a .safetensors file for a model"
_PACKAGES = ("huggingface_hub", "datasets", "diffusers", "transformers", "timm")


class HubError(ConfigurationError, OSError):
    """Something was asked of the hub that it (or the cache, where it cannot be reached) does not give."""


def endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT`` or huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def proxied() -> bool:
    """Whether a proxy stands between us and the endpoint: probing around it would prove nothing."""
    proxies = urllib.request.getproxies()
    return bool(proxies.get(endpoint().split(":")[0]) or proxies.get("all"))


def offline() -> bool:
    """Whether the user (or an earlier probe) has switched the hub off with ``HF_HUB_OFFLINE``."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@lru_cache(maxsize=1)
def reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Whether the endpoint answers at all within ``seconds``; asked once per process."""
    if proxied():
        return True
    answers: queue.Queue[bool] = queue.Queue()
    # A thread, because neither name resolution nor a trickling server honours a socket's timeout.
    threading.Thread(target=_probe, args=(endpoint(), seconds, answers), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


def _probe(url: str, seconds: float, answers: queue.Queue[bool]) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        answers.put(True)
    except urllib.error.HTTPError:
        answers.put(True)  # an error page is an answer
    except (OSError, ValueError):
        answers.put(False)


def go_offline() -> None:
    """Set the offline flags for the rest of the process: for child processes, for packages not yet imported, and in
    every loaded module that copied the flag when it was imported."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import huggingface_hub.constants  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in _PACKAGES and module is not None:
            for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
                if flag in vars(module):  # not hasattr, which would wake lazily loading modules
                    setattr(module, flag, True)


def from_hub(load: Callable[..., T], name: Any, *args: Any, instead: str = LOCAL_ALTERNATIVE, **kwargs: Any) -> T:
    """``load(name, *args, **kwargs)``, where ``name`` is a hub id or a local path.

    Args:
        load: what loads it: ``datasets.load_dataset``, ``AutoModel.from_pretrained``, ``timm.create_model``.
        name: hub id (``"cifar10"``, ``"org/name"``) or an existing local path, for which nothing is probed.
        instead: the local alternatives that the caller accepts; ends the error sentence.

    Raises:
        HubError: the hub cannot be reached and the cache has no copy, or the hub has nothing of that name.
            A ``ConfigurationError`` in one sentence, raised within about three seconds.
    """
    if os.path.exists(str(name)):
        return load(name, *args, **kwargs)
    if not offline() and not reachable():
        go_offline()
    try:
        return load(name, *args, **kwargs)
    except Exception as error:
        if isinstance(error, HubError) or not _about_the_hub(error):
            raise
        advice = f"name a local alternative instead: {instead}"
        raise HubError(f"{str(name)!r} cannot be loaded: {_reason(error)}; {advice}.") from error


def _about_the_hub(error: BaseException) -> bool:
    """Network errors, missing repositories and missing cache entries; a wrong argument of ``load`` is not ours."""
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ENOSPC:
        return False
    from huggingface_hub.errors import HfHubHTTPError

    transport = type(error).__module__.startswith(("httpx", "requests", "urllib3"))
    return transport or isinstance(error, (OSError, HfHubHTTPError))


def _reason(error: BaseException) -> str:
    if offline():
        return f"it is not a local path, the hub at {endpoint()} cannot be reached and the cache has no copy"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"it is not a local path, and the hub at {endpoint()} says {lines[0].rstrip(' .')!r}"
