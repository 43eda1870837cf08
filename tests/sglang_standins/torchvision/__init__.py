"""Import stand-in for torchvision: SGLang and transformers import it for images; text models never call it."""

from torchvision import io, transforms

__all__ = ["io", "transforms"]
__version__ = "0.0.0"
