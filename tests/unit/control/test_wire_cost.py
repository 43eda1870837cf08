"""What a token takes on the wire follows from the model and the codec."""

import pytest

from disagg_plugin.control.wire_cost import wire_bytes_per_token, wire_codec
from disagg_plugin.kv.geometry import KVGeometry

LLAMA = KVGeometry(layers=80, kv_heads=8, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(
    ("codec", "ranks", "bytes_per_token"),
    [
        pytest.param("raw", 1, 320 * 1024, id="Llama-3-70B, as it is"),
        pytest.param("int8", 1, 80 * 2 * 8 * 130, id="one byte a number and a scale a vector"),
        pytest.param("raw", 8, 320 * 1024, id="heads spread over ranks"),
        pytest.param("raw", 16, 2 * 320 * 1024, id="each head on two ranks"),
    ],
)
def test_bytes_of_a_token(codec: str, ranks: int, bytes_per_token: int) -> None:
    assert wire_bytes_per_token(LLAMA, codec, ranks=ranks) == bytes_per_token


@pytest.mark.parametrize(
    ("choice", "host", "dtype", "codec"),
    [
        pytest.param("auto", "127.0.0.1", "bfloat16", "raw", id="one host"),
        pytest.param("auto", "10.0.0.5", "bfloat16", "int8", id="two hosts"),
        pytest.param("int8c", "127.0.0.1", "bfloat16", "int8c", id="as told"),
        pytest.param("int8", "10.0.0.5", "float8_e4m3fn", "raw", id="quantized already"),
    ],
)
def test_codec_of_a_link(choice: str, host: str, dtype: str, codec: str) -> None:
    assert wire_codec(choice, host, dtype) == codec  # type: ignore[arg-type]
