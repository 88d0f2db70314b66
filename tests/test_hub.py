"""Sharing through the Hub: the real client in fresh processes, against a loopback server that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import s2edit_pipeline
from s2edit_pipeline import IdentityAdapter, S2EditPipeline, load_avatars
from s2edit_pipeline.cli import main

TOKEN = "hf_fetched_by_nobody"
SOURCE, TARGET = "a photo of a sad lady", "a photo of a smiling [I] lady"


@dataclass
class Hub:
    """What the server holds: repositories, each a list of commits (id, path -> bytes), and uploaded LFS objects."""

    address: str = ""
    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    branches: dict[tuple[str, str], int] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    pushed_meanwhile: dict[str, bytes] = field(default_factory=dict)
    """A commit that somebody makes as soon as a file list was given out."""

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        history = self.commits.setdefault(repo, [])
        name = hashlib.sha1(f"{repo} {len(history)}".encode()).hexdigest()
        history.append((name, files))
        self.branches[repo, branch] = len(history) - 1
        return name

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.commits.get(repo, [])
        if (repo, revision) in self.branches:
            return history[self.branches[repo, revision]]
        return next((commit for commit in history if commit[0] == revision), None)


def card_errors(card: str) -> list[dict[str, str]]:
    """The Hub's own rules, as far as these cards go: front matter, its types, names of licences and base models."""
    matter = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if matter is None:
        return [{"message": "no front matter"}]
    said = yaml.safe_load(matter[1])
    listed = lambda value: value if isinstance(value, list) else [value]  # noqa: E731
    rules = {
        "license": lambda v: v in ("apache-2.0", "other", "cc-by-4.0"),
        "library_name": lambda v: v == "diffusers",
        "pipeline_tag": lambda v: v in ("image-to-image", "text-to-image"),
        "base_model": lambda v: all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in listed(v)),
        "base_model_relation": lambda v: v in ("adapter", "finetune", "quantized", "merge"),
        "tags": lambda v: isinstance(v, list) and all(isinstance(tag, str) for tag in v),
        "instance_prompt": lambda v: isinstance(v, str),
        "widget": lambda v: all({"text", "output"} == set(w) and isinstance(w["output"]["url"], str) for w in v),
    }
    wrong = [name for name, value in said.items() if name not in rules or not rules[name](value)]
    wrong += [name for name in ("license", "library_name", "tags") if name not in said]
    return [{"message": f'"{name}" with value {said.get(name)!r} is not valid'} for name in wrong]


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def read(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def act(self) -> None:
            url = urlsplit(self.path)
            parts = [unquote(p) for p in url.path.strip("/").split("/")]
            hub.requests.append(f"{self.command} {url.path}")
            body = self.read()
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if parts[:2] == ["api", "repos"] and self.command == "POST":
                if not allowed:
                    return self.answer(401, {"error": "Invalid username or password."})
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                exists = repo in hub.commits
                hub.private.setdefault(repo, asked.get("private", False) or asked.get("visibility") == "private")
                if not exists:
                    hub.add(repo, {})
                return self.answer(409 if exists else 200, {"url": f"{hub.address}/{repo}"})
            if parts[:2] == ["api", "models"] and len(parts) >= 5:
                return self.api("/".join(parts[2:4]), parts[4], parts[5:], body, allowed, url.query)
            if parts[:2] == ["api", "models"] and len(parts) == 4:
                return self.api("/".join(parts[2:4]), "revision", ["main"], body, allowed, url.query)
            if parts == ["api", "validate-yaml"]:
                return self.answer(200, {"errors": card_errors(json.loads(body)["content"]), "warnings": []})
            if url.path.endswith("/info/lfs/objects/batch"):
                wanted = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
                for entry in wanted:
                    entry["actions"] = {"upload": {"href": f"{hub.address}/lfs/{entry['oid']}"}}
                return self.answer(200, {"transfer": "basic", "objects": wanted}, Content_Type="application/json")
            if parts[0] == "lfs" and self.command == "PUT":
                assert hashlib.sha256(body).hexdigest() == parts[1]
                hub.objects[parts[1]] = body
                return self.answer(200)
            if len(parts) > 4 and parts[2] == "resolve":
                return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), allowed)
            return self.answer(404, {"error": "no such address"})

        def api(self, repo: str, verb: str, rest: list[str], body: bytes, allowed: bool, query: str) -> None:
            if repo not in hub.commits or (hub.private.get(repo) and not allowed):
                return self.answer(
                    404 if allowed else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
                )
            if verb == "preupload":
                modes = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for f in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": modes})
            if verb == "commit":
                lines = [json.loads(line) for line in body.splitlines() if line]
                files = dict(hub.commits[repo][hub.branches[repo, rest[0]]][1])
                for line in lines:
                    value = line["value"]
                    if line["key"] == "header":
                        hub.messages.append(value["summary"])
                    elif line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                    elif line["key"] == "deletedFile":
                        files.pop(value["path"], None)
                request = "create_pr" in parse_qs(query)
                name = hub.add(repo, files, "refs/pr/1" if request else rest[0])
                answer = {"success": True, "commitUrl": f"{hub.address}/{repo}/commit/{name}", "commitOid": name}
                if request:
                    answer["pullRequestUrl"] = f"{hub.address}/{repo}/discussions/1"
                return self.answer(200, answer)
            found = hub.at(repo, "/".join(rest) if verb == "revision" else rest[0])
            if found is None:
                return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            name, files = found
            if verb == "revision":
                return self.answer(
                    200,
                    {"id": repo, "modelId": repo, "sha": name, "private": hub.private.get(repo, False), "tags": [],
                     "siblings": [{"rfilename": path} for path in files]},
                )  # fmt: skip
            if verb == "tree":
                listed = [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
                if hub.pushed_meanwhile:
                    hub.add(repo, hub.pushed_meanwhile)
                return self.answer(200, listed)
            return self.answer(404, {"error": verb})

        def resolve(self, repo: str, revision: str, path: str, allowed: bool) -> None:
            if hub.private.get(repo) and not allowed:
                return self.answer(401, {"error": "private"}, X_Error_Code="RepoNotFound")
            found = hub.at(repo, revision)
            if found is None or path not in found[1]:
                code = "EntryNotFound" if found else "RevisionNotFound"
                return self.answer(404, b"", X_Error_Code=code, **({"X_Repo_Commit": found[0]} if found else {}))
            data = found[1][path]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": found[0]}
            return self.answer(200, data, Content_Length=str(len(data)), **headers)

        do_GET = do_POST = do_PUT = do_HEAD = act

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    held = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(held))
    held.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield held
    server.shutdown()
    server.server_close()


def fresh(hub: Hub, folder: Path, script: str, *arguments: str, token: str | None = TOKEN) -> str:
    """What ``script`` prints in a process of its own that knows the Hub at ``hub``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "hf"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(Path(s2edit_pipeline.__file__).parent.parent),
        "NO_PROXY": "*",
    }
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PUSH = """
import sys
from s2edit_pipeline import IdentityAdapter
folder, repo, options = sys.argv[1:]
print(IdentityAdapter.from_pretrained(folder).push_to_hub(repo, **eval(options)))
"""
EDIT = """
import sys, numpy, torch
from PIL import Image
from s2edit_pipeline import IdentityAdapter, S2EditPipeline, load_avatars
from s2edit_pipeline.cli import main
model, repo, picture, out, options = sys.argv[1:]
pipe = S2EditPipeline.from_pretrained(model)
token = pipe.load_identity(repo, **eval(options))
edited = pipe("a photo of a smiling [I] lady", Image.open(picture), num_inference_steps=3, output_type="latent")
numpy.save(out, edited.images.numpy())
print(token)
"""


@pytest.fixture
def fitted(pipe: S2EditPipeline, picture: Image.Image, half_mask: np.ndarray, tmp_path: Path) -> IdentityAdapter:
    """An identity saved in "ada", the model in "model", the picture in "picture.png", its edit in "here.npy"."""
    identity = pipe.fit_identity(
        picture, SOURCE, "lady", mask=half_mask, num_steps=2, learning_rate=1e-2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    identity.save_pretrained(tmp_path / "ada")
    pipe.save_pretrained(tmp_path / "model")
    picture.save(tmp_path / "picture.png")
    edited = pipe(TARGET, picture, identity=identity, num_inference_steps=3, output_type="latent").images
    np.save(tmp_path / "here.npy", edited.numpy())
    return identity


def test_a_pushed_identity_makes_the_same_edit_in_a_strangers_process(
    hub: Hub, fitted: IdentityAdapter, tmp_path: Path
) -> None:
    hub.add("me/ada", {"weight_differences.safetensors": b"of an earlier identity", "notes.txt": b"kept"})
    address = fresh(
        hub,
        tmp_path,
        PUSH,
        "ada",
        "me/ada",
        "dict(commit_message='Ada, smiling', previews={'[I], a lady': 'picture.png'})",
    ).strip()
    assert address.startswith(f"{hub.address}/me/ada/commit/") and hub.messages == ["Ada, smiling"]
    _, files = hub.commits["me/ada"][-1]
    assert set(files) - {".gitattributes"} == {
        "notes.txt",
        "preview_1.png",
        *(p.name for p in (tmp_path / "ada").iterdir()),
    }
    assert all(files[p.name] == p.read_bytes() for p in (tmp_path / "ada").iterdir() if p.name != "README.md")
    assert b'pipe.load_identity("me/ada")' in files["README.md"]
    assert any("lfs" in request for request in hub.requests)  # the weights went the large files' way
    assert len(hub.requests) <= 10  # docs/scale.md
    hub.requests.clear()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    arguments = (str(tmp_path / "model"), "me/ada", str(tmp_path / "picture.png"), "there.npy")
    assert fresh(hub, stranger, EDIT, *arguments, "{}", token=None).strip() == "[I]"
    assert np.array_equal(np.load(stranger / "there.npy"), np.load(tmp_path / "here.npy"))
    assert len(hub.requests) <= 12
    # once fetched, it loads without the network too
    hub.requests.clear()
    offline = (
        "from s2edit_pipeline import IdentityAdapter as I; print(I.from_pretrained('me/ada', local_files_only=True))"
    )
    assert "token='[I]'" in fresh(hub, stranger, offline)
    assert not hub.requests


def test_revisions_private_repositories_and_pull_requests(hub: Hub, fitted: IdentityAdapter, tmp_path: Path) -> None:
    fresh(hub, tmp_path, PUSH, "ada", "me/ada", "dict(private=True)")
    assert hub.private["me/ada"] is True
    first = hub.commits["me/ada"][-1][0]
    fitted.renamed("[Ada]").save_pretrained(tmp_path / "renamed")
    fresh(hub, tmp_path, PUSH, "renamed", "me/ada", "dict(create_pr=True)")
    assert hub.branches["me/ada", "main"] == 1  # the pull request changed nothing yet
    read = """
import sys
from s2edit_pipeline import IdentityAdapter
for options in sys.argv[1:]:
    try:
        print(IdentityAdapter.from_pretrained("me/ada", **eval(options)).token)
    except Exception as error:
        print(type(error).__name__)
"""
    asked = ["{}", "dict(revision='refs/pr/1')", f"dict(revision='{first}')", "dict(revision='nowhere')"]
    assert fresh(hub, tmp_path, read, *asked).split() == ["[I]", "[Ada]", "[I]", "RevisionNotFoundError"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    asked = ["{}", f"dict(token='{TOKEN}')", "dict(cache_dir='other')", f"dict(cache_dir='other', token='{TOKEN}')"]
    found = fresh(hub, elsewhere, read, *asked, "dict(cache_dir='other', local_files_only=True)", token=None).split()
    assert found == ["RepositoryNotFoundError", "[I]", "RepositoryNotFoundError", "[I]", "[I]"]
    assert (elsewhere / "other" / "models--me--ada").is_dir()


REFUSED = """
import sys
from s2edit_pipeline import IdentityAdapter
try:
    IdentityAdapter.from_pretrained(sys.argv[1])
    print("loaded")
except ValueError as error:
    print(error)
"""


def test_only_an_identitys_own_files_are_fetched(hub: Hub, fitted: IdentityAdapter, tmp_path: Path) -> None:
    files = {p.name: p.read_bytes() for p in (tmp_path / "ada").iterdir()}
    hub.add("me/odd", {**files, "notes.txt": b"no", "deep/other.safetensors": b"no", "video.mp4": b"no"})
    assert fresh(hub, tmp_path, REFUSED, "me/odd").strip() == "loaded"
    fetched = [r.split("/resolve/")[1].split("/", 1)[1] for r in hub.requests if "/resolve/" in r]
    assert set(fetched) == set(files) - {"README.md"}


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"deep/evil.pkl": b"no"}, "me/odd holds deep/evil.pkl, of a kind that can run code"),
        ({"mask.png": bytes(5 * 2**20)}, "me/odd: mask.png has 5,242,880 bytes; an identity's has at most 4,194,304"),
    ],
)
def test_a_dangerous_repository_is_refused_before_anything_is_fetched(
    hub: Hub, fitted: IdentityAdapter, tmp_path: Path, added: dict[str, bytes], said: str
) -> None:
    hub.add("me/odd", {**{p.name: p.read_bytes() for p in (tmp_path / "ada").iterdir()}, **added})
    assert said in fresh(hub, tmp_path, REFUSED, "me/odd")
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_an_sdxls_composition_comes_back_as_it_was_pushed(hub: Hub, tmp_path: Path) -> None:
    """Two tokens, each with a row for each of two text encoders, and two masks."""
    script = """
import torch
from s2edit_pipeline import IdentityAdapter
from s2edit_pipeline.identity_adapter import LearnedAttribute
def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"text_encoder": torch.randn(8, generator=generator), "text_encoder_2": torch.randn(12, generator=generator)}
mask = torch.eye(4)
hat = LearnedAttribute("[A]", "hat", "a man with a hat", rows(1), 1 - mask)
IdentityAdapter("[I]", "lady", "a sad lady", "token", rows(0), mask=mask, reference=hat).push_to_hub("me/both")
found = IdentityAdapter.from_pretrained("me/both")
for part, wanted, shown in ((found, rows(0), mask), (found.reference, rows(1), 1 - mask)):
    assert part.rows.keys() == wanted.keys() and torch.equal(part.mask, shown)
    assert all(torch.equal(part.rows[name], row) for name, row in wanted.items())
print(found.token, found.reference.token)
"""
    assert fresh(hub, tmp_path, script).strip() == "[I] [A]"
    _, files = hub.commits["me/both"][-1]
    assert {"learned_embeds.safetensors", "reference_embeds.safetensors", "reference_mask.png"} <= set(files)
    assert b"tokenizer_2.eos_token_id" in files["README.md"]


def test_what_was_looked_at_is_what_is_fetched(hub: Hub, fitted: IdentityAdapter, tmp_path: Path) -> None:
    """Somebody pushes between the look at the file list and the download: the commit that was looked at is fetched."""
    files = {p.name: p.read_bytes() for p in (tmp_path / "ada").iterdir()}
    seen = hub.add("me/ada", files)
    hub.pushed_meanwhile = {**files, "mask.png": bytes(5 * 2**20)}
    assert fresh(hub, tmp_path, REFUSED, "me/ada").strip() == "loaded"
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched and all(f"/resolve/{seen}/" in request for request in fetched)
    hub.requests.clear()
    offline = "from s2edit_pipeline import IdentityAdapter as I; I.from_pretrained('me/ada', local_files_only=True)"
    fresh(hub, tmp_path, offline)  # by name, as ever
    assert not hub.requests


CUSTOM = """
import sys, numpy
sys.meta_path.insert(0, type("Absent", (), {"find_spec": staticmethod(  # as if it had never been installed
    lambda name, path=None, target=None: (_ for _ in ()).throw(ModuleNotFoundError(name))
    if name.split(".")[0] == "s2edit_pipeline" else None)})())
from diffusers import DiffusionPipeline
from PIL import Image
model, code, identity, picture, out = sys.argv[1:]
arguments = {"custom_pipeline": code} if code != model else {}
pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **arguments)
assert type(pipe).__module__.startswith("diffusers_modules"), type(pipe)
pipe.load_identity(identity)
edited = pipe("a photo of a smiling [I] lady", Image.open(picture), num_inference_steps=3, output_type="latent")
numpy.save(out, edited.images.numpy())
"""


PUBLISH = """
import sys
from s2edit_pipeline.cli import main
sys.exit(main(["publish", *sys.argv[1:]]))
"""


def test_the_published_pipeline_edits_without_the_package(hub: Hub, fitted: IdentityAdapter, tmp_path: Path) -> None:
    hub.add("me/s2edit", {"scripts/train.py": b"1", "notes.txt": b"kept"})
    printed = fresh(hub, tmp_path, PUBLISH, "--repo-id", "me/s2edit", "--commit-message", "First").strip()
    name, files = hub.commits["me/s2edit"][-1]
    assert printed == f"{hub.address}/me/s2edit/commit/{name}" and hub.messages == ["First"]
    assert files["scripts/train.py"] == b"1" and files["notes.txt"] == b"kept"
    assert b"base_model" in files["README.md"] and b'custom_pipeline="me/s2edit"' in files["README.md"]
    hub.add("me/ada", {p.name: p.read_bytes() for p in (tmp_path / "ada").iterdir()})
    arguments = (str(tmp_path / "model"), "me/s2edit", "me/ada", str(tmp_path / "picture.png"), "there.npy")
    hub.requests.clear()
    fresh(hub, tmp_path, CUSTOM, *arguments)
    # the loader asked for each module once, not once for every path of the import graph
    asked = [r.rsplit("/", 1)[1] for r in hub.requests if r.startswith("HEAD /me/s2edit/resolve/")]
    assert sorted(asked) == sorted(path for path in files if path.endswith(".py") and "/" not in path)
    assert sum("me/s2edit" in request for request in hub.requests) <= 3 * len(asked)
    assert np.array_equal(np.load(tmp_path / "there.npy"), np.load(tmp_path / "here.npy"))
    # and from the same files in a folder
    assert main(["publish", "--out", str(tmp_path / "assembled")]) == 0
    fresh(hub, tmp_path, CUSTOM, arguments[0], str(tmp_path / "assembled"), *arguments[2:4], "local.npy")
    assert np.array_equal(np.load(tmp_path / "local.npy"), np.load(tmp_path / "here.npy"))


def test_the_published_avatars_are_a_model_of_their_own(hub: Hub, tmp_path: Path) -> None:
    """One argument, the repository: model and code come from there."""
    fresh(hub, tmp_path, PUBLISH, "--repo-id", "me/avatars", "--avatars", "--private", "--create-pr")
    assert hub.private["me/avatars"] is True
    assert hub.branches["me/avatars", "main"] == 0 and hub.branches["me/avatars", "refs/pr/1"] == 1
    hub.branches["me/avatars", "main"] = 1  # the pull request is merged
    pipe = load_avatars()
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    picture.save(tmp_path / "picture.png")
    identity = pipe.fit_identity(
        picture, SOURCE, "lady", num_steps=1, mask=np.ones((128, 128), bool), method="token", batch_size=1
    )
    identity.save_pretrained(tmp_path / "ada")
    wanted = pipe(TARGET, picture, identity=identity, num_inference_steps=3, output_type="latent").images
    fresh(hub, tmp_path, CUSTOM, "me/avatars", "me/avatars", "ada", "picture.png", "there.npy")
    assert np.array_equal(np.load(tmp_path / "there.npy"), wanted.numpy())
