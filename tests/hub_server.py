"""
A Hub on 127.0.0.1 for tests: what `huggingface_hub` (2.4) asks of the real one in a push and in a download, over HTTP.

Repositories live in memory. `HubServer` is the state and what a test looks at; `_Handler` is the protocol, one method
for each route with the contract it keeps: the Hub's own API (https://huggingface.co/docs/hub/api), Git LFS
(https://github.com/git-lfs/git-lfs/tree/main/docs/api), and the client function that reads the answer. Xet, the Hub's
newer way to store large files, has a protocol of its own and is left out; the client falls back on LFS with
`HF_HUB_DISABLE_XET=1`. What is not here answers 405, so a test cannot pass on a route that nobody wrote.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4


TYPES = {"models": "model", "spaces": "space", "datasets": "dataset"}
LARGE = re.compile(r"\.(safetensors|bin|pt|pth|pkl)$")  # from the `.gitattributes` of a new repository


@dataclass
class Repo:
    private: bool = False
    settings: dict = field(default_factory=dict)  # what `create` was asked, `sdk` of a Space among it
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by hash: all files at that commit
    messages: dict[str, str] = field(default_factory=dict)  # by hash
    branches: dict[str, str] = field(default_factory=dict)  # by name: the hash of the head

    def add_commit(self, files: dict[str, bytes], branch: str = "main", message: str = "initial commit") -> str:
        sha = uuid4().hex + "0" * 8
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        return sha


class HubServer(ThreadingHTTPServer):
    """
    Args of a test: `url`, `repos`, and `requests`, a list of `"POST /api/..."`.

    `tokens` says who may come: `hf_write` and `hf_read` are of the user `me`, `hf_other` may write for `you`. While a
    route's name is in `broken` ("lfs" or "commit"), its connection is cut in the middle of the body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tokens = {"hf_write": ("me", "write"), "hf_read": ("me", "read"), "hf_other": ("you", "write")}
        self.repos: dict[tuple[str, str], Repo] = {}  # by type and id
        self.large: dict[str, bytes] = {}  # by sha256; in a repository only once a commit names it
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        repo = self.repo(repo_id, repo_type)
        return repo.commits[repo.branches.get(revision, revision)]

    def add_repo(self, repo_id: str, files: dict[str, bytes]) -> None:
        """A public model that somebody else put there."""
        self.repos["model", repo_id] = repo = Repo()
        repo.add_commit(files)
        self.large |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}

    def history(self, repo_id: str, repo_type: str = "model") -> list[str]:
        """The messages of all commits, oldest first."""
        return list(self.repo(repo_id, repo_type).messages.values())

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Not a traceback for a connection that a client, or a test, cut."""


class _Answer(Exception):
    """Ends a request: `status`, JSON or bytes, headers."""

    def __init__(self, status=200, body=b"", **headers):
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def _error(status: int, message: str, code: str | None = None) -> _Answer:
    # `huggingface_hub.utils.hf_raise_for_status` makes its exceptions out of these two headers.
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return _Answer(status, {"error": message}, **headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        name = "lfs" if self.command == "PUT" else "commit" if "/commit/" in path else None
        self.server.requests.append(f"{self.command} {path}")
        if name in self.server.broken:
            self.rfile.read(100)
            self.close_connection = True
            return
        body = self.body()
        try:
            with self.server.lock:
                self.route(path, body)
            raise _error(405, f"This server has no {self.command} {path}")
        except _Answer as answer:
            self.send_response(answer.status)
            for header, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def body(self) -> bytes:
        """Of known length, or in chunks (RFC 9112, 7.1), as the client sends a file."""
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, path: str, body: bytes) -> None:
        write = "POST"
        if self.command == write and path == "/api/repos/create":
            self.create(json.loads(body))
        if self.command == write and path == "/api/validate-yaml":
            # `ModelCard.validate`, called for every README.md that is pushed.
            raise _Answer(200, {"errors": [], "warnings": []})
        if self.command == "PUT" and path.startswith("/storage/"):
            self.lfs_upload(path.split("/")[2], body)
        if self.command in ("GET", "HEAD") and path.startswith("/storage/"):
            raise _Answer(200, self.server.large[path.split("/")[2]])
        if match := re.fullmatch(r"/(?:(spaces|datasets)/)?([\w.-]+/[\w.-]+?)\.git/info/lfs/objects/batch", path):
            self.find(TYPES[match[1] or "models"], match[2], "write")
            self.lfs_batch(json.loads(body))
        if self.command == write and path == "/storage-verify":
            self.lfs_verify(json.loads(body))
        if match := re.fullmatch(r"/(?:(spaces|datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(self.find(TYPES[match[1] or "models"], match[2], "read"), match[3], match[4])
        if match := re.fullmatch(r"/api/(models|spaces|datasets)/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/(.+))?)?", path):
            kind, repo_id, action, rest = match.groups()
            repo = self.find(TYPES[kind], repo_id, "write" if self.command == write else "read")
            if self.command == write and action == "preupload":
                self.preupload(json.loads(body))
            if self.command == write and action == "commit":
                self.commit(repo, repo_id, rest, [json.loads(line) for line in body.splitlines()])
            if self.command == write and action == "branch":
                self.branch(repo, rest)
            if self.command == "GET" and action in (None, "revision"):
                self.info(repo, repo_id, rest or "main")
            if self.command == "GET" and action == "tree":
                self.tree(repo, *rest.split("/", 1))

    # Who may

    def user(self) -> tuple[str, str] | None:
        """
        The token's owner and role. A token that is no token is refused everywhere, on public repositories too; the
        client tells its message from that of a missing repository (`hf_raise_for_status`).
        """
        header = self.headers["Authorization"]
        if header is None:
            return None
        if (token := header.removeprefix("Bearer ")) not in self.server.tokens:
            raise _error(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def find(self, repo_type: str, repo_id: str, right: str) -> Repo:
        """
        https://huggingface.co/docs/hub/security-tokens: a read token cannot write, and no token writes to what is
        another's. A private repository that one may not see answers as one that is not there.
        """
        user = self.user()
        repo = self.server.repos.get((repo_type, repo_id))
        owns = user is not None and repo_id.split("/")[0] == user[0]
        if repo is None or (repo.private and not owns):
            raise _error(404 if user else 401, "Repository not found", "RepoNotFound")
        if right == "write" and not (owns and user[1] == "write"):
            raise _error(403 if user else 401, "You don't have the rights to write here")
        return repo

    # Writing

    def create(self, asked: dict) -> None:
        """`HfApi.create_repo`: the body names type, owner and privacy; 409 where it is already there. A new repository
        has a first commit, with `.gitattributes`.
        """
        user = self.user()
        owner = asked.get("organization") or (user and user[0])
        if user is None or user[1] != "write" or owner != user[0]:
            raise _error(403 if user else 401, f"You don't have the rights to create a repository of {owner}")
        key = asked.get("type") or "model", f"{owner}/{asked['name']}"
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        status = 409 if key in self.server.repos else 200
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        if status == 200:
            repo = self.server.repos[key] = Repo(private, asked)
            repo.add_commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        raise _Answer(status, {"url": f"{self.server.url}/{prefix}{key[1]}", "error": "You already created this"})

    def preupload(self, asked: dict) -> None:
        """`_fetch_upload_modes`: for each file whether it goes into the commit itself or up by LFS before it."""
        for file in asked["files"]:
            assert file.keys() >= {"path", "size", "sample"}
        files = [
            {"path": f["path"], "uploadMode": "lfs" if LARGE.search(f["path"]) else "regular", "shouldIgnore": False}
            for f in asked["files"]
        ]
        raise _Answer(200, {"files": files})

    def lfs_batch(self, asked: dict) -> None:
        """
        Git LFS, docs/api/batch.md: for each object where to put it and whom to tell; no `actions` where it is there.
        """
        assert asked["operation"] == "upload"
        assert asked["hash_algo"] == "sha256"
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.large:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.url}/storage/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/storage-verify", "header": {}},
                }
            objects.append(answer)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str, body: bytes) -> None:
        """Git LFS, docs/api/basic-transfers.md: PUT of the bytes. The address is the permission, as with storage."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise _error(400, "The content does not have the promised hash")
        self.server.large[oid] = body
        raise _Answer(200)

    def lfs_verify(self, asked: dict) -> None:
        """Git LFS, docs/api/basic-transfers.md: 404 for an object that is not there in this size."""
        if len(self.server.large.get(asked["oid"], b"")) != asked["size"]:
            raise _error(404, "The object is not there")
        raise _Answer(200)

    def commit(self, repo: Repo, repo_id: str, branch: str, lines: list[dict]) -> None:
        """
        `_prepare_commit_payload`: newline-delimited JSON, a header and then the operations. All of them or none; 412
        where `parentCommit` is no longer the head.
        """
        if branch not in repo.branches:
            raise _error(404, f"No branch {branch}", "RevisionNotFound")
        head = repo.branches[branch]
        files = dict(repo.commits[head])
        header, *operations = lines
        assert header["key"] == "header"
        if header["value"].get("parentCommit") not in (None, head):
            raise _error(412, "A commit has happened since")
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise _error(400, f"The content of {value['path']} was never uploaded")
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _error(400, f"Unknown operation {key}")
        sha = repo.add_commit(files, branch, header["value"]["summary"])
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        raise _Answer(200, {"commitOid": sha, "commitUrl": url, "success": True})

    def branch(self, repo: Repo, name: str) -> None:
        """`HfApi.create_branch`: from the head of main; 409 where it is already there."""
        if name in repo.branches:
            raise _error(409, f"The branch {name} exists")
        repo.branches[name] = repo.branches["main"]
        raise _Answer(200, {})

    # Reading

    def revision(self, repo: Repo, name: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.branches.get(name, name)
        if sha not in repo.commits:
            raise _error(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def info(self, repo: Repo, repo_id: str, revision: str) -> None:
        """`HfApi.model_info`, which `snapshot_download` asks first: the hash of a revision, and its files."""
        sha, files = self.revision(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        raise _Answer(200, {"id": repo_id, "sha": sha, "siblings": siblings, "tags": [], "private": repo.private})

    def tree(self, repo: Repo, revision: str, folder: str = "") -> None:
        """`HfApi.list_repo_tree`: the entries of a folder, or of all below it."""
        _, files = self.revision(repo, revision)
        inside = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            raise _error(404, f"No folder {folder}", "EntryNotFound")
        depth = folder.count("/") + 1 if folder else 0
        deep = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        entries = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
            for path in inside
            if deep or path.count("/") == depth
        ]
        folders = {"/".join(path.split("/")[: depth + 1]) for path in inside if path.count("/") > depth}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        raise _Answer(200, entries)

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        """
        `get_hf_file_metadata` reads commit, ETag and size off a HEAD. A large file is answered with the address of its
        storage on another host, else the client would look for the commit there; its ETag is the sha256.
        """
        sha, files = self.revision(repo, revision)
        if path not in files:
            answer = _error(404, f"No file {path}", "EntryNotFound")
            answer.headers["X-Repo-Commit"] = sha
            raise answer
        content, headers = files[path], {"X-Repo-Commit": sha}
        if LARGE.search(path):
            oid = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            raise _Answer(
                302, b"", Location=f"http://localhost:{self.server.server_address[1]}/storage/{oid}", **headers
            )
        raise _Answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **headers)
