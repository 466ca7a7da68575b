"""mpi4py's own tests of collectives judge what hopcoll's do when nothing fails."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import tarfile
import urllib.error
import urllib.parse
import urllib.request

import pytest

from tests import launch

PROGRAM = "tests.mpi.programs.mpi4py_suite"
VERSION = "4.1.2"
SHA256 = "56860286dc45f20e8821e93cb06669e30462348bf866f685553fa4b712d58d02"
NAME = f"mpi4py-{VERSION}"


def download() -> bytes:
    """The source distribution, from the package index that pip is told to use."""
    index = (os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple").rstrip("/") + "/mpi4py/"
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    context = ssl.create_default_context(cafile=certificates)
    with urllib.request.urlopen(index, timeout=30, context=context) as page:
        links = re.findall(r'href="([^"#]*)', page.read().decode())
    link = next(link for link in links if link.endswith(f"{NAME}.tar.gz"))
    with urllib.request.urlopen(
        urllib.parse.urljoin(index, link), timeout=60, context=context
    ) as archive:
        content: bytes = archive.read()
    return content


@pytest.fixture(scope="module")
def suite(request):
    """The folder with mpi4py's tests; fetched once, and kept in pytest's cache."""
    folder = request.config.cache.mkdir("mpi4py")
    archive = folder / f"{NAME}.tar.gz"
    if not archive.exists():
        try:
            archive.write_bytes(download())
        except (urllib.error.URLError, OSError, StopIteration) as error:
            pytest.skip(f"mpi4py's source distribution cannot be fetched: {error!r}")
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        archive.unlink()
        pytest.fail(f"{archive.name} is not the one whose hash is pinned")
    if not (folder / NAME / "test").is_dir():
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(archive) as members:
            wanted = [m for m in members if m.name.startswith(f"{NAME}/test/")]
            members.extractall(folder, wanted, **safely)
    return folder / NAME / "test"


@pytest.mark.parametrize("ranks", [1, 3])
def test_mpi4py_agrees(suite, ranks):
    ended = launch.run(ranks, "-m", PROGRAM, suite, timeout_s=180)
    assert ended.code == 0, str(ended)
    assert len(ended.said) == ranks, str(ended)
    for line in ended.said:
        assert (line["failed"], line["skipped"]) == ([], 0)
        assert line["ran"] >= 260
        assert line["left_out"] == 36
