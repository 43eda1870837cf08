"""Putting one worker rank's data plane together from the settings; the same for every engine."""

import logging
import os
import time

import torch

from disagg_plugin.config import DisaggSettings, is_loopback
from disagg_plugin.kv.codec import KVCodec
from disagg_plugin.kv.dataplane import DataPlane, KVCacheView, agent_name
from disagg_plugin.kv.geometry import KVGeometry
from disagg_plugin.kv.transport import NixlTransport

logger = logging.getLogger(__name__)


def open_data_plane(view: KVCacheView, rank: int, settings: DisaggSettings) -> DataPlane:
    """Register memory, compile the codec if it may ever be needed, start the thread; takes seconds.

    Raises:
        ConfigError: One token does not fit a slot, or one slot not the ring.
        TransportError: NIXL cannot be used.
    """
    started_s = time.monotonic()
    epoch = time.time_ns()
    engine = f"{settings.role}-{os.getpid()}"
    nixl = settings.nixl
    plane = DataPlane(
        engine=engine,
        epoch=epoch,
        rank=rank,
        view=view,
        transfer=settings.transfer,
        transport=NixlTransport(
            agent_name(engine, rank, epoch),
            backend=nixl.backend,
            net_devices=_net_devices(settings),
            progress_thread=nixl.progress_thread,
        ),
        codec=_compiled_codec(view.geometry, rank, settings),
    )
    logger.info("disagg: rank %d is ready after %.1f s", rank, time.monotonic() - started_s)
    return plane


def _compiled_codec(geometry: KVGeometry, rank: int, settings: DisaggSettings) -> KVCodec:
    """The codec, compiled now if this rank may ever need int8: later it would stall a step for seconds."""
    transfer, role = settings.transfer, settings.role
    loopback_only = is_loopback(settings.side_channel.host)
    int8_possible = transfer.codec in ("int8", "int8c") or (transfer.codec == "auto" and not loopback_only)
    quantizable = geometry.dtype in ("float32", "bfloat16", "float16")
    wanted = transfer.compile and int8_possible and quantizable
    codec = KVCodec(head_dim=geometry.head_dim, dtype=getattr(torch, geometry.dtype), compile=wanted)
    if wanted:
        seconds = codec.warm_up(encode=role != "decode", decode=role != "prefill")
        logger.info("disagg: rank %d compiled the codec in %.1f s", rank, seconds)
    return codec


def _net_devices(settings: DisaggSettings) -> str | None:
    """Left alone, NIXL's backend listens on every address: keep it on loopback while the side channel is."""
    if settings.nixl.net_devices is not None or "UCX_NET_DEVICES" in os.environ:
        return settings.nixl.net_devices
    return "lo" if is_loopback(settings.side_channel.host) else None
