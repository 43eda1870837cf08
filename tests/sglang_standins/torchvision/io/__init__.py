"""Names only."""

from typing import NoReturn


class ImageReadMode:
    """Asked for at import."""

    RGB = "RGB"


def decode_image(*_args: object, **_kwargs: object) -> NoReturn:
    raise NotImplementedError("tests/sglang_standins has no images")
