"""effdl.core.hub: a missing network costs three seconds once, then every answer is immediate and one sentence."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from effdl.core import hub
from effdl.core.errors import ConfigurationError
from tests.support import in_fresh_process, unreachable_hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No proxy, nothing probed yet; the offline flags come back as they were."""
    with unreachable_hub(monkeypatch):
        yield


def serve(handler) -> str:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class Forbids(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *args):
        pass


def test_an_error_page_counts_as_reachable(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", serve(Forbids))
    assert hub.reachable()


def test_refused_connection_is_unreachable_at_once():
    start = time.perf_counter()
    assert not hub.reachable()
    assert time.perf_counter() - start < 1


def test_silent_endpoint_is_given_up_after_the_probe_time(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        assert not hub.reachable(0.3)
        assert 0.2 < time.perf_counter() - start < 2


def test_the_endpoint_is_probed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "_probe", lambda url, seconds, answers: (calls.append(url), answers.put(True)))
    assert hub.reachable()
    assert hub.reachable()
    assert len(calls) == 1


def test_a_proxy_is_not_probed_around(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert hub.proxied()
    assert hub.reachable()
    assert not hub.offline()


def test_local_path_is_loaded_without_a_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("probed for a local path"))
    assert hub.from_hub(os.listdir, tmp_path) == []


def test_unreachable_raises_one_sentence_naming_the_local_alternative():
    from datasets import load_dataset

    start = time.perf_counter()
    with pytest.raises(ConfigurationError) as caught:
        hub.from_hub(load_dataset, "cifar10", instead="a folder of images or an .npz file")
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert "\n" not in message
    assert "'cifar10'" in message
    assert message.endswith("a folder of images or an .npz file.")
    assert "cannot be reached" in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("package", ["transformers", "timm"])
def test_a_missing_model_fails_at_once(package):
    if package == "transformers":
        from transformers import AutoConfig

        load, name, kwargs = AutoConfig.from_pretrained, "org/no-such-model", {}
    else:
        import timm

        load, name, kwargs = timm.create_model, "resnet18", {"pretrained": True}
    with pytest.raises(hub.HubError):  # the first call pays for the import
        hub.from_hub(load, name, **kwargs)
    start = time.perf_counter()
    with pytest.raises(hub.HubError, match="local alternative"):
        hub.from_hub(load, name, **kwargs)
    assert time.perf_counter() - start < 2


def test_cached_file_still_serves_when_unreachable(tmp_path):
    from huggingface_hub import hf_hub_download

    commit = "0" * 40
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    path = hub.from_hub(hf_hub_download, "org/name", "config.json", cache_dir=tmp_path)
    assert Path(path).read_text() == "{}"
    with pytest.raises(hub.HubError):
        hub.from_hub(hf_hub_download, "org/name", "other.json", cache_dir=tmp_path)


def test_go_offline_reaches_modules_that_copied_the_flag_and_child_processes():
    import datasets.config
    import huggingface_hub

    hub.go_offline()
    assert huggingface_hub.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    code = "import huggingface_hub as h; raise SystemExit(0 if h.is_offline_mode() else 1)"
    in_fresh_process(code)


def test_errors_that_are_not_the_hubs_pass_through(tmp_path):
    def load(name):
        raise TypeError("wrong argument")

    with pytest.raises(TypeError, match="wrong argument"):
        hub.from_hub(load, "org/name")


def test_an_unreachable_hub_does_not_hide_a_full_disk_or_a_permission():
    def load(name):
        raise PermissionError("cache is read-only")

    with pytest.raises(PermissionError):
        hub.from_hub(load, "org/name")
