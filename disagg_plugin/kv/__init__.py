"""What moves: canonical KV, codecs, wire format, landing ring, transfer life cycle, transport."""
