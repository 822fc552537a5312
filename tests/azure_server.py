"""The part of Azure that `edgetune submit` talks to: login, workspace, storage and jobs, behind one proxy.

The SDK is used as it is: its requests for Azure's hosts go through this proxy (``HTTPS_PROXY``), which answers them
itself, with certificates of an authority of its own (``REQUESTS_CA_BUNDLE``).
"""

import datetime as dt
import json
import re
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SECRET = "hf_the-token-of-the-vault"  # noqa: S105 - what the tests look for
WORKSPACE = "/subscriptions/s-1/resourceGroups/rg/providers/Microsoft.MachineLearningServices/workspaces/ws"
_TENANT = "11111111-1111-1111-1111-111111111111"
_LATER = dt.timedelta(days=1)
_MANAGER, _DATA, _BLOBS = "management.azure.com", "westeurope.api.azureml.ms", "store.blob.core.windows.net"


@dataclass
class Request:
    """A request as the service saw it."""

    method: str
    host: str
    path: str
    body: bytes


@dataclass
class Azure:
    """What the service has, and what was asked of it."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    """By container and name."""
    job: dict[str, Any] = field(default_factory=dict)
    """The body of the job that was sent."""
    statuses: list[str] = field(default_factory=lambda: ["Running", "Completed"])
    """Of the job, one for each time it is looked up; the last one stays."""
    log: str = "train step 1\n"
    computes: set[str] = field(default_factory=lambda: {"cpu-cluster"})
    logged_in: bool = True
    requests: list[Request] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def code(self) -> dict[str, bytes]:
        """Return the files that were sent as the job's code."""
        return {name.split("/", 2)[2]: data for name, data in self.blobs.items() if name.startswith("code/")}

    def finished(self, folder: Path) -> None:
        """Have the files of a folder as the output of the job."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self.blobs[f"data/azureml/{self.name}/gen_model/{name}"] = path.read_bytes()

    @property
    def name(self) -> str:
        """The name of the job."""
        return str(self.job.get("name", "job-1"))

    def status(self) -> str:
        """Return the job's status now."""
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


class AzureServer(ThreadingHTTPServer):
    """The proxy. ``azure`` is what answers."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.azure, self.folder = Azure(), folder
        self.certificates: dict[str, ssl.SSLContext] = {}
        self.guard = threading.Lock()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.authority = _certificate("the tests", self.key, None, self.key)
        (folder / "authority.pem").write_bytes(self.authority.public_bytes(serialization.Encoding.PEM))

    @property
    def environment(self) -> dict[str, str]:
        """What leads the SDK here, and logs it in."""
        return {
            "HTTPS_PROXY": f"http://127.0.0.1:{self.server_port}",
            "NO_PROXY": "",
            "no_proxy": "",
            "REQUESTS_CA_BUNDLE": str(self.folder / "authority.pem"),
            "AZURE_TENANT_ID": _TENANT,
            "AZURE_CLIENT_ID": "22222222-2222-2222-2222-222222222222",
            "AZURE_CLIENT_SECRET": "of-the-tests",
            "AZUREML_ARM_SUBSCRIPTION": "s-1",
            "AZUREML_ARM_RESOURCEGROUP": "rg",
            "AZUREML_ARM_WORKSPACE_NAME": "ws",
            "AZURE_CONFIG_DIR": str(self.folder / "no-az"),
        }

    def context(self, host: str) -> ssl.SSLContext:
        """Return what speaks TLS as a host."""
        with self.guard:
            if host not in self.certificates:
                key = ec.generate_private_key(ec.SECP256R1())
                chain = self.folder / f"{host}.pem"
                pem = serialization.Encoding.PEM
                plain = serialization.NoEncryption()
                secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
                chain.write_bytes(secret + _certificate(host, key, self.authority, self.key).public_bytes(pem))
                self.certificates[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self.certificates[host].load_cert_chain(chain)
            return self.certificates[host]


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Certificate | None, signer: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _LATER)
        .not_valid_after(now + _LATER)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(identifier, critical=False)
    else:
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(signer, hashes.SHA256())


class _Proxy(BaseHTTPRequestHandler):
    server: AzureServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test output clean."""

    def do_CONNECT(self) -> None:
        host = self.path.partition(":")[0]
        self.send_response(200, "Connection established")
        self.end_headers()
        try:
            with self.server.context(host).wrap_socket(self.connection, server_side=True) as connection:
                service = type("Service", (_Service,), {"host": host})
                service(connection, self.client_address, self.server)
        except (OSError, ssl.SSLError):
            pass
        self.close_connection = True


class _Service(BaseHTTPRequestHandler):
    """Answers as one of Azure's hosts."""

    server: AzureServer
    protocol_version = "HTTP/1.1"
    host = ""

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test output clean."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def _answer(self) -> None:
        azure = self.server.azure
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.at, self.query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        azure.requests.append(Request(self.command, self.host, self.path, self.body))
        if self.host == "login.microsoftonline.com":
            self._login(azure)
        elif self.host == _MANAGER:
            self._manage(azure)
        elif self.host == _DATA:
            self._run_history(azure)
        elif self.host == _BLOBS:
            self._store(azure)
        elif self.host == "my-vault.vault.azure.net":
            self._open_vault()
        else:
            self._unknown(azure)

    def _unknown(self, azure: Azure) -> None:
        azure.unknown.append(f"{self.command} https://{self.host}{self.path}")
        self._json({"error": {"code": "NotFound", "message": f"nothing at {self.host}{self.at}"}}, 404)

    def _login(self, azure: Azure) -> None:
        base = f"https://{self.host}/{self.at.split('/')[1]}"
        if self.at.endswith("openid-configuration"):
            names = ("token_endpoint", "authorization_endpoint", "issuer")
            self._json({name: f"{base}/oauth2/v2.0/{name.partition('_')[0]}" for name in names})
        elif "discovery/instance" in self.at:
            self._json({"tenant_discovery_endpoint": f"{base}/v2.0/.well-known/openid-configuration", "metadata": []})
        elif not azure.logged_in:
            self._json({"error": "invalid_client", "error_description": "AADSTS7000215: Invalid client secret"}, 401)
        else:
            self._json({"access_token": "t", "token_type": "Bearer", "expires_in": 3600})

    def _manage(self, azure: Azure) -> None:
        assert self.headers["Authorization"] == "Bearer t"
        at = self.at.removeprefix(WORKSPACE)
        if at == self.at or not at:
            discovery = f"https://{_DATA}/discovery"
            self._json(
                {
                    "id": WORKSPACE,
                    "name": "ws",
                    "location": "westeurope",
                    "properties": {"discoveryUrl": discovery, "workspaceId": "w-1", "storageAccount": "/store"},
                }
            )
        elif at.endswith("/listSecrets"):
            self._json({"secretsType": "Sas", "sasToken": "sig=x"})
        elif at.startswith("/datastores"):
            self._json({"value": [_DATASTORE]} if at == "/datastores" else _DATASTORE)
        elif at.startswith("/codes/"):
            self._code(at)
        elif found := re.fullmatch(r"/environments/([^/]+)/versions/([^/]+)", at):
            self._json({"id": WORKSPACE + at, "name": found[2]} | json.loads(self.body))
        elif at.startswith("/jobs/"):
            self._job(azure, at)
        else:
            self._unknown(azure)

    def _code(self, at: str) -> None:
        if at.endswith("/startPendingUpload"):
            reference = {
                "blobUri": f"https://{_BLOBS}/code",
                "storageAccountArmId": "/store",
                "credential": {"credentialType": "SAS", "sasUri": f"https://{_BLOBS}/code?sig=x"},
            }
            self._json({"blobReferenceForConsumption": reference, "pendingUploadType": "TemporaryBlobReference"})
        elif self.command == "PUT":
            self._json({"id": WORKSPACE + at, "name": "1"} | json.loads(self.body))
        else:
            self._json({"value": []})

    def _job(self, azure: Azure, at: str) -> None:
        name = at.split("/")[2]
        if self.command == "PUT":
            azure.job = {"name": name} | json.loads(self.body)
            compute = azure.job["properties"]["computeId"].rpartition("/")[2]
            if compute not in azure.computes:
                self._json({"error": {"code": "UserError", "message": f"Unknown compute target '{compute}'."}}, 400)
                return
        status = "NotStarted" if self.command == "PUT" else azure.statuses[0]
        studio = {"jobServiceType": "Studio", "endpoint": f"https://ml.azure.com/runs/{name}"}
        told = {"status": status, "services": {"Studio": studio}, "properties": {}, "tags": {}}
        job = azure.job or {"properties": {"jobType": "Command", "command": "x", "environmentId": "e", "outputs": {}}}
        self._json({"id": WORKSPACE + at, "name": name, "properties": job["properties"] | told})

    def _run_history(self, azure: Azure) -> None:
        if self.at == "/discovery":
            self._json({"history": f"https://{_DATA}", "api": f"https://{_DATA}"})
        elif self.at.endswith("/details"):
            status = azure.status()
            error = {"error": {"code": "UserError", "message": "the command ended with 3"}}
            files = {"user_logs/std_log.txt": f"https://{_BLOBS}/logs/std_log.txt?sig=x"}
            azure.blobs["logs/std_log.txt"] = azure.log.encode()
            told = {"runId": azure.name, "status": status, "logFiles": files}
            self._json(told | ({"error": error} if status == "Failed" else {}))
        elif self.at.endswith("/rundata"):
            self._json({"runMetadata": {"runId": azure.name, "outputs": {}}})
        else:
            self._unknown(azure)

    def _store(self, azure: Azure) -> None:
        name = self.at.lstrip("/")
        if self.query.get("comp") == ["list"]:
            self._list(azure, name)
        elif self.command == "PUT":
            if self.query.get("comp") is None:
                azure.blobs[name] = self.body
            self._send(201 if "comp" not in self.query else 200, b"", {})
        elif name in azure.blobs:
            self._blob(azure.blobs[name])
        else:
            self._send(404, b"", {"x-ms-error-code": "BlobNotFound"})

    def _blob(self, content: bytes) -> None:
        kept = {"ETag": '"1"', "Last-Modified": _DATE, "x-ms-blob-type": "BlockBlob", "Accept-Ranges": "bytes"}
        wanted = self.headers.get("x-ms-range") or self.headers.get("Range")
        if not wanted or not content:
            status = 416 if wanted else 200
            self._send(status, content, kept | ({"x-ms-error-code": "InvalidRange"} if wanted else {}))
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._send(206, part, kept | {"Content-Range": span})

    def _list(self, azure: Azure, container: str) -> None:
        prefix = self.query.get("prefix", [""])[0]
        names = [name.removeprefix(f"{container}/") for name in azure.blobs if name.startswith(f"{container}/{prefix}")]
        found = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Content-Length>{len(azure.blobs[f'{container}/{name}'])}"
            f"</Content-Length><Last-Modified>{_DATE}</Last-Modified><BlobType>BlockBlob</BlobType></Properties></Blob>"
            for name in sorted(names)
        )
        text = f'<?xml version="1.0"?><EnumerationResults><Blobs>{found}</Blobs><NextMarker/></EnumerationResults>'
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _open_vault(self) -> None:
        if not self.headers["Authorization"]:
            ask = f'Bearer authorization="https://login.microsoftonline.com/{_TENANT}", resource="https://vault.azure.net"'
            self._send(401, b"", {"WWW-Authenticate": ask})
        elif self.at.rstrip("/") == "/secrets/hf-token":
            self._json({"value": SECRET, "id": f"https://{self.host}/secrets/hf-token/1", "attributes": {}})
        else:
            self._json({"error": {"code": "Forbidden", "message": "Caller is not authorized"}}, 403)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_DATE = "Sun, 01 Nov 2026 00:00:00 GMT"
_DATASTORE = {
    "id": f"{WORKSPACE}/datastores/workspaceblobstore",
    "name": "workspaceblobstore",
    "properties": {
        "datastoreType": "AzureBlob",
        "accountName": "store",
        "containerName": "data",
        "isDefault": True,
        "credentials": {"credentialsType": "Sas"},
    },
}
