"""`leank mask pull`: what is fetched from where, and what is kept."""

import hashlib
import http.server
import ssl
import subprocess
import threading
import urllib.request

import pytest

from vllm_leank.errors import UserError
from vllm_leank.mask import pull
from vllm_leank.mask.file import MAX_BYTES

MASK = "masks/leank/recall.yaml"


@pytest.fixture(scope="module")
def site(tmp_path_factory, repo):
    """Answers of a server, by path."""
    folder = tmp_path_factory.mktemp("site")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", certificate],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/plain.yaml":
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{self.server.server_port}/m.yaml")
                self.end_headers()
                return
            found = {
                "/m.yaml": (repo / MASK).read_bytes(),
                "/large.yaml": b"#" * (MAX_BYTES + 2),
                "/wrong.yaml": b"format: another\n",
                "/short.yaml": (repo / MASK).read_bytes(),
            }.get(self.path)
            self.send_response(404 if found is None else 200)
            if self.path == "/short.yaml":
                self.send_header("Content-Length", str(len(found) + 9))
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        yield f"https://localhost:{server.server_port}"
    server.shutdown()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "vllm-leank" / "masks"


def test_a_published_mask_is_kept_byte_by_byte(site, home, leank, repo):
    data = (repo / MASK).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    code, out, said = leank("mask", "pull", f"{site}/m.yaml", "--sha256", digest.upper())
    assert (code, (home / "m.yaml").read_bytes()) == (0, data)
    assert "of K pruned" in out
    assert digest in said
    code, _, said = leank("mask", "pull", f"{site}/m.yaml")
    assert code != 0
    assert "exists already" in said
    code, _, said = leank("mask", "pull", repo / MASK)
    assert code == 0
    assert "recall has other masks, too" in said


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.yaml", "the server says 404"),
        ("/large.yaml", "larger than"),
        ("/wrong.yaml", "format"),
        ("/short.yaml", "the server sent {size} of {more} bytes"),
        ("/plain.yaml", "https addresses and paths only"),
        ("/", "name it with --out"),
        ("/..%2Fm.yaml?x=.yaml", None),
    ],
)
def test_what_is_no_mask_leaves_nothing(site, home, leank, repo, path, message):
    code, _, said = leank("mask", "pull", f"{site}{path}")
    assert code != 0
    size = len((repo / MASK).read_bytes())
    assert message is None or message.format(size=size, more=size + 9) in said
    assert not home.exists() or not list(home.iterdir())


def test_a_mask_is_kept_where_servers_look(home, leank, repo, tmp_path):
    (tmp_path / "mine.yml").write_bytes((repo / MASK).read_bytes())
    assert leank("mask", "pull", tmp_path / "mine.yml")[0] == 0
    assert [path.name for path in home.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("source", ["Qwen/Qwen3-8B", "masks", "none.yaml", "m" * 300 + ".yaml"])
def test_a_models_id_is_no_file(home, leank, source):
    code, _, said = leank("mask", "pull", source)
    assert code != 0
    assert f"{source}: no such file; give the path of a mask file, or an https address" in said
    assert not home.exists()


def test_another_file_than_was_meant_is_not_kept(home, leank, repo):
    code, _, said = leank("mask", "pull", repo / MASK, "--sha256", "0" * 64)
    assert code != 0
    assert "nothing is kept" in said
    assert not list(home.iterdir())
    code, _, said = leank("mask", "pull", repo / MASK, "--sha256", "abc")
    assert code != 0
    assert "64 hexadecimal digits" in said


@pytest.mark.parametrize("address", ["http://x/m.yaml", "file:///etc/m.yaml", "ftp://x/m.yaml"])
def test_other_addresses_are_not_opened(address, monkeypatch):
    monkeypatch.setattr(urllib.request, "build_opener", None)
    with pytest.raises(UserError, match="https addresses and paths only"):
        pull.fetch(address)


def test_an_address_that_cannot_be_read_is_refused(home, leank):
    code, _, said = leank("mask", "pull", "https://[bad/x.yaml")
    assert code == 2
    assert "https://[bad/x.yaml: no address" in said


def test_no_server_is_one_sentence():
    with pytest.raises(UserError, match=r"https://localhost:1/m.yaml: cannot be read: "):
        pull.fetch("https://localhost:1/m.yaml")
