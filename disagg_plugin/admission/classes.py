"""Which class a request is of, and for whom it comes."""

from collections.abc import Mapping
from dataclasses import dataclass

from disagg_plugin.qos_settings import QosSettings, key_digest
from disagg_policies.admission_snapshots import ServiceClass

HEADER = b"x-disagg-priority"


class UnknownClass(Exception):
    """A client names a class that does not exist: HTTP 400 with this message."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Who asks, and in which class.

    Attributes:
        tenant: Who shares with the others of the class, or None: the key is not known.
    """

    service_class: ServiceClass
    tenant: str | None


class ClassBook:
    """The classes and keys of the settings; keys are kept as SHA-256 only.

    The class is what the request says, else its key's, else the default. It says it in the header, if headers are
    trusted, or in the body's ``priority``: a class's name, or a number, which stands for the class of that number, else
    for the next less urgent one. Who has a mapped key can ask for its class or a less urgent one, not for more.
    """

    def __init__(self, settings: QosSettings) -> None:
        """
        Raises:
            ConfigError: A key cannot be read.
        """
        self.classes = settings.service_classes()
        self._by_name = {service_class.name: service_class for service_class in self.classes}
        self._default = self._by_name[settings.default_class]
        self._trust_header = settings.trust_priority_header
        self._keys: dict[str, tuple[ServiceClass, str]] = {}
        for key in settings.api_keys:
            digest = key.digest()
            self._keys[digest] = (self._by_name[key.service_class], key.tenant or digest[:8])

    @property
    def maps_keys(self) -> bool:
        """Whether any key is known."""
        return bool(self._keys)

    def standing(self, headers: Mapping[bytes, bytes], priority: int | str | None) -> Standing:
        """Of a request with these headers (lower case) and this ``priority`` in its body.

        Raises:
            UnknownClass: It names a class that there is not.
        """
        mapped = self._mapped(headers.get(b"authorization")) if self._keys else None
        asked = self._asked(headers.get(HEADER) if self._trust_header else None, priority)
        if mapped is None:
            return Standing(asked or self._default, None)
        granted, tenant = mapped
        return Standing(asked if asked is not None and asked.priority > granted.priority else granted, tenant)

    def _asked(self, header: bytes | None, priority: int | str | None) -> ServiceClass | None:
        if header is not None:
            word = header.decode("latin-1").strip()
            return self._numbered(int(word)) if word.lstrip("-").isdecimal() else self._named(word)
        if isinstance(priority, str):
            return self._named(priority)
        return None if priority is None else self._numbered(priority)

    def _named(self, name: str) -> ServiceClass:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownClass(f"unknown class {name[:40]!r}: there are {', '.join(self._by_name)}") from None

    def _numbered(self, priority: int) -> ServiceClass:
        for service_class in self.classes:
            if service_class.priority >= priority:
                return service_class
        return self.classes[-1]

    def _mapped(self, authorization: bytes | None) -> tuple[ServiceClass, str] | None:
        if authorization is None or authorization[:7].lower() != b"bearer ":
            return None
        return self._keys.get(key_digest(authorization[7:].decode("latin-1").strip()))
