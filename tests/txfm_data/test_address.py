"""Addresses on this machine and elsewhere, settings taken from the environment, and what is taken out of messages."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_server import environment
from txfm_data import address
from txfm_data.address import explain, is_remote, join, local_path, redact, tiledb_config

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzzzzKEY"


@pytest.fixture(autouse=True)
def bare_environment() -> Iterator[None]:
    with environment({}):
        yield


@pytest.mark.parametrize(
    "text", ["s3://b/x", "S3://b", "gs://b/x", "az://c/x", "http://h/x", "https://h", "memory://x"]
)
def test_remote(text: str) -> None:
    assert is_remote(text)
    with pytest.raises(ValueError, match="a remote address where a path"):
        local_path(text)


@pytest.mark.parametrize(
    "text", ["x", "/a/b", "a:b", "C:/data/x", "C:\\data\\x", "s3", "s3:x", "dir/s3://x", "file:///a", "", "s3:/b/x"]
)
def test_local(text: str) -> None:
    assert not is_remote(text)


def test_a_path_object_may_hold_a_remote_address() -> None:
    assert is_remote(Path("s3://bucket/store"))
    assert join(Path("s3://bucket/store"), "obs") == "s3://bucket/store/obs"
    assert not is_remote(Path("/data/s3:/x"))


def test_files_by_url_are_paths(tmp_path: Path) -> None:
    assert local_path("file:///a/b%20c") == Path("/a/b c")
    assert local_path("file://localhost/a") == Path("/a")
    assert local_path("a/b") == local_path(Path("a/b")) == Path.cwd() / "a/b"
    with pytest.raises(ValueError, match="names the machine 'host'"):
        local_path("file://host/a")


def test_an_unknown_scheme_is_refused_without_its_secret() -> None:
    with pytest.raises(ValueError, match="no scheme ftp://; give a path, or an address with one of s3://") as caught:
        is_remote("ftp://me:hidden@h/x")
    assert "hidden" not in str(caught.value)


def test_join() -> None:
    assert join("s3://b/store/", "a/b", "/c/") == "s3://b/store/a/b/c"
    assert join("s3://") == "s3://"  # not "s3:", which would be a folder here
    assert join("/data", "a/b", "c") == "/data/a/b/c"
    assert join("file:///data", "/a") == "/data/a"
    for folder in ("s3://b/store", "/data"):
        with pytest.raises(ValueError, match="leads out of"):
            join(folder, "a/../../b")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://k:s@b/x", "s3://***@b/x"),
        ("'https://h/p?X-Amz-Signature=abcdef0&a=b' failed", "'https://h/p?***' failed"),
        ("GET /p?X-Amz-Credential=AKIDEXAMPLE%2F2026&X-Amz-Date=1", "GET /p?X-Amz-Credential=***&X-Amz-Date=1"),
        ("/p?AWSAccessKeyId=AKIDEXAMPLE&Signature=abcdefg%3D&Expires=1", "/p?AWSAccessKeyId=***&Signature=***&Expires=1"),
        ("/c/b?sv=2024&sig=abcdefg%2B", "/c/b?sv=2024&sig=***"),
        ("Credential=AKIDEXAMPLE/2026/s3, SignedHeaders=host, Signature=0123456789", None),
        ("<AWSAccessKeyId>AKIDEXAMPLE</AWSAccessKeyId><A>m</A>", "<AWSAccessKeyId>***</AWSAccessKeyId><A>m</A>"),
        ("{'aws_secret_access_key': 'abcdefgh', 'region': 'x'}", "{'aws_secret_access_key': '***', 'region': 'x'}"),
        ("Authorization: Bearer hf_abcdefghijk", "Authorization: Bearer ***"),
        ("token=abcdefgh1234 next", "token=*** next"),
    ],
)  # fmt: skip
def test_secrets_are_taken_out(text: str, shown: str | None) -> None:
    assert redact(text) == (shown or "Credential=***, SignedHeaders=host, Signature=***")


@pytest.mark.parametrize(
    "text",
    [
        "the request signature does not match the signature you provided",
        "gene token: 5 of 61,888 tokens; CLS token = 0",
        "/home/me@x/y.h5ad? (me@mail.org)",
        "design: 3 designs, key: 4",
        "basic statistics of the store, the bearer of the certificate",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET + "/session")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxy%2Fpassword@proxy:3128")
    text = f"{SECRET}/session {SECRET} {SECRET.replace('/', '%2F').replace('+', '%2B')} proxy/password proxy%2Fpassword"
    assert redact(text) == "*** *** *** *** ***"


def test_an_empty_or_tiny_variable_does_not_shred_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "e")
    assert redact("a store there") == "a store there"


def test_no_environment_no_settings() -> None:
    assert tiledb_config() == {}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, ("127.0.0.1:9000", "http")),
        ({"AWS_ENDPOINT_URL": "https://minio.example.org/"}, ("minio.example.org:443", "https")),
        ({"AWS_ENDPOINT_URL": "https://h/prefix/"}, ("h:443/prefix", "https")),
        ({"AWS_ENDPOINT_URL": "http://[::1]:9000"}, ("[::1]:9000", "http")),
        ({"AWS_ENDPOINT_URL": "http://general", "AWS_ENDPOINT_URL_S3": "http://s3:1"}, ("s3:1", "http")),
    ],
)
def test_the_endpoint_is_handed_to_tiledb(variables: dict[str, str], expected: tuple[str, str]) -> None:
    with environment(variables):
        assert tiledb_config() == {
            "vfs.s3.endpoint_override": expected[0],
            "vfs.s3.scheme": expected[1],
            "vfs.s3.use_virtual_addressing": "false",
        }


def test_an_endpoint_can_be_ignored() -> None:
    with environment({"AWS_ENDPOINT_URL": "http://h", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}):
        assert tiledb_config() == {}


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "localhost", "s3://b", "http://", "http://h:port", "http://h:99999"]
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with (
        environment({"AWS_ENDPOINT_URL": endpoint}),
        pytest.raises(ValueError, match="expected the address of a service"),
    ):
        tiledb_config()


def test_region_and_authorities(tmp_path: Path) -> None:
    with environment({"AWS_DEFAULT_REGION": "eu-west-3"}):
        assert tiledb_config() == {"vfs.s3.region": "eu-west-3"}
    with environment({"AWS_DEFAULT_REGION": "eu-west-3", "AWS_REGION": "us-west-2", "AWS_CA_BUNDLE": "/x.pem"}):
        assert tiledb_config() == {"vfs.s3.region": "us-west-2", "vfs.s3.ca_file": "/x.pem"}
    with environment({"AWS_CA_BUNDLE": str(tmp_path)}):
        assert tiledb_config() == {"vfs.s3.ca_path": str(tmp_path)}


def test_keys_are_never_settings() -> None:
    with environment({"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": "t"}):
        assert tiledb_config() == {}


def test_proxies() -> None:
    proxy = {"HTTPS_PROXY": "http://me:p%2Fw@proxy:3128"}
    settings = {
        "vfs.s3.proxy_scheme": "http",
        "vfs.s3.proxy_host": "proxy",
        "vfs.s3.proxy_port": 3128,
        "vfs.s3.proxy_username": "me",
        "vfs.s3.proxy_password": "p/w",
    }
    with environment(proxy):
        assert tiledb_config() == settings
    with environment(proxy | {"AWS_ENDPOINT_URL": "http://h"}):  # a proxy of the other scheme
        assert not [key for key in tiledb_config() if "proxy" in key]
    with environment({"https_proxy": "proxy"}):
        assert tiledb_config() == {
            "vfs.s3.proxy_scheme": "http",
            "vfs.s3.proxy_host": "proxy",
            "vfs.s3.proxy_port": 80,
        }
    with environment(proxy | {"AWS_ENDPOINT_URL": "https://h.intern", "NO_PROXY": "other,.intern"}):
        assert not [key for key in tiledb_config() if "proxy" in key]
    with (
        environment({"HTTPS_PROXY": "socks5://me:hidden@proxy:1"}),
        pytest.raises(ValueError, match="HTTPS_PROXY is 'socks5://\\*\\*\\*@proxy:1'"),
    ):
        tiledb_config()


@pytest.mark.parametrize("scheme", ["local", "file", "memory"])
def test_files_and_folders(tmp_path: Path, scheme: str) -> None:
    root = {"local": str(tmp_path / "d"), "file": f"file://{tmp_path}/d", "memory": f"memory://{tmp_path.name}/d"}[
        scheme
    ]
    write(join(root, "b/c"), b"abc")
    write(join(root, "a"), b"")
    assert address.list_files(root) == {"a": 0, "b/c": 3}
    assert list(address.list_files(root)) == ["a", "b/c"]
    assert address.exists(root)
    assert address.exists(join(root, "b"))
    assert not address.exists(join(root, "z"))
    with address.open_binary(join(root, "b/c")) as file:
        file.seek(1)
        assert file.read() == b"bc"
    with pytest.raises(FileNotFoundError, match="z: no"):
        address.open_binary(join(root, "z"))
    with pytest.raises(IsADirectoryError):
        address.open_binary(join(root, "b"))
    with pytest.raises(FileNotFoundError):
        address.list_files(join(root, "z"))
    with pytest.raises(NotADirectoryError):
        address.list_files(join(root, "a"))
    with pytest.raises(NotADirectoryError):
        address.remove_tree(join(root, "a"))
    address.remove_tree(join(root, "b"))
    assert address.list_files(root) == {"a": 0}
    address.remove_tree(join(root, "z"))
    address.remove_tree(root)
    assert not address.exists(root)


def write(name: str, content: bytes) -> None:
    if is_remote(name):
        filesystem, key = address._filesystem(name)
        filesystem.pipe_file(key, content)
        return
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)


def test_a_scheme_whose_client_is_not_installed() -> None:
    pytest.importorskip("fsspec")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="gs://b/x: .*gcsfs"):
            address.exists("gs://b/x")


@pytest.mark.parametrize(
    ("message", "kind", "remedy"),
    [
        ("[HTTP Response Code: 404] [Exception: NoSuchBucket]", FileNotFoundError, "AWS_ENDPOINT_URL"),
        ("[HTTP Response Code: 403] [Exception: InvalidAccessKeyId]", PermissionError, "AWS_ACCESS_KEY_ID"),
        ("[HTTP Response Code: 403] [Exception: SignatureDoesNotMatch]", PermissionError, "AWS_SECRET_ACCESS_KEY"),
        ("An error occurred (ExpiredToken) when calling", PermissionError, "expired"),
        ("Unable to locate credentials", PermissionError, "AWS_PROFILE"),
        ("[HTTP Response Code: 403]", PermissionError, "what they allow"),
        ("[HTTP Response Code: 301]", ConnectionError, "AWS_REGION"),
        ("curlCode: 6, Could not resolve hostname", ConnectionError, "HTTPS_PROXY"),
        ("curlCode: 60, SSL peer certificate or SSH remote key was not OK", ConnectionError, "AWS_CA_BUNDLE"),
    ],
)
def test_errors_of_clients_become_clear(message: str, kind: type[OSError], remedy: str) -> None:
    clear = explain(RuntimeError(f"S3: {message} [Headers: 'x-amz-id-2' = 'y']"), "s3://k:s@b/x")
    assert type(clear) is kind or isinstance(clear, kind)
    assert str(clear).startswith("s3://***@b/x: ")
    assert remedy in str(clear)
    assert "x-amz-id-2" not in str(clear)


def test_other_errors_are_left_alone() -> None:
    assert explain(ValueError("no column 'x'"), "s3://b/x") is None
    assert explain(PermissionError("Access Denied"), "/data/x") is None
    clear = explain(RuntimeError("Access Denied"), "s3://b/x")
    assert clear is not None
    assert explain(clear, "s3://b/x") is None
    with pytest.raises(ValueError, match="^no column$"), address.clear_errors("s3://b/x"):
        raise ValueError("no column")
