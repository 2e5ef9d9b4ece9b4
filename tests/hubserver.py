"""A stand-in of the Hugging Face Hub for its own client: repositories in memory, one branch each, LFS without Xet.

    with hubserver.running("hf_...") as hub:
        hub.url, hub.files["owner/name"]["README.md"], hub.refuse = True

The endpoints are those that huggingface_hub 0.36 to 2.4 call; answers hold the fields that these read.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".png", ".jpg", ".zip")
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


class Hub:
    """What is stored, and how it behaves."""

    def __init__(self, token: str, owner: str):
        self.token, self.owner, self.url = token, owner, ""
        self.files: dict[str, dict[str, bytes]] = {}  # "owner/name" -> path -> content
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str]] = []  # repository, summary
        self.objects: dict[str, bytes] = {}  # sha256 -> LFS content
        self.refuse = False  # answers every wish to write with 403
        self.down = False  # answers everything with 503
        self.hidden = False  # repositories cannot be read, as if they were another user's private ones
        self.corrupt = ""  # a path that is stored with a bit turned over

    def used_by(self, monkeypatch, folder) -> None:
        """Let huggingface_hub in this process talk to it; what it downloads goes into `folder`."""
        from huggingface_hub import constants, file_download

        monkeypatch.setenv("HF_TOKEN", self.token)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # before 1.0 the second had its own
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))

    def create(self, repository: str, private: bool = False) -> None:
        self.files[repository] = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.private[repository] = private

    def revision(self, repository: str) -> str:
        contents = sorted((path, _sha256(content)) for path, content in self.files[repository].items())
        return hashlib.sha1(json.dumps(contents).encode()).hexdigest()

    def commit(self, repository: str, lines: list[dict]) -> None:
        files = self.files[repository]
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                self.commits.append((repository, value["summary"]))
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                    del files[path]
        if self.corrupt in files:
            files[self.corrupt] = bytes([files[self.corrupt][0] ^ 1]) + files[self.corrupt][1:]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry | ({"lfs": lfs} if path.endswith(LFS) else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet an answer: two would wait for each other's acknowledgement
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | {name.replace("_", "-"): text for name, text in headers.items()}
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer({"error": message}, status, X_Error_Message=message, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_any(self) -> None:
        hub, body, url = self.hub, self.body(), urlsplit(self.path)
        path = unquote(url.path)
        if hub.down:
            return self.refuse(503, "Service Unavailable")
        if path.startswith("/lfs/") and self.command == "PUT":  # a signed URL: no token
            oid = path.removeprefix("/lfs/")
            if oid != _sha256(body):
                return self.refuse(400, "other content than was said")
            hub.objects[oid] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "Invalid credentials in Authorization header")
        for method, pattern, route in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                named = found.groupdict()
                if route in WRITES and hub.refuse:
                    return self.refuse(403, "You don't have the rights to write to this repository")
                if "repo" in named and (hub.hidden or named["repo"] not in hub.files):
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                revision = named.pop("revision", None)
                if revision not in (None, "main") and revision != hub.revision(named["repo"]):
                    return self.refuse(404, "Invalid rev id", "RevisionNotFound")
                return route(self, body, parse_qs(url.query), **named)
        return self.refuse(404, f"the stand-in knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # ── Routes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def whoami(self, body, query):
        self.answer({"type": "user", "name": self.hub.owner, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body, query):
        wish = json.loads(body)
        name = f"{wish.get('organization') or self.hub.owner}/{wish['name']}"
        if name in self.hub.files:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.create(name, wish.get("private") or wish.get("visibility") == "private")
        self.answer({"url": f"{self.hub.url}/{name}"})

    def validate(self, body, query):
        front = FRONT.match(json.loads(body)["content"])
        base = (yaml.safe_load(front[1]) if front else {}).get("base_model")
        if base is None or re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return self.answer({"errors": [], "warnings": []})
        self.answer({"errors": [{"message": f'"base_model" with value "{base}" is not valid.'}], "warnings": []}, 400)

    def info(self, body, query, repo):
        files = self.hub.files[repo]
        front = FRONT.match(files.get("README.md", b"").decode())
        front = yaml.safe_load(front[1]) if front else {}
        self.answer({
            "id": repo, "sha": self.hub.revision(repo), "private": self.hub.private[repo], "cardData": front,
            "tags": front.get("tags", []), "siblings": [{"rfilename": path} for path in files],
        })  # fmt: skip

    def preupload(self, body, query, repo):
        modes = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            stored = self.hub.files[repo].get(path)
            large = path.endswith(LFS)
            oid = stored and (_sha256(stored) if large else _blob(stored))
            modes.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def batch(self, body, query, repo):
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
        self.answer({"transfer": "basic", "objects": objects})

    def verify(self, body, query):
        wanted = json.loads(body)
        stored = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self.answer({}, 200 if stored else 404)

    def commit(self, body, query, repo):
        self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        sha = self.hub.revision(repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def tree(self, body, query, repo, folder):
        inside, files = f"{folder}/" if folder else "", self.hub.files[repo]
        found = {path: content for path, content in files.items() if path.startswith(inside)}
        if query.get("recursive", ["false"])[0].lower() != "true":
            found = {path: content for path, content in found.items() if "/" not in path[len(inside) :]}
        self.answer([_entry(path, content) for path, content in found.items()])

    def paths(self, body, query, repo):
        files = self.hub.files[repo]
        self.answer([_entry(path, files[path]) for path in parse_qs(body.decode())["paths"] if path in files])

    def resolve(self, body, query, repo, path):
        content, sha = self.hub.files[repo].get(path), self.hub.revision(repo)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        etag = _sha256(content) if path.endswith(LFS) else _blob(content)
        linked = {"X_Linked_Size": str(len(content)), "X_Linked_Etag": f'"{etag}"'} if path.endswith(LFS) else {}
        self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=sha, **linked)


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{REPO}(/revision/{REVISION})?", Handler.info),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/api/models/{REPO}/paths-info/{REVISION}", Handler.paths),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}/?(?P<folder>.*)", Handler.tree),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", "/lfs/verify", Handler.verify),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
WRITES = {Handler.create, Handler.preupload, Handler.commit, Handler.batch}


@contextmanager
def running(token: str, owner: str = "owner") -> Iterator[Hub]:
    """A Hub on a free port of this machine that knows one user."""
    hub = Hub(token, owner)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
