"""Names only."""

import enum

__all__ = ["InterpolationMode", "functional"]


class InterpolationMode(enum.Enum):
    """Asked for at import, by value."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


from torchvision.transforms import functional  # noqa: E402  it imports the enum above
