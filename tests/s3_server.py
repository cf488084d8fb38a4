"""An object store for tests: moto's S3 behind a door that checks signatures, on a loopback port.

moto alone lets every request in. The door refuses unsigned requests, unknown keys and wrong signatures as S3 does, with
its error codes, and lets anyone read `PUBLIC_BUCKET`; so tests can tell a signed access from an anonymous one.

    from tests.s3_server import S3Server, environment, s3_server

    @pytest.fixture(scope="session")
    def running() -> Iterator[S3Server]:
        with s3_server() as server:
            yield server

    @pytest.fixture
    def s3(running: S3Server) -> Iterator[S3Server]:
        with environment(running.environment()):
            yield running
"""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import pytest

ACCESS_KEY, SECRET_KEY = "AKIDLOOPBACK00000001", "not+a/secret0but1as2long3as4one5would6be7"  # as long as real ones
BUCKET, PUBLIC_BUCKET = "bucket", "public"
REGION = "us-east-1"
_STARTS_WITHIN_S = 30.0
_NAMES = ("AWS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True)
class S3Server:
    """A running server; `endpoint` is ``http://127.0.0.1:PORT``."""

    endpoint: str
    bucket: str = BUCKET
    public_bucket: str = PUBLIC_BUCKET

    def environment(self) -> dict[str, str]:
        """Variables with which TileDB (by `tiledb_config`), s3fs and botocore find the server and may write."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            # With no key at all, clients would ask a cloud machine's metadata service, which is not there
            "AWS_EC2_METADATA_DISABLED": "true",
            # Nor may the keys of whoever runs the tests be used
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A botocore client with the right keys, for looking at the bucket past the code under test."""
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these variables, without any other of AWS or of proxies, and put all back at the end."""
    before = dict(os.environ)
    try:
        for name in [n for n in os.environ if n.startswith(_NAMES)]:
            del os.environ[name]
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server with `BUCKET` and `PUBLIC_BUCKET`, and stop it at the end.

    The environment is left alone: a session's other tests share it. Skips the test if moto is not installed.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("moto is not installed; install it with: pip install --editable '.[dev]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = S3Server(f"http://127.0.0.1:{port}")
    command = [sys.executable, str(Path(__file__).resolve()), str(port)]
    log = tempfile.TemporaryFile()  # not a pipe: it gets a line for each request, and a full pipe would stop the server
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    try:
        _wait(process, server, log)
        with environment({}):
            client = server.client()
            for bucket in (BUCKET, PUBLIC_BUCKET):
                client.create_bucket(Bucket=bucket)
            client.close()
        yield server
    finally:
        process.terminate()
        process.wait(10)
        log.close()


def _wait(process: "subprocess.Popen[bytes]", server: S3Server, log: IO[bytes]) -> None:
    """Return when the server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end_s = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"the S3 server ended at once: {log.read().decode()}")
        try:
            opener.open(server.endpoint, timeout=5).close()
            return
        except urllib.error.HTTPError as error:  # refused, so there is somebody
            error.close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not answer within {_STARTS_WITHIN_S:.0f} s")


Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def _door(inner: Application) -> Application:
    """Let in who signed with the one key, and anyone who reads the public bucket."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        refusal = _refusal(environ)
        if refusal is None:
            return inner(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code, message, more = refusal
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'
        start_response(
            "403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body.encode())))]
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body.encode()]

    return application


def _refusal(environ: dict[str, Any]) -> tuple[str, str, str] | None:
    authorization = environ.get("HTTP_AUTHORIZATION", "")
    if not authorization:
        is_public = environ["PATH_INFO"].split("/")[1] == PUBLIC_BUCKET
        if is_public and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return None
        return "AccessDenied", "Access Denied", ""
    fields = dict(part.strip().split("=", 1) for part in authorization.partition(" ")[2].split(","))
    key, _, region, service, _ = fields["Credential"].split("/")
    if key != ACCESS_KEY:
        message = "The AWS Access Key Id you provided does not exist in our records."
        return "InvalidAccessKeyId", message, f"<AWSAccessKeyId>{key}</AWSAccessKeyId>"
    if fields["Signature"] != _signature(environ, fields["SignedHeaders"].split(";"), region, service):
        message = (
            "The request signature we calculated does not match the signature you provided. Check your key and signing "
            "method."
        )
        more = f"<AWSAccessKeyId>{key}</AWSAccessKeyId><SignatureProvided>{fields['Signature']}</SignatureProvided>"
        return "SignatureDoesNotMatch", message, more
    return None


def _signature(environ: dict[str, Any], signed: list[str], region: str, service: str) -> str:
    """The signature that the holder of the secret would have sent for this request (AWS Signature Version 4)."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    plain = {"content-type": "CONTENT_TYPE", "content-length": "CONTENT_LENGTH"}
    headers = {name: environ.get(plain.get(name, f"HTTP_{name.upper().replace('-', '_')}"), "") for name in signed}
    raw_path, _, query = environ["REQUEST_URI"].partition("?")
    # botocore wants the query decoded in `params`, to encode it as signing does
    params = {unquote(n): unquote(v) for n, _, v in (part.partition("=") for part in query.split("&") if part)}
    url = f"http://{environ['HTTP_HOST']}{raw_path}"
    request = AWSRequest(method=environ["REQUEST_METHOD"], url=url, params=params, headers=headers)
    request.context["timestamp"] = headers["x-amz-date"]
    auth = S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), service, region)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    return str(auth.signature(text, request))


def main(port: int) -> None:
    """Serve until stopped."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    moto = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, _door(moto), threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[1]))
