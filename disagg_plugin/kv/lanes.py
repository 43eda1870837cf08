"""Which ranks of a peer one rank exchanges chunks with, which heads go that way, and where they land. Pure.

With equal tensor parallelism each rank has one lane. Otherwise a decode rank hears from several prefill ranks, or a
prefill rank sends to several decode ranks, each time other heads. The decode rank's region is then shared out evenly,
in the order of the prefill ranks, and both sides compute the same shares. A prefill rank whose heads are all replicas
of another one's may have no lane at all.
"""

from dataclasses import dataclass

from disagg_plugin.errors import ConfigError
from disagg_plugin.kv.commands import AddPeer, RankEndpoint
from disagg_plugin.kv.geometry import HeadRange, plan_exchanges
from disagg_plugin.kv.ring import Region


@dataclass(frozen=True, slots=True)
class Lane:
    """One partner of one rank. ``region``: slots of the decode rank's ring that the prefill rank writes to."""

    endpoint: RankEndpoint
    heads: HeadRange
    region: Region


def lanes_of(command: AddPeer, *, kv_heads: int, rank: int, held: HeadRange) -> tuple[Lane, ...]:
    """The lanes of ``rank``, which holds the heads ``held``, towards a peer.

    Raises:
        ConfigError: The two engines' ranks cannot be matched, or the region has fewer slots than ranks that share it.
    """
    theirs = len(command.endpoints)
    ours = command.our_ranks or theirs
    prefill_tp, decode_tp = (theirs, ours) if command.receives else (ours, theirs)
    try:
        plan = plan_exchanges(kv_heads, prefill_tp, decode_tp)
    except ValueError as error:
        raise ConfigError(f"peer {command.peer}: {error}") from error
    endpoints = {endpoint.rank: endpoint for endpoint in command.endpoints}
    lanes = []
    for exchange in plan:
        mine, partner = exchange.decode_rank, exchange.prefill_rank
        if not command.receives:
            mine, partner = partner, mine
        if mine != rank:
            continue
        outside = exchange.heads.start < held.start or exchange.heads.stop > held.stop
        if outside or partner not in endpoints:
            raise ConfigError(
                f"peer {command.peer} has {theirs} ranks, we have {ours}; rank {rank} here holds {held}, "
                f"and would exchange {exchange.heads} with rank {partner}"
            )
        senders = [one.prefill_rank for one in plan if one.decode_rank == exchange.decode_rank]
        share = share_of_region(command.region_slots, len(senders))
        first = command.region_first_slot + senders.index(exchange.prefill_rank) * share
        lanes.append(Lane(endpoints[partner], exchange.heads, Region(first, share)))
    return tuple(lanes)


def share_of_region(region_slots: int, senders: int) -> int:
    """Slots of each of the prefill ranks that write to one decode rank.

    Raises:
        ConfigError: Not even one each.
    """
    if senders > region_slots:
        raise ConfigError(f"{senders} prefill ranks share a region of transfer.region_slots {region_slots}")
    return region_slots // senders
