"""A site's settings: one TOML file, read once, at the door.

Rules:
- Every field says its unit and why its default is what it is. `deploy/busgen-cds.example.toml` shows each of them.
- Nothing that would let a wrong site start has a default: the prevalence and who may send must be stated.
- Secrets are references (a file, an environment variable, a command), never values.
- `BUSGEN_CDS_<SECTION>__<FIELD>` in the environment overrides the file.
"""

from __future__ import annotations

import string
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from busgen_cds.birads import Category
from busgen_cds.errors import Misconfigured
from busgen_cds.triage import Order

FILE = "busgen-cds.toml"

AeTitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[^\\\x00-\x1f]+$")]


def _network(text: str) -> str:
    try:
        ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an address or network{_meant(text)}") from None
    return text


def _meant(text: str) -> str:
    try:
        network = ip_network(text, strict=False)
        ip_address(text.partition("/")[0])
    except ValueError:
        return ": write an IP address such as 10.1.2.3, or a network such as 10.1.0.0/16"
    return f": write {network}"


Network = Annotated[str, AfterValidator(_network)]
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: a free port from the operating system, for tests
ObjectKind = Literal["sr", "sc", "seg", "pr"]
RoleName = Literal["reader", "operator", "physicist", "auditor", "admin"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Site(_Section):
    name: str = Field(description="Shown on pages and in the audit record.")
    prevalence: float = Field(
        gt=0,
        lt=1,
        description="Share of cancers among the studies this site sends, 0 to 1. No default: a score means far less "
        "where cancer is rare, and only the site knows how rare.",
    )


class Peer(_Section):
    ae_title: AeTitle = Field(description="Calling AE title that may send.")
    addresses: tuple[Network, ...] = Field(
        default=(), description='Addresses or networks ("10.1.0.0/16") it must come from; none stated: from anywhere.'
    )
    certificate_sha256: str = Field(
        default="",
        pattern=r"^([0-9a-fA-F]{64})?$",
        description="SHA-256 of its client certificate (DER), in hexadecimal: the title is then believed by TLS alone.",
    )
    report_to: str = Field(
        default="",
        description="Name of the node that hears of storage commitment when the sender has hung up; none: nobody.",
    )


class Tls(_Section):
    port: Port = Field(default=2762, description="The port registered for DICOM over TLS.")
    certificate: Path = Field(description="PEM file with our certificate chain.")
    key: Path = Field(description="PEM file with its private key, readable by this service alone.")
    authority: Path = Field(description="PEM file with the authorities whose client certificates are accepted.")


class Listener(_Section):
    ae_title: AeTitle = Field(default="BUSGEN_CDS", description="Our AE title.")
    host: str = Field(default="0.0.0.0", description="Address to listen on.")
    port: Port = Field(default=11112, description="The port registered for DICOM.")
    allow: tuple[Peer, ...] = Field(description="Who may send. No default: an open door is a decision.")
    plain_from: tuple[Network, ...] = Field(
        default=("127.0.0.0/8", "::1/128"),
        description="Addresses or networks that may speak DICOM without TLS; this machine alone unless you say so.",
    )
    check_called_ae: bool = Field(default=True, description="Refuse senders that call us by another AE title.")
    processes: int = Field(
        default=2,
        ge=0,
        le=32,
        description="Receiving processes: one interpreter alone is slow. 0: none but this.",
    )
    associations: int = Field(default=64, ge=1, description="Associations at once, in all.")
    associations_per_peer: int = Field(default=16, ge=1, description="Associations at once from one AE title.")
    pdu_bytes: int = Field(default=262_144, ge=4096, description="Largest PDU we offer to receive.")
    instance_bytes: int = Field(default=4 << 30, ge=1 << 20, description="Largest data set accepted, in bytes.")
    idle_seconds: float = Field(default=60, gt=0, description="A silent association is closed after this.")
    free_bytes: int = Field(
        default=2 << 30, ge=0, description="Below this much free disk, senders are answered 0xA700 (out of resources)."
    )
    tls: Tls | None = Field(default=None, description="DICOM over TLS on a port of its own.")


class Storage(_Section):
    folder: Path = Field(default=Path("data"), description="Where received instances are kept, encrypted.")
    database: str = Field(
        default="sqlite", description='"sqlite" (a file in the folder), or a PostgreSQL address: postgresql+psycopg://…'
    )
    workflows: str = Field(
        default="sqlite", description='The workflow engine\'s own database: "sqlite", or a PostgreSQL address.'
    )
    key: str = Field(
        default="file:keys/site.key",
        pattern=r"^(file|env|command):.+",
        description="Where the site key is: file:PATH (mode 0600), env:NAME, or command:PROGRAM (asks a KMS or HSM).",
    )


class Reader(_Section):
    bundle: Path | None = Field(
        default=None,
        description="Folder of the bundle that reads until one of the shelf is promoted; unset: the one shipped.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description='"cuda" refuses to start without a GPU; "auto" uses one if it works.'
    )
    jobs: int = Field(default=1, ge=1, description="Studies read at the same time by one worker.")


class Models(_Section):
    night_key: Path = Field(
        default=Path("keys/night.key"), description="The night job's key: it signs bundles onto the shelf, no more."
    )
    promoter_key: Path = Field(
        default=Path("keys/promoter.key"),
        description="The promoter's key, behind a passphrase: it says which bundle is live.",
    )
    trusted: Path = Field(
        default=Path("keys/trusted"), description="Public keys (PEM) of other sites whose packages may be imported."
    )
    generator: Path | None = Field(
        default=None, description="Folder of the generator that the laboratory's page uses; unset: the one shipped."
    )


class Rules(_Section):
    """What a candidate must hold before it goes onto the shelf; see `docs/change-control.md`. A site may tighten it."""

    not_worse: float = Field(
        default=0.05, ge=0, le=0.05, description="AUC by which worse must be excluded on the site's test patients."
    )
    release_drop: float = Field(default=0.01, ge=0, le=0.01, description="AUC that may be lost on the release set.")
    calibration_error: float = Field(
        default=0.15, gt=0, le=0.15, description="Mean gap of stated and found rates on the site's test patients."
    )
    sensitivity: float = Field(default=0.90, ge=0.9, le=1, description="Floor at the rule-out score, 0 to 1.")
    group_drop: float = Field(default=0.05, ge=0, le=0.05, description="AUC that may be lost on any device.")
    outline_drop: float = Field(
        default=0.10, ge=0, le=0.10, description="Mean overlap with the known outlines that may be lost, of 1."
    )
    declined: float = Field(
        default=0.10, ge=0, le=0.10, description="Share of the site's test images that it may decline besides."
    )
    test_patients: int = Field(
        default=8, ge=8, description="Of the site's test set, with a cancer and without, each: fewer judge nothing."
    )
    doubtful: float = Field(
        default=0.75, ge=0.75, le=0.95, description="AUC of the live reader on the site: below it labels are in doubt."
    )
    teachers: int = Field(default=8, ge=8, description="Patients that teach, at least.")


class Adaptation(_Section):
    cron: str = Field(
        default="",
        description='When a night runs, as a cron line ("0 1 * * *") of this machine\'s clock; unset: when asked for.',
    )
    least_new: int = Field(default=64, ge=8, description="New cases that teach, for a night to be worth it.")
    least_new_asked: int = Field(
        default=16, ge=8, description="So many are enough while a drift alarm asks for adaptation (drift.asks)."
    )
    start: tuple[Path, ...] = Field(
        default=(), description="Checkpoints of the release's reader; every night begins from them. None: no adapting."
    )
    release: Path | None = Field(
        default=None, description="The release's generated images with labels; unset: those of the package."
    )
    data: Path | None = Field(
        default=None, description="The real data of the release, where a site has them: its test split judges too."
    )
    generator: Path | None = Field(default=None, description="A generator's folder; unset: none is adapted.")
    encoder: Path | None = Field(default=None, description="ImageNet weights (npz): the privacy audit's second look.")
    method: Literal["fine-tune", "head"] = Field(
        default="fine-tune", description="All weights for a few steps, or the last ones alone."
    )
    kept: float = Field(
        default=0.0, ge=0, le=1, description="Share of the weights before in the result: forgets less, and gains less."
    )
    replay: float = Field(
        default=0.0,
        ge=0,
        le=0.9,
        description="Share of every batch for generated images, the release's and the site's own; 0: they only judge. "
        "Where it was tried, half of every batch took the gain away.",
    )
    steps: int = Field(default=48, ge=1, description="Steps of the fine-tuning.")
    generated: int = Field(default=200, ge=0, description="Images that the adapted generator makes.")
    threads: int = Field(default=1, ge=1, description="Processor threads of a night; studies being read come first.")
    niceness: int = Field(default=15, ge=0, le=19, description="How far a night steps back from the processor.")
    rules: Rules = Rules()


class Drift(_Section):
    reference_studies: int = Field(
        default=200, ge=20, description="The first studies a bundle reads here: what later weeks are compared with."
    )
    least_studies: int = Field(default=30, ge=10, description="A week with fewer studies says nothing.")
    scores: float = Field(
        default=0.2, gt=0, description="Population stability index of the scores: 0.2 is commonly a significant change."
    )
    categories: float = Field(default=0.2, gt=0, description="The same, of the categories.")
    declines: float = Field(default=0.1, gt=0, lt=1, description="Change of the share of declined studies.")
    images: float = Field(
        default=0.02,
        gt=0,
        description="Squared maximum mean discrepancy of the images' embeddings, 1 at most. What chance gives "
        "in one week of a thousand raises no alarm, whatever the limit.",
    )
    asks: bool = Field(default=True, description="An alarm asks for adaptation, until a night has learnt after it.")


class Study(_Section):
    silence_seconds: float = Field(default=5, ge=0, description="A study is complete when this long nothing came.")
    query_node: str = Field(
        default="", description="A node that can be asked how many images the study has and whose it is (C-FIND)."
    )
    count_wait_seconds: float = Field(
        default=60, ge=0, description="How long a study waits for images that the query node counts and we lack."
    )


class Triage(_Section):
    """Who is looked at first, among the unread studies of the worklist."""

    order: Order = Field(
        default="suspicion",
        description='"suspicion": by category, then probability. "arrival": first come, first read; category 3 and '
        "nothing found come after the others in either.",
    )
    declined_above: Category = Field(
        default="3",
        description="Declined studies, and stuck ones without an answer, stand above this category: nobody has looked "
        'at them. "5" puts them first of all; below category 3 they never stand.',
    )


class NodeTls(_Section):
    authority: Path = Field(description="PEM file with the authority that the node's certificate must come from.")
    certificate: Path | None = Field(default=None, description="Our client certificate.")
    key: Path | None = Field(default=None, description="Its private key.")
    check_host: bool = Field(default=True, description="The certificate must name the host.")


class Node(_Section):
    name: str = Field(description="What pages and messages call it.")
    ae_title: str = Field(default="", max_length=16, description="Its AE title.")
    host: str = Field(default="", description="Its address.")
    port: Port = Field(default=104, description="Its DICOM port.")
    url: str = Field(
        default="", pattern=r"^(https?://.+)?$", description="Instead of DICOM: its DICOMweb root, for STOW-RS."
    )
    tls: NodeTls | None = Field(default=None, description="TLS towards it.")

    @model_validator(mode="after")
    def reachable(self) -> Node:
        if not self.url and not (self.ae_title and self.host):
            raise ValueError(f"node {self.name!r} needs ae_title and host, or a url")
        return self


class Destination(_Section):
    node: str = Field(description="Name of the node that gets the results.")
    kinds: tuple[ObjectKind, ...] = Field(
        default=("sr", "sc", "seg", "pr"), description="Which objects it gets: report, capture, segmentation, state."
    )
    commitment: bool = Field(default=False, description="Ask for storage commitment before calling it confirmed.")
    rejection_notes: bool = Field(
        default=False, description="Send IHE IOCM rejection notes for replaced objects; only if the PACS takes them."
    )
    deliver_declined: bool = Field(default=True, description='Send "NOT ANALYSED: reason" for declined studies.')


class Objects(_Section):
    nominal_geometry: bool = Field(
        default=True, description="Give segmentations an invented plane, without which OHIF does not load them."
    )


class Oidc(_Section):
    issuer: str = Field(
        pattern=r"^(https://|http://(127\.0\.0\.1|localhost)[:/]).+", description="As the provider calls itself."
    )
    client_id: str = Field(description="What the provider calls us.")
    client_secret: str = Field(
        default="",
        pattern=r"^((file|env|command):.+)?$",
        description="Where our secret is, as for storage.key; none for a public client, which PKCE protects.",
    )
    label: str = Field(default="Hospital log-in", description="What the log-in page calls it.")
    scopes: tuple[str, ...] = Field(default=("openid", "profile"), description="What is asked for; openid must be.")
    name_claim: str = Field(default="preferred_username", description="The claim with the name of the account.")
    role_claim: str = Field(
        default="groups", description="The claim with groups or roles; dots lead into objects: realm_access.roles."
    )
    roles: dict[str, tuple[RoleName, ...]] = Field(
        description="A value of that claim → roles here. No default: who comes in is a decision."
    )
    authority: Path | None = Field(
        default=None, description="PEM file with the authority of its certificate; unset: those of the system."
    )

    @field_validator("scopes")
    @classmethod
    def open_id(cls, scopes: tuple[str, ...]) -> tuple[str, ...]:
        if "openid" not in scopes:
            raise ValueError("the scope openid is missing: without it the provider does not say who it is")
        return scopes


class Web(_Section):
    host: str = Field(default="127.0.0.1", description="Address of the pages; others than loopback need TLS in front.")
    port: Port = Field(default=8080, description="Port of the pages.")
    secure: bool = Field(default=False, description="The pages are reached by https: cookies travel by nothing else.")
    proxies: tuple[str, ...] = Field(
        default=(),
        description="Addresses of the proxies that pass requests on; what only these say of who asks is believed. "
        "Without them everybody behind a proxy shares one limit of log-ins.",
    )
    viewer: str = Field(
        default="", description="Link to the site's viewer; {study_uid} and {series_uid} (the report's) are filled in."
    )
    address: str = Field(
        default="",
        pattern=r"^(https?://[^/]+)?$",
        description="Where browsers reach the pages; the log-in provider sends them back there.",
    )
    oidc: Oidc | None = Field(default=None, description="Log-in by the hospital's provider, beside local accounts.")

    @field_validator("viewer")
    @classmethod
    def leads_to_a_study(cls, viewer: str) -> str:
        named = {name for _, name, _, _ in string.Formatter().parse(viewer) if name is not None}
        if viewer and ("study_uid" not in named or not named <= {"study_uid", "series_uid"}):
            raise ValueError("the link must hold {study_uid}, may hold {series_uid}, and no other name in braces")
        return viewer

    @model_validator(mode="after")
    def reached(self) -> Web:
        if self.oidc and not self.address:
            raise ValueError("web.oidc needs web.address: the provider must know where to send browsers back to")
        return self


class Retention(_Section):
    """How long each kind is kept, in days after the last thing that happened to it; 0: until a person says."""

    assessed_days: int = Field(default=0, ge=0, description="Studies that were assessed. 0: for ever.")
    declined_days: int = Field(default=0, ge=0, description="Studies that were declined. 0: for ever.")
    not_for_us_days: int = Field(default=0, ge=0, description="Studies that are no breast ultrasound. 0: for ever.")
    unread_days: int = Field(default=0, ge=0, description="Studies without any result, and not stuck. 0: for ever.")
    quarantine_days: int = Field(default=0, ge=0, description="Damaged objects that were set aside. 0: for ever.")


class Syslog(_Section):
    host: str = Field(description="The audit repository's address.")
    port: Port = Field(default=6514, description="The port registered for syslog over TLS.")
    authority: Path = Field(description="PEM file with the authority that its certificate must come from.")
    certificate: Path | None = Field(default=None, description="Our client certificate.")
    key: Path | None = Field(default=None, description="Its private key.")
    check_host: bool = Field(default=True, description="The certificate must name the host.")
    identifiers: bool = Field(
        default=False,
        description="Say patient id and Study Instance UID, as DICOM's audit messages can; else only our references.",
    )


class Record(_Section):
    key: Path = Field(default=Path("keys/record.key"), description="The key that signs checkpoints; made when missing.")
    checkpoints: Path | None = Field(
        default=None,
        description="Folder for signed checkpoints of the record, where this machine cannot rewrite them: without "
        "them a cut tail of the record does not show.",
    )
    checkpoint_hours: float = Field(default=24, gt=0, description="A checkpoint is written this often.")
    syslog: Syslog | None = Field(default=None, description="DICOM audit messages (PS3.15 A.5) over TLS (RFC 5425).")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="BUSGEN_CDS_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    site: Site
    listener: Listener
    storage: Storage = Storage()
    reader: Reader = Reader()
    models: Models = Models()
    adaptation: Adaptation = Adaptation()
    drift: Drift = Drift()
    study: Study = Study()
    triage: Triage = Triage()
    objects: Objects = Objects()
    nodes: tuple[Node, ...] = Field(default=(), description="Other systems, by name.")
    destinations: tuple[Destination, ...] = Field(default=(), description="Where results go.")
    web: Web = Web()
    retention: Retention = Retention()
    record: Record = Record()
    home: Path = Field(default=Path(), description="The site's folder; relative paths start here. Set by reading.")

    @field_validator("nodes")
    @classmethod
    def named_once(cls, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        names = [node.name for node in nodes]
        if len(set(names)) < len(names):
            raise ValueError(f"two nodes have one name: {sorted(n for n in names if names.count(n) > 1)[0]}")
        return nodes

    @model_validator(mode="after")
    def nodes_exist(self) -> Settings:
        known = {node.name for node in self.nodes}
        wanted = {d.node for d in self.destinations} | ({self.study.query_node} - {""})
        if missing := wanted - known:
            raise ValueError(
                f"no [[nodes]] entry is named {sorted(missing)[0]!r}; there are: {sorted(known) or 'none'}"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment overrides the file

    def path(self, path: Path) -> Path:
        return path if path.is_absolute() else self.home / path

    @property
    def checkpoints(self) -> Path | None:
        """The folder of the record's checkpoints, where the site has one."""
        return self.path(self.record.checkpoints) if self.record.checkpoints else None


def read(file: Path, **overrides: Any) -> Settings:
    """Settings from a TOML file; every mistake names its field and what would be right."""
    try:
        text = file.read_text()
    except OSError as missing:
        raise Misconfigured(
            f"{file} cannot be read ({missing.strerror}): make a site with `busgen-cds init DIR`."
        ) from missing
    return parse(text, file, **overrides)


def parse(text: str, file: Path, **overrides: Any) -> Settings:
    """The same of a text that is, or will be, in this file."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as broken:
        raise Misconfigured(f"{file} is not valid TOML: {broken}") from broken
    try:
        return Settings(**{**document, "home": file.parent.resolve(), **overrides})
    except ValidationError as wrong:
        raise Misconfigured(f"{file}:\n" + "\n".join(_complaints(wrong))) from wrong


def _complaints(wrong: ValidationError) -> list[str]:
    return [f"  {'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in wrong.errors()]
