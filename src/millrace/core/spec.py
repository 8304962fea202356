"""The two files a user writes, as frozen models: the world (where things are) and a pipeline (what should happen).

Reading YAML with line numbers is ``core/specfile.py``; this module knows nothing of files.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from millrace.core.model import StoreSite
from millrace.core.units import parse_duration_s, parse_share, parse_size

__all__ = [
    "FORMATS",
    "AtField",
    "Cloud",
    "Dedup",
    "FormatName",
    "Pipeline",
    "Placement",
    "PythonTransform",
    "Quarantine",
    "Region",
    "Shards",
    "Source",
    "SqlTransform",
    "StoreSpec",
    "Tokenize",
    "Transform",
    "Validate",
    "World",
    "transform_kinds",
]

FormatName = Literal["text", "lines", "jsonl", "csv", "parquet", "arrow", "webdataset", "mds", "files"]
FORMATS: Final[tuple[str, ...]] = ("text", "lines", "jsonl", "csv", "parquet", "arrow", "webdataset", "mds", "files")

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FUNCTION: Final = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
_SECRET_KEYS: Final = re.compile(
    r"secret|password|passwd|token|credential|access_key|account_key|sas|hmac|signature", re.IGNORECASE
)
_KEEP_SECRETS_OUT: Final = "keep secrets in the environment or the cloud's credential chain"


class AtField(ValueError):
    """A value that is wrong together with others, and where in the model that was validated it stands.

    Attributes:
        path: Keys and indexes from that model down; the error points there.
    """

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text and so not a name; put it in quotes if it is meant to be one")
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{value[:80]!r} is not a name; use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        )
    return value


def _scalar_schema(example: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}], "examples": [example]})


Name = Annotated[str, BeforeValidator(_name)]
Size = Annotated[int, BeforeValidator(parse_size), _scalar_schema("64MB")]
DurationS = Annotated[float, BeforeValidator(parse_duration_s), _scalar_schema("90s"), Field(gt=0)]
Share = Annotated[float, BeforeValidator(parse_share), _scalar_schema("0.1%")]
Count = Annotated[int, Field(strict=True)]
"""A whole number, written as one: ``yes`` is not 1."""
Columns = Annotated[tuple[str, ...], Field(min_length=1)]


class Model(BaseModel):
    """Frozen, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


# --- the world --------------------------------------------------------------------------------------


class StoreSpec(Model):
    """A durable place for objects.

    Attributes:
        url: ``file://``, ``memory://``, ``s3://``, ``gs://`` or ``az://``. Relative to the world file.
        weight: Share of shards, relative to the other stores.
        options: What the adapter takes (``endpoint``, ``region`` ...). Never a secret: those come from the
            environment or the cloud's own credential chain.
    """

    url: str
    weight: Annotated[float, Field(gt=0, le=1000, strict=True)] = 1.0
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        return _checked_url(url)

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in options:
            if _SECRET_KEYS.search(key):
                raise ValueError(
                    f"{key!r} looks like a secret; keep secrets in the environment or the cloud's credential chain"
                )
        return options


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if not parts.scheme or "://" not in url:
        raise ValueError(f"{url!r} is not a URL; write file://./folder, s3://bucket/prefix and the like")
    if parts.username or parts.password or _SECRET_KEYS.search(parts.query):
        raise ValueError(f"the URL carries credentials; {_KEEP_SECRETS_OUT}")
    return url


def _one_spelling(url: str) -> str:
    """``file://./a``, ``file://a`` and ``file://./a/`` are one place."""
    scheme, _, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part not in {"", "."}]
    return f"{scheme.lower()}://{'/' if rest.startswith('/') else ''}{'/'.join(parts)}"


class Region(Model):
    """A site: one region of one cloud.

    Attributes:
        jurisdiction: Whose law holds there (``us``, ``eu`` ...); what ``placement.allow`` speaks of.
        stores: By name; names are unique in the whole world.
    """

    jurisdiction: Name
    stores: dict[Name, StoreSpec] = Field(default_factory=dict)


class Cloud(Model):
    """A failure domain with one provider."""

    regions: Annotated[dict[Name, Region], Field(min_length=1)]


class World(Model):
    """Where things are.

    Attributes:
        clouds: By name.
        here: The site this machine is in (``aws/us-east-1``); one replica of each shard stays in that
            cloud where policy allows.
        state: A directory for the embedded coordination store and scratch files.
    """

    clouds: Annotated[dict[Name, Cloud], Field(min_length=1)]
    here: str | None = None
    state: str = "./.millrace"

    @model_validator(mode="after")
    def _consistent(self) -> World:
        seen: dict[str, str] = {}
        urls: dict[str, str] = {}
        for cloud_name, cloud in self.clouds.items():
            for region_name, region in cloud.regions.items():
                for store, spec in region.stores.items():
                    place = f"{cloud_name}/{region_name}"
                    path = ("clouds", cloud_name, "regions", region_name, "stores", store)
                    if store in seen:
                        raise AtField(
                            f"store {store!r} is in {seen[store]} and in {place}; store names are unique", *path
                        )
                    seen[store] = place
                    other = urls.setdefault(_one_spelling(spec.url), store)
                    if other != store:
                        raise AtField(
                            f"stores {other!r} and {store!r} have the same url; that would be one copy, not two",
                            *path,
                            "url",
                        )
        if not seen:
            raise AtField("there is no store in this world; add one under a region's 'stores'", "clouds")
        sites = {f"{c}/{r}" for c, cloud in self.clouds.items() for r in cloud.regions}
        if self.here is not None and self.here not in sites:
            raise AtField(f"{self.here!r} is not a site of this world; there are {', '.join(sorted(sites))}", "here")
        return self

    def stores(self) -> dict[str, StoreSpec]:
        """Every store by name, in the file's order."""
        return {n: s for c in self.clouds.values() for r in c.regions.values() for n, s in r.stores.items()}

    def sites(self) -> tuple[StoreSite, ...]:
        """Every store as decisions see it, in the file's order."""
        return tuple(
            StoreSite(name, cloud_name, region_name, region.jurisdiction, spec.weight)
            for cloud_name, cloud in self.clouds.items()
            for region_name, region in cloud.regions.items()
            for name, spec in region.stores.items()
        )


# --- the pipeline -----------------------------------------------------------------------------------


class Source(Model):
    """Where records come from.

    Attributes:
        url: A directory, a prefix or one object. Relative to the pipeline file.
        include, exclude: Globs on the path relative to ``url``; ``**`` crosses folders. No include means all.
        format: What the bytes are. ``text`` is a record a file, ``lines`` a record a line, ``files`` opaque bytes.
        columns: For ``csv`` and ``jsonl``: the columns to read and their types (``string``, ``int64``,
            ``double``, ``bool``, ``json``, ``timestamp``, ``binary``). Others are then left out.
        compression: ``auto`` goes by the name's ending (``.gz``, ``.zst``).
        multiline: For ``csv``: whether quoted values may hold line ends. ``false`` lets large files be cut.
        options: As in a store.
    """

    url: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    format: FormatName
    columns: dict[str, Literal["string", "int64", "double", "bool", "json", "timestamp", "binary"]] | None = None
    compression: Literal["auto", "none", "gzip", "zstd"] = "auto"
    multiline: bool = True
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        return _checked_url(url)

    @model_validator(mode="after")
    def _fits_format(self) -> Source:
        if self.columns is not None and self.format not in {"csv", "jsonl"}:
            raise AtField(f"'columns' is for csv and jsonl; {self.format} carries its own types", "columns")
        return self


class SqlTransform(Model):
    """``sql: "SELECT ... FROM records WHERE ..."``: row by row, so no aggregates, ordering, limits or joins."""

    sql: Annotated[str, Field(min_length=1)]
    timeout: DurationS = 60.0


class PythonTransform(Model):
    """``python: "package.module:function"``: RecordBatch to RecordBatch, deterministic."""

    python: Annotated[str, Field(pattern=_FUNCTION)]
    timeout: DurationS = 60.0

    @field_validator("python", mode="before")
    @classmethod
    def _names_a_function(cls, value: object) -> object:
        if isinstance(value, str) and not re.search(_FUNCTION, value):
            raise ValueError(f"{value[:80]!r} does not name a function; write it like package.module:function")
        return value


class ValidateRules(Model):
    """Rules a record must keep; one that doesn't is quarantined, not dropped.

    Attributes:
        required: Columns that must not be null or an empty string.
        unique: Columns whose values, together, appear once in the whole run; the first in order stays.
        rules: SQL conditions that must be true.
    """

    required: tuple[str, ...] = ()
    unique: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> ValidateRules:
        if not (self.required or self.unique or self.rules):
            raise ValueError("nothing to validate; give 'required', 'unique' or 'rules'")
        return self


class Validate(Model):
    """``validate: {required: [...], unique: [...], rules: [...]}``."""

    validate_: Annotated[ValidateRules, Field(alias="validate")]


class TokenizeRules(Model):
    """How text becomes rows of tokens.

    Attributes:
        column: The text column.
        tokenizer: ``bytes``, or a path to a ``tokenizers`` JSON file, relative to the pipeline file.
        pack: Tokens in a row; records are laid end to end, each followed by the end token, and the last row
            of a chunk is padded.
        end, pad: Token ids. ``bytes`` has its own (256 and 257); for a file ``end`` is required unless the
            file names one of the usual end tokens, and ``pad`` is ``end`` unless given.
        into: Name of the column of tokens.
    """

    column: str
    tokenizer: str
    pack: Annotated[Count, Field(ge=1, le=1_048_576)]
    end: Annotated[Count, Field(ge=0)] | None = None
    pad: Annotated[Count, Field(ge=0)] | None = None
    into: str = "tokens"


class Tokenize(Model):
    """``tokenize: {column: text, tokenizer: bytes, pack: 2048}``."""

    tokenize: TokenizeRules
    timeout: DurationS = 300.0


class Dedup(Model):
    """``dedup: [column, ...]``: of the records equal in these columns, the first in order stays."""

    dedup: Columns


def _transform_kind(value: Any) -> str | None:
    if isinstance(value, Model):
        keys = {field.alias or name for name, field in type(value).model_fields.items()}
    else:
        keys = set(value) if isinstance(value, dict) else set()
    return next((kind for kind in transform_kinds() if kind in keys), None)


def transform_kinds() -> tuple[str, ...]:
    """The words that say which transform an entry of ``transforms`` is."""
    return ("sql", "python", "validate", "tokenize", "dedup")


Transform = Annotated[
    Annotated[SqlTransform, Tag("sql")]
    | Annotated[PythonTransform, Tag("python")]
    | Annotated[Validate, Tag("validate")]
    | Annotated[Tokenize, Tag("tokenize")]
    | Annotated[Dedup, Tag("dedup")],
    Discriminator(
        _transform_kind,
        custom_error_type="transform",
        custom_error_message="a transform is one of sql, python, validate, tokenize or dedup",
    ),
]


class Shards(Model):
    """How shards are packed.

    Attributes:
        size: A shard is closed at the first block that reaches it.
        block_rows: Rows in a block at most; the block is the unit that is read and verified alone.
        block_size: A block is closed at the row that brings it to this, before compression. Where shards are smaller
            than the default, it is theirs.
        compression: Of the Arrow buffers.
    """

    size: Annotated[Size, Field(ge=1024, le=2**31)] = 64_000_000
    block_rows: Annotated[Count, Field(ge=1, le=1_048_576)] = 1024
    block_size: Annotated[Size, Field(ge=1024)] = 8_000_000
    compression: Literal["none", "lz4", "zstd"] = "none"

    @model_validator(mode="after")
    def _blocks_fit(self) -> Shards:
        if self.block_size > self.size and "block_size" in self.model_fields_set:
            raise AtField(
                f"blocks of {self.block_size:,} bytes are larger than shards of {self.size:,}; "
                "make block_size at most size",
                "block_size",
            )
        object.__setattr__(self, "block_size", min(self.block_size, self.size))  # frozen, and still being made
        return self


class Placement(Model):
    """Where replicas go.

    Attributes:
        replicas: How many copies of each shard, each in another store.
        min_clouds: In at least how many clouds.
        allow: Jurisdictions data may lie in; None means any.
        deny: Jurisdictions it may not lie in, whatever ``allow`` says.
    """

    replicas: Annotated[Count, Field(ge=1, le=16)] = 3
    min_clouds: Annotated[Count, Field(ge=1, le=16)] = 2
    allow: tuple[Name, ...] | None = None
    deny: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Placement:
        if self.min_clouds > self.replicas:
            given = "min_clouds" if "min_clouds" in self.model_fields_set else "replicas"
            raise AtField(
                f"{self.min_clouds} clouds can't be reached with {self.replicas} "
                f"replica{'' if self.replicas == 1 else 's'}; set replicas to at least min_clouds, or min_clouds lower",
                given,
            )
        return self


class Quarantine(Model):
    """How much bad input a run bears.

    Attributes:
        limit: Share of records that may be set aside.
        chunks: Whole chunks that may be set aside (unreadable files, transforms that die on them).
    """

    limit: Share = 0.0
    chunks: Annotated[Count, Field(ge=0)] = 0


class Pipeline(Model):
    """A declared job.

    Attributes:
        dataset: The name its versions get.
        chunk: Bytes of input in one unit of work; part of what makes the digest.
        max_record: A longer record is quarantined instead of filling the memory.
        attempts: How often a chunk is tried before it is quarantined.
    """

    dataset: Name
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    transforms: tuple[Transform, ...] = ()
    shards: Shards = Shards()
    placement: Placement = Placement()
    quarantine: Quarantine = Quarantine()
    chunk: Annotated[Size, Field(ge=4096, le=2**33)] = 100_000_000
    max_record: Annotated[Size, Field(ge=1024, le=2**31 - 2**20)] = 64_000_000
    attempts: Annotated[Count, Field(ge=1, le=100)] = 3

    @model_validator(mode="after")
    def _opaque_files(self) -> Pipeline:
        opaque = [i for i, s in enumerate(self.sources) if s.format == "files"]
        if opaque and len(opaque) != len(self.sources):
            raise AtField(
                "'files' sources are opaque bytes and can't be mixed with sources of records in one dataset",
                "sources",
                opaque[0],
                "format",
            )
        if opaque and self.transforms:
            raise AtField("'files' sources are opaque bytes; transforms need records", "transforms")
        for i, transform in enumerate(self.transforms[:-1]):
            if isinstance(transform, Tokenize):
                raise AtField("tokenize must be the last transform", "transforms", i, "tokenize")
        return self
