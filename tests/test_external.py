"""Files from outside: what a folder lacks is named, nothing is fetched unasked, and what arrives wrong does not stay."""
import builtins
import gzip
import http.server
import io
import re
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedm_kit import external
from sedm_kit.checkpoints import file_sha256
from sedm_kit.external import EXTERNAL, ExternalFile, Table, check_files, external_table, fetch, files_folder, files_table, quoted_table, status, where


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    monkeypatch.delenv("SEDM_FILES", raising=False)


def packed(n=50):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a"), bytes(n))  # the same bytes whenever it is called
    return held.getvalue()


WHOLE = {"a.pt": packed(), "a.npz": packed(), "a.pkl": b"\x80\x04N.", "a.tar.gz": gzip.compress(bytes(1000)), "a.pth": packed()}


def entry(file, **more):
    return replace(ExternalFile(file, "http://127.0.0.1/none", True, "free", ("all",)), **more)


def test_every_entry_says_what_it_must():
    assert len({found.file for found in EXTERNAL.values()}) == len(EXTERNAL)
    for found in EXTERNAL.values():
        assert found.address.startswith("https://") and found.licence and found.used_by and "/" not in found.file
        assert found.sha256 is None or re.fullmatch("[0-9a-f]{8,64}", found.sha256)
        assert not found.direct or found.address.endswith(found.file)
    assert all("non-commercial" in EXTERNAL[name].licence for name in EXTERNAL if name.startswith(("edm", "dg", "stf")))
    assert "UNVERIFIED" in EXTERNAL["debias"].note
    shown = repr(external_table())
    assert all(found.address in shown and found.file in shown for found in EXTERNAL.values())


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_found_and_their_beginnings_are_not(name, tmp_path):
    path, data = tmp_path / name, WHOLE[name]
    assert status(path, entry(name)) == "missing"
    path.write_bytes(data)
    assert status(path, entry(name)) == "found"
    assert status(path, entry(name, size=len(data), sha256=file_sha256(path))) == "found"
    assert status(path, entry(name, sha256=file_sha256(path)[:8])) == "found"
    assert status(path, entry(name, sha256="0" * 64)) == "wrong checksum"
    assert status(path, entry(name, size=len(data) - 1)) == "wrong size"
    for keep in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        assert status(path, entry(name)) == "truncated"
        assert status(path, entry(name, size=len(data))) == "truncated"
        assert status(path, entry(name, sha256="0" * 64)) == "truncated"


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32))
def test_one_changed_byte_is_noticed_where_the_checksum_is_known(tmp_path_factory, name, at):
    path = tmp_path_factory.mktemp("byte") / name
    path.write_bytes(WHOLE[name])
    wanted, data = entry(name, sha256=file_sha256(path)), bytearray(WHOLE[name])
    data[at % len(data)] ^= 1
    path.write_bytes(data)
    assert status(path, wanted) in ("wrong checksum", "truncated")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n  <HTML><head>"])
def test_a_web_page_is_no_weight(page, tmp_path):
    (tmp_path / "a.pt").write_bytes(page)
    assert status(tmp_path / "a.pt", entry("a.pt")) == "a web page"


def test_where_looks_in_the_folder_given_or_named(tmp_path, monkeypatch):
    assert files_folder() is None and where("adm") is None and where("adm", tmp_path) is None
    (tmp_path / "ADM-baseline.pt").write_bytes(packed())
    assert where("adm", tmp_path) == tmp_path / "ADM-baseline.pt"
    monkeypatch.setenv("SEDM_FILES", str(tmp_path))
    assert where("adm") == tmp_path / "ADM-baseline.pt" and where("adm-ip") is None
    with pytest.raises(ValueError, match="unknown file 'amd'; known: cifar10"):
        where("amd")


def test_a_folder_is_checked_file_by_file(tmp_path):
    (tmp_path / "ADM-IP.pt").write_bytes(packed())
    rows = {row["name"]: row for row in check_files(tmp_path).rows}
    assert list(rows) == list(EXTERNAL) and rows["adm-ip"]["status"] == "found" and rows["adm-ip"]["SHA-256"] == file_sha256(tmp_path / "ADM-IP.pt")
    assert {row["status"] for name, row in rows.items() if name != "adm-ip"} == {"missing"}
    assert [row["name"] for row in check_files(tmp_path, ["adm", "stf"]).rows] == ["adm", "stf"]
    text = files_table(tmp_path)
    assert EXTERNAL["edm-uncond"].address in text and EXTERNAL["adm-ip"].address not in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_mistakes_about_folders(tmp_path):
    for wrong in (check_files, files_table, partial(fetch, "cifar10")):
        with pytest.raises(ValueError, match="SEDM_FILES"):
            wrong()
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_files(tmp_path / "none")
    with pytest.raises(ValueError, match="unknown file 'x'"):
        check_files(tmp_path, ["x"])


# ---- fetching, from this machine

@pytest.fixture
def served(tmp_path, monkeypatch):
    "A server of files, and an entry for one of them."
    pytest.importorskip("pooch")
    home = tmp_path / "served"
    home.mkdir()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=home))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def offer(data, **more):
        (home / "a.pt").write_bytes(data)
        monkeypatch.setitem(EXTERNAL, "a", entry("a.pt", address=f"http://127.0.0.1:{server.server_port}/a.pt", **more))
        return tmp_path / "weights"
    yield offer
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once(served, monkeypatch):
    folder = served(packed())
    path = fetch("a", folder)
    assert path.read_bytes() == packed() and [file.name for file in folder.iterdir()] == ["a.pt"]
    served(b"another content")
    assert fetch("a", folder).read_bytes() == packed()


@pytest.mark.parametrize("data, more, said", [(packed()[:-3], {}, "truncated"), (packed(), {"sha256": "1" * 64}, "wrong checksum"), (packed(), {"size": 9}, "wrong size"),
                                              (b"<html>no</html>", {}, "a web page")])
def test_what_arrives_wrong_does_not_stay(served, data, more, said):
    folder = served(data, **more)
    with pytest.raises(ValueError, match=said):
        fetch("a", folder)
    assert list(folder.iterdir()) == []


def test_a_wrong_file_that_is_there_is_left_to_its_owner(served):
    folder = served(packed())
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"PK mine")
    with pytest.raises(ValueError, match=r"not the file \(truncated\): remove it first"):
        fetch("a", folder)
    assert (folder / "a.pt").read_bytes() == b"PK mine"


def test_pages_are_not_fetched_and_pooch_is_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot be fetched by a program: open https://drive"):
        fetch("dg-uncond", tmp_path)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "pooch":
            raise ImportError(name)
        return real(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape("pip install 'sedm_kit[data]'")):
        fetch("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- tables

def test_tables_escape_and_refuse():
    table = Table([{"a": "<b>", "c": None}, {"a": 1.5, "c": "x"}], "t&t")
    assert "&lt;b&gt;" in table._repr_html_() and "t&amp;t" in table._repr_html_() and repr(table).splitlines()[0] == "t&t"
    assert repr(table).splitlines()[3:] == ["<b>  –", "1.5  x"] and repr(Table([])) is not None
    with pytest.raises(ValueError, match="same columns"):
        Table([{"a": 1}, {"b": 1}])


def test_quoted_tables():
    one = quoted_table([{"NFE": 35, "FID": 1.97}, {"NFE": 21, "FID": None}], "somebody 2022")
    assert one.keys() == [35, 21] and "Source: somebody 2022" in repr(one) and "FID, quoted" in one._repr_html_()
    for rows, source in (([{"NFE": 35}], "x"), ([], "x"), ([{"NFE": 35, "FID": 1}], ""), ([{"NFE": 1, "FID": 1}, {"NFE": 1, "FID": 2}], "x"), ([{"NFE": 1, "FID": 1}, {"FID": 2}], "x")):
        with pytest.raises(ValueError, match="quoted table"):
            quoted_table(rows, source)


def test_nothing_is_fetched_by_importing_or_checking(tmp_path, monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    check_files(tmp_path)
    external_table()
    assert external.where("cifar10", Path(tmp_path)) is None
