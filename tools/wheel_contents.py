"""Check that a wheel and an unpacked sdist hold what they should, no more; print the oldest versions.

    python tools/wheel_contents.py dist/hafrm-1.0-py3-none-any.whl hafrm-1.0 > oldest.txt

The oldest versions are the lower bounds of pyproject.toml, as constraints for pip.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_IN_SDIST = (".ci/", ".github/", "results/")


def tracked() -> set[str]:
    """The files of the repository."""
    command = ["git", "-C", str(ROOT), "ls-files"]
    return set(subprocess.check_output(command, text=True).splitlines())


def differ(what: str, actual: set[str], wanted: set[str]) -> None:
    """Stop where two sets of files differ."""
    if actual != wanted:
        sys.exit(f"{what}: missing {sorted(wanted - actual)}, not wanted {sorted(actual - wanted)}")


def main(wheel: Path, sdist: Path) -> None:
    files = tracked()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    differ("wheel", packed, {f.removeprefix("src/") for f in files if f.startswith("src/")})
    unpacked = {f.relative_to(sdist).as_posix() for f in sdist.rglob("*") if f.is_file()}
    differ("sdist", unpacked, {f for f in files if not f.startswith(NOT_IN_SDIST)} | {"PKG-INFO"})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if cited is None or cited[1] != project["version"]:
        sys.exit("CITATION.cff and pyproject.toml have different versions")
    for group in [project["dependencies"], *project["optional-dependencies"].values()]:
        for requirement in group:
            print(re.sub(r"^([\w.-]+)>=([\w.]+).*$", r"\1==\2", requirement))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
