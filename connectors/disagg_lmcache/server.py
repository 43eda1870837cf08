"""``disagg-lmcache-server``: LMCache's own ``lmcache server``, with our serializer registered before it starts.

LMCache has no entry points for serializers. The arguments are LMCache's.
"""

import os
import sys
from collections.abc import Sequence


def register() -> None:
    """Make ``disagg_int8`` known to LMCache in this process."""
    from lmcache.v1.distributed.serde import get_registered_serde_types, register_serde_factory

    from disagg_lmcache.int8_serde import NAME, create

    if NAME not in get_registered_serde_types():
        register_serde_factory(NAME, create)


def main(argv: Sequence[str] | None = None) -> None:
    """Register, then be ``lmcache server``."""
    from disagg_plugin.errors import ConfigError
    from disagg_plugin.lmcache_check import require_installed

    try:
        require_installed()
    except ConfigError as error:
        sys.exit(f"disagg-lmcache-server: {error}")
    os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")  # LMCache's own opt-out of usage reports
    register()
    from lmcache.cli.main import main as lmcache

    lmcache(["server", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
