"""Addresses of stores and sources: local paths and object storage, their settings, and what must not be said of them.

Object storage is reached twice: TileDB has its own S3 client, everything else goes through fsspec. Both take keys from the
standard chain by themselves (environment, ``~/.aws``, the machine's role); no key passes through this code. Of the
rest, TileDB reads none from the environment but the keys and the region, so `tiledb_config` hands it over.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit

REMOTE_SCHEMES = ("s3", "gs", "az", "http", "https", "memory")
"""What an address may start with, besides ``file://``, before its ``://``."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # two characters at least: C:/ is a drive
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s?#'\"]*@")
_QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?#'\"]*)[?#][^\s'\"]*")
_FIELD = re.compile(
    r"""(?ix) (?<![a-z0-9])
    ( (?:x-amz-(?:signature|credential|security-token) | x-goog-(?:signature|credential) | signature | signatureprovided
      | credential | awsaccesskeyid | aws_access_key_id | aws_secret_access_key | aws_session_token | googleaccessid
      | (?:access|secret|account)_?key | sig | (?:access_|auth_|session_|api_)?token | api_?key | password)
      ['"]? (?: \s*[=:]\s*['"]? | > ) )
    [^\s&'",;<>]{6,}"""
)
_BEARER = re.compile(r"""(?i)\b(authorization['"]?\s*[=:]\s*['"]?(?:bearer|basic)) [^\s'"]+""")
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN",
)  # fmt: skip
_URL_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
_SHORTEST_SECRET = 6
"""Shorter values are no keys, and taking them out would shred the text."""

_PORTS = {"http": 80, "https": 443}
_BLOCK_BYTES, _N_BLOCKS = 4 * 1024**2, 16


def _text(address: str | Path) -> str:
    """The address as it was written: as a Path, ``s3://b/x`` has lost a slash."""
    text = str(address)
    if isinstance(address, Path) and (match := _SCHEME.match(text)) and match[1].lower() in REMOTE_SCHEMES:
        return f"{match[1]}://{text[match.end() :]}"
    return text


def is_remote(address: str | Path) -> bool:
    """Whether an address is of object storage or the web, rather than of a file or folder of this machine.

    Raises
    ------
    ValueError
        If it starts with a scheme that is neither one of `REMOTE_SCHEMES` nor ``file``.
    """
    text = _text(address)
    match = _SCHEME.match(text)
    if match is None or "://" not in match[0]:
        return False
    scheme = match[1].lower()
    if scheme == "file":
        return False
    if scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{name}://" for name in (*REMOTE_SCHEMES, "file"))
        raise ValueError(f"{redact(text)}: no scheme {scheme}://; give a path, or an address with one of {known}")
    return True


def local_path(address: str | Path) -> Path:
    """The absolute path of an address on this machine, which may be written as ``file://``.

    Absolute because TileDB keeps the first current folder of a process, whatever folder is current later.

    Raises
    ------
    ValueError
        If the address is remote, or a ``file://`` of another machine.
    """
    if is_remote(address):
        raise ValueError(f"{redact(_text(address))}: a remote address where a path of this machine is needed")
    text = _text(address)
    if not text.lower().startswith("file:/"):
        return Path(text).absolute()
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{text}: names the machine {parts.netloc!r}; a file:// address has three slashes: file:///…")
    return Path(unquote(parts.path)).absolute()


def join(address: str | Path, *parts: str) -> str:
    """The address of something inside a folder: `parts` may have slashes of their own.

    Raises
    ------
    ValueError
        If a part leads out of the folder.
    """
    for part in parts:
        if ".." in part.split("/"):
            raise ValueError(f"{part!r} leads out of {redact(_text(address))}; name something inside")
    if not is_remote(address):
        return str(local_path(address).joinpath(*(part.lstrip("/") for part in parts)))
    scheme, mark, rest = _text(address).partition("://")
    return "/".join([f"{scheme}{mark}{rest.rstrip('/')}", *(part.strip("/") for part in parts)])


def redact(text: str) -> str:
    """Return `text` without what may be secret in it.

    Taken out: user, password and all from ``?`` or ``#`` on in URLs; values of fields such as ``Signature=`` or
    ``token:`` anywhere; keys and passwords that the environment holds, wherever they appear.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = _QUERY.sub(r"\1?***", _USERINFO.sub(r"\1***@", text))
    return _BEARER.sub(r"\1 ***", _FIELD.sub(r"\1***", text))


def _secrets() -> list[str]:
    """What the environment holds that nobody may see, longest first, also as it is written in URLs."""
    found = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    for name in _URL_VARIABLES:
        userinfo, at, _ = os.environ.get(name, "").rpartition("@")
        if at:
            found |= {unquote(userinfo.rpartition("://")[2].partition(":")[2])}
    found |= {quote(secret, safe="") for secret in found}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _endpoint() -> str | None:
    """The S3 service that the environment names in place of Amazon's."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def tiledb_config() -> dict[str, str | int]:
    """TileDB settings for object storage, from the environment; nothing where it says nothing.

    ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or ``AWS_DEFAULT_REGION``, ``AWS_CA_BUNDLE``, and
    ``HTTPS_PROXY`` or ``HTTP_PROXY`` (by the scheme of the endpoint, heeding ``NO_PROXY``) have the meaning they have
    for other S3 clients. Keys are not among them: TileDB finds those itself. May hold a proxy's password: not to
    be logged.

    Raises
    ------
    ValueError
        If an endpoint or a proxy is not the address of an HTTP service.
    """
    config: dict[str, str | int] = {}
    scheme, host = "https", "s3.amazonaws.com"
    endpoint = _endpoint()
    if endpoint is not None:
        scheme, host, port, _, _ = _service(endpoint, "AWS_ENDPOINT_URL")
        bracketed = f"[{host}]" if ":" in host else host
        # Not the host's own part of the path: buckets as host names need a wildcard in the DNS, which few services have
        config |= {
            "vfs.s3.endpoint_override": f"{bracketed}:{port}" + urlsplit(endpoint).path.rstrip("/"),
            "vfs.s3.scheme": scheme,
            "vfs.s3.use_virtual_addressing": "false",
        }
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        config["vfs.s3.region"] = region
    authorities = os.environ.get("AWS_CA_BUNDLE")
    if authorities:
        config["vfs.s3.ca_path" if os.path.isdir(authorities) else "vfs.s3.ca_file"] = authorities
    return config | _proxy(scheme, host)


def _proxy(scheme: str, host: str) -> dict[str, str | int]:
    from urllib.request import getproxies_environment, proxy_bypass  # pulls in all of http.client

    proxies = getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or proxy_bypass(host):
        return {}
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    proxy_scheme, proxy_host, port, user, password = _service(proxy, f"{scheme.upper()}_PROXY")
    config: dict[str, str | int] = {
        "vfs.s3.proxy_scheme": proxy_scheme,
        "vfs.s3.proxy_host": proxy_host,
        "vfs.s3.proxy_port": port,
    }
    if user:
        config |= {"vfs.s3.proxy_username": user, "vfs.s3.proxy_password": password}
    return config


def _service(url: str, variable: str) -> tuple[str, str, int, str, str]:
    """Scheme, host, port, user and password of the URL of an HTTP service."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in _PORTS or not parts.hostname or port == -1:
        raise ValueError(
            f"{variable} is {redact(url)!r}; expected the address of a service, such as https://s3.example.org:9000"
        )
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return parts.scheme, parts.hostname, port or _PORTS[parts.scheme], user, password


def _filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of a remote address, and the name there."""
    scheme = address.partition("://")[0].lower()
    if scheme == "s3" and "@" in urlsplit(address).netloc:  # botocore would say it aloud
        raise ValueError(
            f"{redact(address)}: an s3:// address has no user and password; keys come from AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    settings = hash(tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))))
    try:
        # fsspec would keep the first client of a process, whatever account the environment names by now
        filesystem = _client(scheme, _endpoint() if scheme == "s3" else None, settings, os.getpid())
    except ImportError as error:
        raise ValueError(f"{redact(address)}: {error}") from error
    return filesystem, str(filesystem._strip_protocol(address))


@lru_cache(maxsize=8)
def _client(scheme: str, endpoint: str | None, settings: int, process: int) -> Any:
    """One client for as long as the environment does not change, since making one takes a tenth of a second."""
    import fsspec  # type: ignore[import-untyped]

    options: dict[str, Any] = {"endpoint_url": endpoint, "skip_instance_cache": True} if scheme == "s3" else {}
    # A list kept from before would hide what another process, or TileDB, has written since
    return fsspec.filesystem(scheme, use_listings_cache=False, **options)


def open_binary(address: str | Path) -> IO[bytes]:
    """Open a file for reading: bytes, with seek; remote ones by blocks of 4 MiB, of which 16 stay in memory.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError, ConnectionError
        If there is no such file, or it cannot be reached.
    """
    if not is_remote(address):
        path = local_path(address)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        return path.open("rb")
    text = _text(address)
    with clear_errors(text):
        filesystem, name = _filesystem(text)
        if filesystem.info(name)["type"] != "file":  # s3fs opens a folder as an empty file
            raise IsADirectoryError(f"{redact(text)}: a folder; name a file")
        # s3fs reads ahead 50 MiB after each seek, and HDF5 seeks all the time
        opened: IO[bytes] = filesystem.open(
            name, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache", cache_options={"maxblocks": _N_BLOCKS}
        )
        return opened


def read_range(address: str | Path, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file, remote ones in one request; fewer where the file ends before.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, OSError
        If there is no such file, or it cannot be reached.
    """
    if not is_remote(address):
        with open(local_path(address), "rb", buffering=0) as handle:
            handle.seek(start)
            parts, wanted = [], stop - start
            while wanted > 0 and (
                part := handle.read(wanted)
            ):  # a read may be cut short by a signal, or by a network drive
                parts.append(part)
                wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    text = _text(address)
    with clear_errors(text):
        filesystem, name = _filesystem(text)
        data: bytes = filesystem.cat_file(name, start=start, end=stop)
    return data


def file_size(address: str | Path) -> int:
    """Bytes of a file; for places that cannot list their folders.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, OSError
        If there is no such file, or it does not say.
    """
    if not is_remote(address):
        return local_path(address).stat().st_size
    text = _text(address)
    with clear_errors(text):
        filesystem, name = _filesystem(text)
        size = filesystem.info(name)["size"]
    if size is None:
        raise OSError(f"{redact(text)}: the server does not say how long it is")
    return int(size)


def exists(address: str | Path) -> bool:
    """Whether there is a file or a folder (in object storage: anything below that name).

    Raises
    ------
    PermissionError, ConnectionError
        If that cannot be known.
    """
    if not is_remote(address):
        return local_path(address).exists()
    text = _text(address)
    try:
        with clear_errors(text):
            filesystem, name = _filesystem(text)
            filesystem.info(name)  # fsspec's own `exists` takes some refusals for absence
    except FileNotFoundError:
        return False
    return True


def list_files(address: str | Path) -> dict[str, int]:
    """All files below a folder: bytes of each by its name from there, with ``/``, in the order of the names.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, PermissionError, ConnectionError
        If there is no such folder, or it cannot be read.
    """
    if not is_remote(address):
        root = local_path(address)
        if not root.is_dir():
            kind = NotADirectoryError if root.exists() else FileNotFoundError
            raise kind(f"{root}: no folder there")
        paths = (path for path in root.rglob("*") if path.is_file())
        return dict(sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in paths))
    text = _text(address)
    with clear_errors(text):
        filesystem, name = _filesystem(text)
        found = filesystem.find(name, detail=True)
        if not found:
            raise FileNotFoundError(f"{redact(text)}: nothing there")
        if list(found) == [name]:
            raise NotADirectoryError(f"{redact(text)}: a file; name a folder")
        prefix = name.rstrip("/") + "/"
        return dict(sorted((key.removeprefix(prefix), int(entry["size"])) for key, entry in found.items()))


def upload(path: str | Path, address: str | Path) -> None:
    """Copy a file of this machine to object storage, under that address.

    Raises
    ------
    FileNotFoundError
        If there is no such file or bucket.
    PermissionError, ConnectionError
        If it cannot be written.
    ValueError
        If the address is not remote, or cannot be written to (http).
    """
    text = _text(address)
    if not is_remote(address):
        raise ValueError(f"{text}: a path of this machine; uploads go to object storage")
    with clear_errors(text):
        filesystem, name = _filesystem(text)
        try:
            filesystem.put_file(str(local_path(path)), name)
        except NotImplementedError as error:
            raise ValueError(
                f"{redact(text)}: cannot be written to; name an address such as s3://bucket/name"
            ) from error


def remove_tree(address: str | Path) -> None:
    """Remove a folder with all below it, if it is there. A bucket itself is refused.

    Raises
    ------
    ValueError
        If the address is a whole bucket.
    NotADirectoryError, PermissionError, ConnectionError
        If it is a file, or cannot be removed.
    """
    if not is_remote(address):
        root = local_path(address)
        if root.exists():
            shutil.rmtree(root)
        return
    text = _text(address)
    if not text.partition("://")[2].strip("/").partition("/")[2]:
        raise ValueError(f"{redact(text)}: a whole bucket is not removed; name a folder in it")
    try:
        names = list(list_files(text))
    except FileNotFoundError:
        return
    with clear_errors(text):
        filesystem, root_name = _filesystem(text)
        keys = [f"{root_name.rstrip('/')}/{name}" for name in names]
        plain = [key for key in keys if not re.search(r"[*?\[\]]", key)]
        if plain:
            filesystem.rm(plain)  # a thousand a request
        for key in set(keys) - set(plain):  # the many-at-once call would take these for patterns
            filesystem.rm_file(key)
        left = filesystem.find(root_name)
    if left:  # S3 refuses each of many by itself, and s3fs does not say so
        raise PermissionError(
            f"{redact(text)}: {len(left)} of {len(keys)} files could not be removed; check the rights"
        )


@contextmanager
def clear_errors(address: str | Path) -> Iterator[None]:
    """Turn errors of S3 clients, TileDB's included, into Python's own, with the remedy and without secrets.

    FileNotFoundError : no such bucket or object.  PermissionError : keys missing, unknown, wrong or not allowed.
    ConnectionError : the service does not answer, or is in another region. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        clear = explain(error, address)
        if clear is None:
            raise
        # Not `from error`: a traceback would show what was just taken out
        raise clear from None


_KINDS: tuple[tuple[str, type[OSError], str], ...] = (
    ("NoSuchBucket|bucket does not exist", FileNotFoundError, "no such bucket; check the name, and AWS_ENDPOINT_URL"),
    (
        "InvalidAccessKeyId|Access Key Id you provided|InvalidToken|ExpiredToken",
        PermissionError,
        "the service does not know the access key, or it has expired; check AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN or "
        "AWS_PROFILE",
    ),
    (
        "SignatureDoesNotMatch|request signature we calculated",
        PermissionError,
        "the secret key does not belong to the access key; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    ),
    (
        "Unable to locate credentials|NoCredentials|PartialCredentials|Partial credentials",
        PermissionError,
        "no access keys found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|Response Code: 301|IllegalLocationConstraint",
        ConnectionError,
        "the bucket is in another region; set AWS_REGION to its region",
    ),
    (
        r"AccessDenied|Access Denied|Forbidden|Response Code: 403",
        PermissionError,
        "access denied; check the keys (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and what they allow",
    ),
    (
        r"SSL certificate|SSL peer certificate|CERTIFICATE_VERIFY_FAILED",
        ConnectionError,
        "the service's certificate is not trusted; name the file of its authority in AWS_CA_BUNDLE",
    ),
    (
        r"curlCode|Could not connect|EndpointConnection|ConnectTimeout|ReadTimeout|Connection(?:Closed|Reset)|timed out",
        ConnectionError,
        "the service does not answer; check the network, AWS_ENDPOINT_URL, AWS_REGION and HTTPS_PROXY",
    ),
)


def explain(error: BaseException, address: str | Path) -> OSError | None:
    """The error of an S3 client as one of Python's own with the remedy; None if it is none that is known.

    TileDB raises RuntimeError for most, and DoesNotExistError also for an unknown access key: ask this first.
    """
    where = redact(_text(address))
    if not is_remote(address) or (isinstance(error, OSError) and str(error).startswith(where)):
        return None  # it is of this machine, or clear already
    text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    for pattern, kind, meaning in _KINDS:
        if re.search(pattern, text):
            return kind(f"{where}: {meaning} ({_first_line(error)})")
    if isinstance(error, FileNotFoundError) and where not in str(error):
        return FileNotFoundError(f"{where}: nothing there")
    return None


def _first_line(error: BaseException) -> str:
    """What the client said, without the headers of the reply."""
    text = re.sub(r" ?\[(?:Remote IP|Request ID|Headers): [^\]]*\]", "", str(error)).strip()
    return redact(text.splitlines()[0] if text else type(error).__name__)
