"""From a URL and a store's options to obstore's clients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from millrace.core.errors import UsageError

__all__ = ["Client", "CloudAddress", "build_client", "parse_cloud_url"]

Client = S3Store | GCSStore | AzureStore

_OPTIONS: dict[str, dict[str, type]] = {
    "s3": {"endpoint": str, "region": str, "anonymous": bool, "path_style": bool},
    "gs": {"endpoint": str, "anonymous": bool},
    "az": {"endpoint": str, "account": str, "anonymous": bool, "emulator": bool},
}
_NAMES = {
    "s3": {"endpoint": "endpoint", "region": "region", "anonymous": "skip_signature"},
    "gs": {"endpoint": "base_url", "anonymous": "skip_signature"},
    "az": {
        "endpoint": "endpoint",
        "account": "account_name",
        "anonymous": "skip_signature",
        "emulator": "use_emulator",
    },
}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
# obstore allows 30 s for a whole request, body included: too short for 100 MB on a slow link. These bound a
# request that hangs; how long a call may take is the timeout layer's business.
_REQUEST_S = 900
_SILENCE_S = 120
_CONNECT_S = 10


@dataclass(frozen=True, slots=True)
class CloudAddress:
    """Where a cloud store is.

    Attributes:
        scheme: ``s3``, ``gs`` or ``az``.
        bucket: The bucket or container.
        prefix: Before every key, without ``/`` at its ends; may be empty.
    """

    scheme: str
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def parse_cloud_url(url: str, name: str) -> CloudAddress:
    """Read ``s3://bucket/prefix`` and the like. The prefix is taken letter by letter; ``%20`` is three letters.

    Raises:
        UsageError: It is not one, or it holds a user or parameters. The URL is not repeated then, since what it
            holds may be a secret.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise UsageError(f"store {name}: its URL must not hold a user or a password; give credentials separately")
    if "?" in rest or "#" in rest:
        raise UsageError(f"store {name}: its URL must not hold parameters (?, #); use the store's options")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"store {name}: {bucket!r} is not a bucket; write {scheme}://BUCKET/PREFIX")
    parts = prefix.strip("/").split("/") if prefix.strip("/") else []
    if any(part in {"", ".", ".."} for part in parts):
        raise UsageError(f"store {name}: the prefix {prefix!r} has an empty part, '.' or '..'; write it plainly")
    return CloudAddress(scheme, bucket, "/".join(parts))


def build_client(
    address: CloudAddress,
    *,
    name: str,
    options: Mapping[str, Any],
    credentials: Mapping[str, str],
    credential_provider: Any,
    retries: int,
) -> Client:
    """Make one obstore client.

    Args:
        address: Where.
        name: The store's name, for errors.
        options: ``endpoint``, ``region``, ``anonymous``, ``path_style`` and the like, as the world file has them.
        credentials: By obstore's names (``access_key_id`` ...). What is missing, obstore takes from the
            provider's own chain.
        credential_provider: obstore's callback that gives fresh credentials, or None.
        retries: How often obstore itself repeats a request; 0 where a repetition would hide a lost response.

    Raises:
        UsageError: an option or a credential is not known or has the wrong type.
    """
    config = _config(address.scheme, name, options)
    endpoint = str(options.get("endpoint", ""))
    settings: dict[str, Any] = {
        "config": {**config, **credentials},
        "client_options": {
            "allow_http": endpoint.startswith("http://") or bool(options.get("emulator")),
            "timeout": timedelta(seconds=_REQUEST_S),
            "read_timeout": timedelta(seconds=_SILENCE_S),
            "connect_timeout": timedelta(seconds=_CONNECT_S),
        },
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=60)},
        "prefix": address.prefix or None,
    }
    if credential_provider is not None:
        settings["credential_provider"] = credential_provider
    try:
        if address.scheme == "s3":
            return S3Store(address.bucket, **settings)
        if address.scheme == "gs":
            return GCSStore(address.bucket, **settings)
        return AzureStore(address.bucket, **settings)
    except (BaseError, ValueError):
        # The reason may repeat a credential.
        names = ", ".join(sorted({*config, *credentials})) or "none"
        raise UsageError(f"store {name}: {address.url} can't be opened with the settings {names}; check them") from None


def _config(scheme: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = _OPTIONS[scheme]
    config: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"store {name}: {option!r} is no option of {scheme}://; known are {', '.join(known)}")
        if not isinstance(value, known[option]):
            wanted = "true or false" if known[option] is bool else "a string"
            raise UsageError(f"store {name}: the option {option} must be {wanted}, not {type(value).__name__}")
        if option == "path_style":
            config["virtual_hosted_style_request"] = not value
        else:
            config[_NAMES[scheme][option]] = value
    if "@" in str(config.get("endpoint", config.get("base_url", ""))):
        raise UsageError(f"store {name}: its endpoint must not hold a user or a password; give credentials separately")
    return config
