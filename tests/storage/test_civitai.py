"""Checkpoints of Civitai, from servers that cut, lie, redirect, want a token and send web pages."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from said import line, naming

from lorakit import base as bases
from lorakit import config as configs
from lorakit.console import Console
from lorakit.storage import civitai

CONTENT = save({"weight": torch.arange(400_000, dtype=torch.float32)})
TOKEN = "civitai-secret-of-a-person"
PAGE = "https://civitai.com/models/257749/pony?modelVersionId=290640"


class Site:
    """Civitai and the store that it redirects to, each on an address of its own."""

    def __init__(self):
        self.url = self.store = ""
        self.file = {
            "name": "pony.safetensors", "type": "Model", "primary": True, "sizeKB": len(CONTENT) / 1024,
            "hashes": {"SHA256": hashlib.sha256(CONTENT).hexdigest().upper()},
            "metadata": {"fp": "fp16", "size": "pruned"},
        }  # fmt: skip
        self.others: list[dict] = []
        self.model = {
            "id": 257749, "name": "Pony", "type": "Checkpoint", "allowCommercialUse": ["Image"], "allowNoCredit": False,
            "allowDerivatives": True,
        }  # fmt: skip
        self.content, self.wants_token, self.page, self.cut = CONTENT, False, False, 0
        self.ranges, self.redirect, self.down = True, "", False
        self.asked: list[tuple[str, str, str | None, str | None]] = []  # server, path, token, range

    def version(self) -> dict:
        own = {"downloadUrl": f"{self.url}/api/download/models/290640"}
        files = [own | file for file in (*self.others, self.file)]
        return {"id": 290640, "modelId": 257749, "name": "v6", "files": files}


def serve(site: Site, name: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append((name, self.path, self.headers.get("Authorization"), self.headers.get("Range")))
            if site.down:
                return self.send_error(503)
            if self.path.startswith("/api/v1/"):
                described = site.version() if "versions/290640" in self.path else None
                if "models/257749" in self.path:
                    described = site.model | {"modelVersions": [site.version()]}
                return (
                    self.answer(json.dumps(described).encode(), "application/json")
                    if described
                    else self.send_error(404)
                )
            if site.wants_token and not (name == "store" or self.headers.get("Authorization") == f"Bearer {TOKEN}"):
                return self.send_error(401)
            if site.page:
                return self.answer(b"<html>Log in</html>", "text/html")
            if name == "site":
                self.send_response(307)
                self.send_header("Location", site.redirect or f"{site.store}/pony")
                return self.end_headers()
            return self.give()

        def give(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if site.ranges else 0
            if start > len(site.content):
                return self.send_error(416)
            part = site.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(part)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
            self.end_headers()
            self.wfile.write(part[: site.cut] if site.cut else part)
            self.close_connection = True

        def answer(self, content, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1" if name == "site" else "localhost", 0), Handler)


@pytest.fixture
def site(monkeypatch, tmp_path):
    site = Site()
    servers = {name: serve(site, name) for name in ("site", "store")}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.url = f"http://127.0.0.1:{servers['site'].server_port}"
    site.store = f"http://localhost:{servers['store'].server_port}"
    monkeypatch.setattr(civitai, "SITE", site.url)
    monkeypatch.setattr(civitai, "SCHEME", "http")
    monkeypatch.setattr(civitai.time, "sleep", lambda _: None)
    monkeypatch.setattr(civitai.files, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.delenv("CIVITAI_TOKEN", raising=False)
    yield site
    for server in servers.values():
        server.shutdown()
        server.server_close()


def fetched(reference=PAGE, progress=lambda *_: None, said=None) -> Path:
    return civitai.fetch_civitai(reference, (said if said is not None else []).append, progress)


@contextmanager
def refused(kind, *words):
    with pytest.raises(kind, match=naming(*words)) as caught:
        yield
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "known"),
    [
        (PAGE, True), ("https://civitai.com/models/257749", True), ("https://www.civitai.com/models/257749/a-b", True),
        ("https://civitai.com/api/download/models/290640?type=Model&format=SafeTensor", True),
        ("http://civitai.com/models/257749", False), ("https://civitai.com.evil.org/models/1", False),
        ("https://civitai.com/images/1", False), ("owner/name", False),
        ("https://evil.org/civitai.com/models/1", False),
    ],
)  # fmt: skip
def test_addresses(reference, known):
    assert civitai.is_civitai(reference) is known
    assert not (known and configs.is_place(reference))


def test_a_checkpoint_is_fetched_once_and_shown_first(site):
    said, seen = [], []
    path = fetched(progress=lambda *x: seen.append(x), said=said)
    assert path.read_bytes() == CONTENT and path.name == "pony.safetensors"
    assert line(said, "Pony, v6", "2 MB", "commercial use Image", "credit the author", "derivatives allowed")
    assert seen[-1] == ("MB of the base", 1, 2)
    asked = len(site.asked)
    assert fetched() == path and len(site.asked) == asked  # without asking the site
    assert fetched("https://civitai.com/models/257749") == path  # the newest version must be asked for
    assert [name for name, path, *_ in site.asked if path == "/pony"] == ["store"]
    assert sorted(file.name for file in path.parent.iterdir() if file.name != ".lock") == ["pony.safetensors"]


def test_a_base_is_opened_by_its_address(site, monkeypatch):
    monkeypatch.setattr("lorakit.base.model._open_file", lambda file: bases.known("sdxl"))
    said = []
    assert bases.open(PAGE, console=Console(said.append, False)).family == "sdxl" and line(said, "base", "Pony")


def test_stop_ends_the_download_and_the_next_one_resumes(site):
    console = Console(lambda _: None, False)
    site.cut = 300_000
    stop = lambda *_: console.stop.set()  # noqa: E731
    with console.bar() as bar, pytest.raises(KeyboardInterrupt, match="kept"):
        fetched(progress=lambda *x: (stop(), bar(*x)))
    site.cut = 0
    before = len(site.asked)
    assert fetched().read_bytes() == CONTENT
    (start,) = [asked for _, path, _, asked in site.asked[before:] if path == "/pony"]
    assert start and 0 < int(start[6:-1]) <= 300_000


def test_a_connection_that_breaks_is_resumed(site):
    site.cut = 500_000
    assert fetched().read_bytes() == CONTENT
    starts = [start for _, path, _, start in site.asked if path == "/pony"]
    assert starts == [None, "bytes=500000-", "bytes=1000000-", "bytes=1500000-"]


def test_a_store_that_cannot_send_a_part_sends_the_whole(site, monkeypatch):
    site.cut, site.ranges = 500_000, False
    monkeypatch.setattr(civitai.time, "sleep", lambda _: setattr(site, "cut", 0))
    assert fetched().read_bytes() == CONTENT


def test_a_part_of_a_longer_file_is_refused_and_deleted(site, tmp_path):
    folder = tmp_path / "cache" / "civitai" / "290640"
    folder.mkdir(parents=True)
    (folder / f".{site.file['hashes']['SHA256'].lower()[:16]}.partial").write_bytes(CONTENT + b"more")
    with refused(ValueError, "pony.safetensors", "size"):
        fetched()
    assert fetched().read_bytes() == CONTENT


def test_the_token_reaches_the_site_only(site, monkeypatch, tmp_path):
    site.wants_token = True
    with refused(PermissionError, "a token", "CIVITAI_TOKEN"):
        fetched()
    monkeypatch.setenv("CIVITAI_TOKEN", "wrong")
    with refused(PermissionError, "another token"):
        fetched()
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    said = []
    fetched(said=said)
    tokens = {name: {token for server, _, token, _ in site.asked if server == name} for name in ("site", "store")}
    assert f"Bearer {TOKEN}" in tokens["site"] and tokens["store"] == {None}
    written = b"".join(file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert TOKEN.encode() not in written and TOKEN not in "".join(said)
    with pytest.raises(ValueError, match="CIVITAI_TOKEN") as caught:
        configs.parse({"steps": 1, "base": f"https://civitai.com/api/download/models/1?token={TOKEN}"})
    assert TOKEN not in str(caught.value)


def test_what_the_site_says_is_checked(site, monkeypatch):
    site.content = CONTENT[:-4] + b"\1\2\3\4"
    with refused(ValueError, "pony.safetensors", "digest"):
        fetched()
    site.content = CONTENT + b"more"
    with refused(ValueError, "pony.safetensors", "size"):
        fetched()
    site.content, site.page = CONTENT, True
    with refused(PermissionError, "text/html", "token"):
        fetched()
    site.page, site.file["hashes"] = False, {}
    with refused(ValueError, "digest", "yourself"):
        fetched()


@pytest.mark.parametrize("address", ["https://localhost/pony", "ftp://localhost/pony", "file:///etc/passwd"])
def test_redirects_to_another_scheme_are_not_followed(site, address):
    site.redirect = address
    with refused((ValueError, FileNotFoundError), "Civitai"):
        fetched()
    assert not [path for name, path, *_ in site.asked if name == "store"]


def test_only_https_outside_of_tests(monkeypatch):
    assert civitai.SCHEME == "https" and civitai.SITE.startswith("https://")
    with pytest.raises(ValueError, match="https"):
        civitai._check_scheme("http://civitai.com/api")


def test_redirects_in_a_circle_and_sites_that_are_down(site):
    site.redirect = f"{site.url}/api/download/models/290640"
    with refused(FileNotFoundError, "does not answer"):
        fetched()
    site.down = True
    with refused(FileNotFoundError, "does not answer", 503):
        fetched()


def test_only_safetensors_checkpoints(site):
    site.file["name"] = "pony.ckpt"
    with refused(ValueError, "Pony", ".ckpt", "pickle"):
        fetched()
    site.file["name"], site.model["type"] = "../../pony: 1.safetensors", "LORA"
    with refused(ValueError, "Pony", "LORA"):
        fetched()
    site.model["type"] = "Checkpoint"
    assert "pony" in fetched().name and fetched().parent.name == "290640"  # no folder of its choice
    with refused(FileNotFoundError, "no such model"):
        fetched("https://civitai.com/models/1?modelVersionId=2")


def test_a_file_that_is_no_safetensors_is_not_kept(site, tmp_path):
    site.content = b"PK\3\4" + bytes(5000)
    site.file |= {"sizeKB": len(site.content) / 1024, "hashes": {"SHA256": hashlib.sha256(site.content).hexdigest()}}
    with refused(ValueError, "zip"):
        fetched()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_address_chooses_among_several_files(site):
    full = site.file | {"name": "full.safetensors", "primary": False, "metadata": {"fp": "fp32", "size": "full"}}
    site.others = [full, site.file | {"name": "pony.pt", "type": "VAE"}]
    assert fetched(f"{PAGE}&fp=fp32&size=full").name == "full.safetensors"


def test_a_version_that_is_no_number_names_no_folder(site, tmp_path):
    (outside := tmp_path / "outside").mkdir()
    (outside / "other.safetensors").write_bytes(CONTENT)
    with refused(ValueError, "modelVersionId", "number"):
        fetched("https://civitai.com/models/257749?modelVersionId=../../outside")
    assert not site.asked


@pytest.mark.parametrize("answer", [[], {}, {"id": 1}, "x"])
def test_a_description_of_another_form_is_refused_in_words(site, monkeypatch, answer):
    monkeypatch.setattr(civitai, "_describe", lambda _: answer)
    with refused(ValueError, "description", "read"):
        fetched()


def test_a_full_disk_is_said_before_the_download(site, monkeypatch):
    monkeypatch.setattr(civitai.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with refused(OSError, "no room", "pony.safetensors"):
        fetched()
