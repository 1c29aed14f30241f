"""A model hub on the loopback interface: what pushing and pulling models need of its protocol, over real HTTP."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import transformers.utils.hub
import yaml
from test_data_hub import Hub as Downloads

TOKEN = "hf_SECRETsecretSECRET"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1("\n".join(self.commits).encode()).hexdigest()


@dataclass
class Fault:
    """Requests whose "METHOD path" matches are answered with this status; 0 closes the connection in their middle."""

    request: str
    status: int
    times: int = 10**6
    message: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "ModelHub"

    # ------------------------------------------------------------------------------------------------ requests

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for fault in self.server.faults:
            if fault.times and re.search(fault.request, f"{self.command} {path}"):
                fault.times -= 1
                if fault.status == 0:
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self.close_connection = True
                    return self.connection.close()
                self.read_body()
                return self.send({"error": fault.message}, fault.status)
        user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        body = self.read_body()
        if path == "/api/whoami-v2":
            return self.send({"name": user, "type": "user", "orgs": []}) if user else self.unknown_token()
        if path == "/api/repos/create":
            return self.create(user, json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/lfs/(\w+)(?:/(\d+))?(/complete)?", path):
            return self.take_large_file(match, body)
        match = re.fullmatch(
            r"(?:/api/(?:models|datasets))?(?:/datasets)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", path
        )
        name, rest = (match[1], match[2] or "") if match else ("", "")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and name.split("/")[0] != user):
            return self.send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        writes = rest.endswith("/write") or re.match("preupload|commit|info/lfs", rest)
        if writes and name.split("/")[0] != user:
            return self.send({"error": "no write permission"}, 403) if user else self.unknown_token()
        action, _, rest = rest.partition("/")
        getattr(self, f"on_{action or 'revision'}".replace("-", "_"))(name, repository, rest, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, user: str | None, wanted: dict[str, Any]) -> None:
        if user is None:
            return self.unknown_token()
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            return self.send({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        if name in self.server.repositories:
            return self.send({"error": "You already created it", "url": f"{self.server.url}/{name}"}, 409)
        self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.send({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---")[1])
        wrong = [name for name in ("tags", "datasets") if not isinstance(data.get(name, []), list | str)]
        base = data.get("base_model", "")
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+|", base if isinstance(base, str) else "[]"):
            wrong.append("base_model")
        self.send({"errors": [{"message": f'"{name}" is not valid'} for name in wrong], "warnings": []},
                  400 if wrong else 200)  # fmt: skip

    def take_large_file(self, match: re.Match[str], body: bytes) -> None:
        oid, part, complete = match.groups()
        parts = self.server.large_files.setdefault(oid, {})
        if complete is None:
            parts[int(part or 1)] = body
        elif hashlib.sha256(self.server.large_file(oid)).hexdigest() != oid:
            return self.send({"error": "the parts are not those of this file"}, 400)
        self.send({}, ETag=f'"{part}"')

    def on_revision(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        files = [{"rfilename": file} for file in repository.files]
        self.send({"id": name, "sha": repository.sha, "private": repository.private, "siblings": files})

    def on_auth_check(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        self.send({})

    def on_tree(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
        self.send(Downloads.tree(repository.files, "/".join(rest.split("/")[1:]), recursive))

    def on_resolve(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        content = repository.files.get(rest.partition("/")[2])
        if content is None:
            return self.send({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.sha)
        self.send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=repository.sha)

    def on_preupload(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        large = self.server.large_from
        self.send({"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] >= large else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def on_info(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            oid, size, chunk = each["oid"], each["size"], self.server.chunk_size
            entry = {"oid": oid, "size": size}
            if self.server.large_file(oid) is None:
                href, header = f"{self.server.url}/lfs/{oid}", {}
                if chunk:
                    header = {str(i): f"{href}/{i}" for i in range(1, -(-size // chunk) + 1)} | {"chunk_size": chunk}
                    href += "/complete"
                entry["actions"] = {"upload": {"href": href, "header": header}}
            objects.append(entry)
        self.send({"objects": objects, "transfer": "multipart" if self.server.chunk_size else "basic"})

    def on_commit(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        for line in body.splitlines():
            key, value = (record := json.loads(line))["key"], record["value"]
            if key == "header":
                repository.commits.append(value["summary"])
            elif key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.server.large_file(value["oid"])
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        self.send({"success": True, "commitOid": repository.sha, "commitUrl": url})

    # ----------------------------------------------------------------------------------------------- responses

    def unknown_token(self) -> None:
        problem = "Invalid username or password."
        self.send({"error": problem}, 401, X_Error_Message="Invalid credentials in Authorization header")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class ModelHub(ThreadingHTTPServer):
    """
    The server. `users` maps tokens to users; files of `large_from` bytes are stored by their hash (LFS), in parts of
    `chunk_size` bytes if there is one.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = {TOKEN: "tester"}
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.mistakes: list[BaseException | None] = []
        self.large_files: dict[str, dict[int, bytes]] = {}
        self.large_from, self.chunk_size = 10**9, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def large_file(self, oid: str) -> bytes | None:
        parts = self.large_files.get(oid)
        return None if parts is None else b"".join(parts[i] for i in sorted(parts))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up, and so do faults; anything else is a mistake of this server."""
        if not isinstance(error := sys.exception(), OSError | ValueError):
            self.mistakes.append(error)


@contextmanager
def running_hub() -> Iterator[ModelHub]:
    server = ModelHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    assert not server.mistakes, server.mistakes


def environment(server: ModelHub, cache: Any, token: str | None = None) -> dict[str, str]:
    """Variables of a process that is to use this hub."""
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"} | (
        {"HF_TOKEN": token} if token else {}
    )


def use_hub(server: ModelHub, monkeypatch: Any, cache: Any, token: str | None = None) -> None:
    """What these variables do, in this process, whose libraries have read them already."""
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,  # a protocol of its own
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    api = huggingface_hub.hf_api.api
    monkeypatch.setattr(api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    for name, value in environment(server, cache, token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
