"""Every error that this package raises, and what the caller does next.

DisaggError
├── ConfigError        the deployment is wrong: print the one line, exit; the user fixes it and restarts
├── PeerError          this peer cannot be used: count it, choose another one or prefill locally
│   ├── PeerRefused        it answered "no" (queue full, other weights): try the next best one
│   ├── PeerLost           it is gone or silent: abandon what it owes us
│   ├── AuthenticationFailed  keys do not match: say it once, loudly; no retry helps
│   └── StoreFailed        the prefix store (LMCache): serve without it until it is connected anew
├── TransferError      this transfer is lost: repair the request (another peer, or local prefill)
│   ├── TransferTimeout    a deadline of ours passed
│   └── TransportError     NIXL reported a failure
└── CodecError         the bytes are not what their header promises: discard the chunk, ask once more
    └── WireError          not one of our chunks or notifications at all: discard and count
"""


class DisaggError(Exception):
    """Base of everything below; never raised itself."""


class ConfigError(DisaggError):
    """The deployment is wrong; the message is one line that says what to change."""


class PeerError(DisaggError):
    """A peer cannot be used for this request."""


class PeerRefused(PeerError):
    """The peer answered and said no."""


class PeerLost(PeerError):
    """The peer went away or fell silent."""


class AuthenticationFailed(PeerError):
    """The side channel's keys do not match."""


class StoreFailed(PeerError):
    """The prefix store did not answer in time, or not as expected."""


class TransferError(DisaggError):
    """One transfer is lost; the request it served must be repaired."""


class TransferTimeout(TransferError):
    """A deadline of ours passed."""


class TransportError(TransferError):
    """The transport reported a failure of a write or a notification."""


class CodecError(DisaggError):
    """A payload does not match its header."""


class WireError(CodecError):
    """A buffer is not a chunk or notification of this protocol."""
