"""Settings of prefix reuse, and what is found wrong with LMCache before an engine starts."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from disagg_plugin import lmcache_check
from disagg_plugin.config import load_settings, not_active_yet, warnings
from disagg_plugin.errors import ConfigError
from disagg_plugin.lmcache_check import check_lmcache, unreachable_reason


def cache(**lmcache: Any) -> dict[str, Any]:
    return {"cache": {"reuse_prefix": True, "lmcache": {"url": "tcp://127.0.0.1:5555", **lmcache}}}


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        pytest.param(cache(url="http://10.0.0.5:80"), "must be tcp://HOST:PORT", id="another scheme"),
        pytest.param(cache(url="tcp://10.0.0.5"), "must be tcp://HOST:PORT", id="no port"),
        pytest.param(cache(connector="LMCacheConnectorV1"), "it ignores cache_salt", id="the in-process adapter"),
        pytest.param(cache(connector="NixlConnector"), "must be LMCacheMPConnector", id="no LMCache at all"),
        pytest.param(cache(extra={"chunk_size": 64}), "chunk_size: must begin with lmcache.mp.", id="not LMCache's"),
        pytest.param(cache(extra={"lmcache.mp.port": 1}), "lmcache.mp.port: set cache.lmcache.url", id="own field"),
        pytest.param(
            cache(lookup_timeout_ms=3000, request_timeout_s=3),
            "lookup_timeout_ms 3000 must be below request_timeout_s 3",
            id="LMCache gives up first",
        ),
        pytest.param(
            cache(extra={"lmcache.mp.lazy_offload": True}), "lmcache.mp.lazy_offload is not supported", id="unsupported"
        ),
    ],
)
def test_a_mistake_is_one_line_with_what_to_do(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=r"settings: cache\.lmcache") as caught:
        load_settings(values)
    assert line in str(caught.value)


def test_lmcaches_connector_gets_the_address_our_deadlines_and_what_the_user_adds() -> None:
    extra = {"lmcache.mp.save_decode_cache": True, "lmcache.mp.lazy_offload": False}
    settings = load_settings(cache(request_timeout_s=3, heartbeat_s=0.5, extra=extra)).cache.active_lmcache
    assert settings is not None
    assert settings.connector_extra_config == {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": 5555,
        "lmcache.mp.mq_timeout": 3.0,
        "lmcache.mp.heartbeat_interval": 0.5,
        **extra,
    }


def test_reuse_without_a_server_and_a_server_without_reuse_are_said() -> None:
    alone = load_settings({"cache": {"reuse_prefix": True}})
    assert alone.cache.active_lmcache is None
    assert [line for line in not_active_yet(alone) if "cache.lmcache.url" in line]
    unused = load_settings({"cache": {"lmcache": {"url": "127.0.0.1:5555"}}})
    assert unused.cache.active_lmcache is None
    assert warnings(unused) == ["cache.lmcache without cache.reuse_prefix: LMCache is not used"]
    assert warnings(load_settings(cache())) == not_active_yet(load_settings(cache())) == []


def test_lmcache_that_is_not_installed_is_an_error_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lmcache_check.importlib.util, "find_spec", lambda _: None)
    settings = load_settings(cache()).cache.active_lmcache
    assert settings is not None
    with pytest.raises(ConfigError, match=r"pip install disagg-plugin\[lmcache\]"):
        check_lmcache(settings)


def test_a_server_that_is_not_there_stops_the_start_unless_a_warning_is_enough(
    listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmcache_check, "require_installed", lambda: None)
    there = load_settings(cache(url=listening)).cache.active_lmcache
    assert there is not None
    assert unreachable_reason(there) == ""
    check_lmcache(there)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    gone, warned, starts = (
        load_settings(cache(url=url, **more)).cache.active_lmcache
        for more in ({}, {"on_unreachable": "warn"}, {"extra": {"lmcache.mp.autostart": True}})
    )
    assert gone is not None
    assert warned is not None
    assert starts is not None
    with pytest.raises(ConfigError, match="no LMCache server at"):
        check_lmcache(gone)
    check_lmcache(warned)
    check_lmcache(starts)
