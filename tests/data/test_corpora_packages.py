"""Packages: fetched once, read in memory, their licences found."""

import gzip
import io
import shutil
import subprocess
import tarfile

import pytest

from data.corpora_packages import Package, PackageError, fetch, licence


def write_tgz(path, files):
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      archive.addfile(entry, io.BytesIO(content))
    link = tarfile.TarInfo("package/link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  return path


def write_deb(folder, files):
  root = folder / "root"
  control = "Package: p\nVersion: 1:2-3\nArchitecture: all\nMaintainer: x\n"
  files = {
    "DEBIAN/control": (control + "Description: y\n").encode(),
    **files,
  }
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  path = folder / "p_1%3a2-3_all.deb"
  subprocess.run(
    ["dpkg-deb", "-Zxz", "--root-owner-group", "-b", root, path],
    check=True,
    capture_output=True,
  )
  return path


def test_read_gives_files_in_the_order_asked(tmp_path, write_wheel):
  files = {"a.txt": b"a", "b.txt.gz": gzip.compress(b"b"), "xa.txt": b"x"}
  package = Package("pip:p", write_wheel(tmp_path / "p-1.whl", files))
  assert package.read(["b.txt.gz", "a.txt"]) == [b"b", b"a"]
  with pytest.raises(PackageError, match=r"p-1\.whl: no file a\.tx in it"):
    package.read(["a.txt", "a.tx"])


def test_wheel(tmp_path, write_wheel):
  path = write_wheel(
    tmp_path / "p_q-1.5-py3-none-any.whl",
    {
      "p/a.txt": b"a",
      "p/b.txt.gz": gzip.compress(b"b"),
      "p/c.bin": b"c",
      "p-1.5.dist-info/METADATA": b"License: UNKNOWN\nClassifier: License ::"
      b" OSI Approved :: MIT License\n\nLicense: not this",
      "p-1.5.dist-info/LICENSE.txt": b"Do what you want.\n",
    },
  )
  package = Package("pip:p", path)
  assert package.version == "1.5"
  assert list(package.members(r"\.txt(\.gz)?$"))[:2] == [
    ("p/a.txt", b"a"),
    ("p/b.txt.gz", b"b"),
  ]
  name, text = licence(package)
  assert name == "OSI Approved :: MIT License"
  assert text.endswith("\n\nDo what you want.\n")


def test_tgz(tmp_path):
  path = write_tgz(
    tmp_path / "p-0.2.3.tgz",
    {
      "package/package.json": b'{"license": "Apache-2.0"}',
      "package/data/a.txt": b"a",
    },
  )
  package = Package("npm:p", path)
  assert package.version == "0.2.3"
  # A link is no file.
  assert list(package.members(r"\.txt$")) == [("package/data/a.txt", b"a")]
  assert licence(package) == ("Apache-2.0", "")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_deb(tmp_path):
  copyright_file = (
    b"Format: https://x/\n\nFiles: *\nLicense: GPL-2+\n text\n\nFiles: y\n"
    b"License: MIT\n\nFiles: z\nLicense: MIT\n"
  )
  path = write_deb(
    tmp_path,
    {"usr/share/doc/p/copyright": copyright_file, "usr/share/x.txt": b"text"},
  )
  package = Package("apt:p", path)
  assert package.version == "1:2-3"
  assert list(package.members("x.txt$")) == [("usr/share/x.txt", b"text")]
  name, text = licence(package)
  assert name == "GPL-2+; MIT" and copyright_file.decode().strip() in text


@pytest.mark.parametrize("name", ["p-1.whl", "p-1.tgz", "p_1_all.deb"])
def test_damaged_package(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"!<arch>\n" + b"x" * 300)
  with pytest.raises(PackageError, match="damaged"):
    list(Package("x", path).members(""))


def test_truncated_package(tmp_path):
  path = write_tgz(tmp_path / "p-1.tgz", {"package/a": bytes(10**6)})
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(PackageError, match="damaged"):
    list(Package("x", path).members(""))


def test_fetch_downloads_once(tmp_path, pip):
  pip("import sys; open('p-1.whl', 'w').write(sys.argv[1])")
  package = fetch("pip:p==1", tmp_path)
  assert package.path.read_text() == "p==1"
  pip("raise SystemExit(1)")
  assert fetch("pip:p==1", tmp_path) == package
  assert {path.name for path in tmp_path.iterdir()} == {"pip"}


@pytest.mark.parametrize(
  ("code", "reason"),
  [
    ("raise SystemExit('no such\\npackage')", "pip:p: package"),
    ("pass", "gave no file"),
    ("open('half', 'w'); raise SystemExit('broken')", "pip:p: broken"),
  ],
)
def test_fetch_that_fails(tmp_path, pip, code, reason):
  pip(code)
  with pytest.raises(PackageError, match=reason):
    fetch("pip:p", tmp_path)
  assert not list(tmp_path.rglob("half"))


def test_missing_client(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(PackageError, match="npm is not installed"):
    fetch("npm:p", tmp_path)
