"""What a request's JSON body says, read without parsing it: bounded work, whatever the length.

A body of up to ``EXACT_BYTES`` is walked once by a C parser that keeps only the few fields below and builds no object
of the prompt. Of a longer one, head and tail are searched with patterns: clients write the prompt first and the small
fields behind it, or the other way round. What stands in the middle of such a body is not seen; then its class is the
default, and its length an estimate.

Fields are set by writing them once more before the closing brace: of two equal keys, JSON parsers keep the last. So
nothing else of the body changes, and malformed JSON stays malformed.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

EXACT_BYTES = 32 << 10
EDGE_BYTES = 16 << 10
_TOKEN_SAMPLE_BYTES = 4 << 10
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")


class _Fields(msgspec.Struct):
    """The fields that matter; everything else is skipped."""

    prompt: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    bootstrap_host: msgspec.Raw = msgspec.Raw()
    priority: msgspec.Raw = msgspec.Raw()
    max_tokens: msgspec.Raw = msgspec.Raw()
    max_completion_tokens: msgspec.Raw = msgspec.Raw()
    max_output_tokens: msgspec.Raw = msgspec.Raw()
    min_tokens: msgspec.Raw = msgspec.Raw()
    kv_transfer_params: msgspec.Raw = msgspec.Raw()


class _Disagg(msgspec.Struct):
    transfer_id: msgspec.Raw = msgspec.Raw()


class _TransferParams(msgspec.Struct):
    do_remote_prefill: bool = False
    disagg: _Disagg | None = None


_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_params = msgspec.json.Decoder(_TransferParams | None).decode
_decode_priority: Callable[[bytes], int | str | None] = msgspec.json.Decoder(int | str | None).decode
_decode_count: Callable[[bytes], int | None] = msgspec.json.Decoder(int | None).decode


@dataclass(frozen=True, slots=True)
class BodyFacts:
    """What was found.

    Attributes:
        prompt_tokens: Counted, where the prompt consists of token ids; else None.
        text_bytes: Length of the body, for an estimate by bytes per token.
        priority: As in the body: a number, or a word.
        limits: Fields with a limit on output tokens, by name.
        min_tokens: Least output tokens that were asked for.
        remote_prefill_done: The prompt was computed by another engine.
        is_transfer: One of our own offload calls: admitted on the side channel already.
    """

    prompt_tokens: int | None = None
    text_bytes: int = 0
    priority: int | str | None = None
    limits: tuple[tuple[str, int], ...] = ()
    min_tokens: int = 0
    remote_prefill_done: bool = False
    is_transfer: bool = False


def facts_of(body: bytes) -> BodyFacts | None:
    """What the body says, or None: no JSON object, for the engine to answer."""
    if not _is_object(body):
        return None
    return _exact(body) if len(body) <= EXACT_BYTES else _edges(body)


def with_fields(body: bytes, fields: dict[str, object]) -> bytes:
    """The same object with ``fields`` set; a body that is no object comes back as it is."""
    if not fields or not _is_object(body):
        return body
    end = body.rindex(b"}")
    before = end - 1
    while body[before] in b" \t\r\n":
        before -= 1
    addition = msgspec.json.encode(fields)[1:]
    return b"".join((memoryview(body)[:end], b"" if body[before] == ord("{") else b",", addition))


def _is_object(body: bytes) -> bool:
    return body[:64].lstrip()[:1] == b"{" and body[-64:].rstrip()[-1:] == b"}"


def _exact(body: bytes) -> BodyFacts | None:
    try:
        fields = _decode_fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    counts = [(name, _count(getattr(fields, name))) for name in _LIMITS[:3]]
    limits = [(name, count) for name, count in counts if count is not None]
    done, transfer = _transfer(bytes(fields.kv_transfer_params))
    transfer = transfer or bytes(fields.bootstrap_host) == _OUR_BOOTSTRAP_HOST
    return BodyFacts(
        _tokens(bytes(fields.prompt) or bytes(fields.input_ids)),
        len(body),
        _priority(bytes(fields.priority)),
        tuple(limits),
        _count(fields.min_tokens) or 0,
        done,
        transfer,
    )


def _tokens(prompt: bytes) -> int | None:
    """Of a list of ids, or of lists of ids, in all."""
    if not _IDS.match(prompt):
        return None
    return prompt.count(b",") + 1


_IDS = re.compile(rb"\s*\[\s*(?:\[\s*)?\d")


def _count(raw: msgspec.Raw) -> int | None:
    value = bytes(raw)
    if not value:
        return None
    try:
        return _decode_count(value)
    except msgspec.MsgspecError:
        return None  # the engine says what is wrong with it


def _priority(value: bytes) -> int | str | None:
    if not value:
        return None
    try:
        return _decode_priority(value)
    except msgspec.MsgspecError:
        return None


def _transfer(value: bytes) -> tuple[bool, bool]:
    if not value:
        return False, False
    try:
        params = _decode_params(value)
    except msgspec.MsgspecError:
        return False, False
    if params is None:
        return False, False
    return params.do_remote_prefill, params.disagg is not None and bool(bytes(params.disagg.transfer_id))


_PROMPT_IDS = re.compile(rb"\s*:\s*(?=\[\s*(?:\[\s*)?\d)")
_END_OF_IDS = re.compile(rb"\]\s*[\]}]|\]\s*,\s*\"")  # not between two lists of ids
_NUMBER = re.compile(rb"\s*:\s*(\d{1,9})\s*[,}]")
_NUMBER_OR_WORD = re.compile(rb'\s*:\s*(-?\d{1,9}|"[\w-]{1,32}")\s*[,}]')
_TRUE = re.compile(rb"\s*:\s*true\b")
_OUR_BOOTSTRAP_HOST = b'"disagg"'  # of an offload call to an SGLang server
_OURS = re.compile(rb"\s*:\s*" + _OUR_BOOTSTRAP_HOST)
_TRANSFER_ID = re.compile(rb'\s*:\s*\{\s*"transfer_id"\s*:\s*"')


def _values(edge: bytes, key: bytes, value: re.Pattern[bytes]) -> Iterator[re.Match[bytes]]:
    """Where ``key`` is a key and what follows it matches.

    A quote inside a JSON string is escaped, so text never matches; a nested object's key may, which is harmless.
    """
    quoted = b'"' + key + b'"'
    at = edge.find(quoted)
    while at >= 0:
        if edge[at - 1 : at] != b"\\" and (match := value.match(edge, at + len(quoted))):
            yield match
        at = edge.find(quoted, at + 1)


def _edges(body: bytes) -> BodyFacts:
    head, tail = body[:EDGE_BYTES], body[-EDGE_BYTES:]
    limits: dict[str, int] = {}
    priority: int | str | None = None
    done = transfer = False
    for edge in (head, tail):  # of equal keys the last counts
        for name in _LIMITS:
            for match in _values(edge, name.encode(), _NUMBER):
                limits[name] = int(match[1])
        for match in _values(edge, b"priority", _NUMBER_OR_WORD):
            priority = _priority(match[1])
        done = done or any(_values(edge, b"do_remote_prefill", _TRUE))
        transfer = transfer or any(_values(edge, b"disagg", _TRANSFER_ID))
        transfer = transfer or any(_values(edge, b"bootstrap_host", _OURS))
    least = limits.pop("min_tokens", 0)
    return BodyFacts(
        _sampled_tokens(body, head, tail), len(body), priority, tuple(limits.items()), least, done, transfer
    )


def _sampled_tokens(body: bytes, head: bytes, tail: bytes) -> int | None:
    """Token ids, counted where head or tail holds all of them; else as dense between as at both ends."""
    for edge in (head, tail):
        found = (match for key in (b"prompt", b"input_ids") for match in _values(edge, key, _PROMPT_IDS))
        if match := next(found, None):
            if ends := _END_OF_IDS.search(edge, match.end()):
                return edge.count(b",", match.end(), ends.start()) + 1
            break
    else:
        return None
    begin = match.end()
    end = body.rfind(b"]", max(begin, len(body) - EDGE_BYTES))
    size = min(_TOKEN_SAMPLE_BYTES, (end - begin) // 2)
    if edge is tail or size <= 0:
        return None
    commas = body.count(b",", begin, begin + size) + body.count(b",", end - size, end)
    return round((end - begin) * commas / (2 * size)) + 1 if commas else None
