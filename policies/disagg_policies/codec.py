"""How KV travels on one link: a pure function of measured speeds."""

from disagg_policies.snapshots import Codec, CodecChoices


def by_link(choices: CodecChoices, *, hysteresis: float = 0.05) -> Codec:
    """Raw where the wire is faster than the codec; a tie goes raw.

    Seconds per token of KV::

        raw   raw bytes / link bytes per s
        int8  raw bytes / encode bytes per s + int8 bytes / link bytes per s (+ raw bytes / decode bytes per s)

    Encoding is added to the wire, not hidden behind it: it runs in the engine's thread on P, where the next step waits
    for it. (KVServe, arXiv 2605.13734: a fixed choice can increase latency.)

    Args:
        hysteresis: Share by which the codec not in use has to be faster, so that a noisy bandwidth does not flap it.
    """
    link = choices.link
    if link.samples == 0:
        raw_s = choices.raw_bytes_per_token / link.bytes_per_s
        return Codec("raw", "link_not_measured", raw_s, raw_s)
    raw_s = choices.raw_bytes_per_token / link.bytes_per_s
    int8_s = choices.int8_bytes_per_token / link.bytes_per_s + choices.raw_bytes_per_token / choices.encode_bytes_per_s
    if choices.decode_bytes_per_s is not None:
        int8_s += choices.raw_bytes_per_token / choices.decode_bytes_per_s
    if choices.previous == "int8":
        name = "int8" if int8_s * (1.0 - hysteresis) < raw_s else "raw"
    else:
        margin = hysteresis if choices.previous == "raw" else 0.0
        name = "int8" if int8_s < raw_s * (1.0 - margin) else "raw"
    return Codec(name, "wire_slower" if name == "int8" else "wire_faster", raw_s, int8_s)
