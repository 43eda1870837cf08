"""Names only."""

from torchvision.transforms import functional


def __getattr__(name: str) -> object:
    return getattr(functional, name)
