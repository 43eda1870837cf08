"""Offload only while this engine decodes for somebody: nobody is disturbed by a local prefill on an idle one.

Saves the wire and the prefill workers for the hours in which they are needed. While the engine is busy, the next
policy of the chain decides.
"""

from disagg_plugin.hookspecs import hookimpl
from disagg_policies.snapshots import Local, Snapshot


@hookimpl
def disagg_decide_offload(snapshot: Snapshot) -> Local | None:
    """Stay, with the reason ``decode_idle``, where no request is decoding or waiting here."""
    decode = snapshot.decode
    return Local("decode_idle") if decode.running_decodes + decode.queued_requests == 0 else None
