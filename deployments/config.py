"""The application's arguments, every key documented once, here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from adapters.geometry import hub_id
from adapters.store import Store, check_url, local_folder, open_store
from deployments.base import BaseName
from deployments.room import LEAST_ROWS
from deployments.source import Source

Auto = Literal["auto"]
Name = Annotated[str, Field(min_length=1)]
GIB = 2**30


class ConfigError(Exception):
    """The configuration is wrong; the message is one sentence that names the key."""


class Args(BaseModel):
    """What `deployments.app:build` takes, from `args:` in YAML or `key=value` arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_model: str = Field(description="A local folder, or a hub id `org/name@revision`.")
    base_aliases: tuple[Name, ...] = Field(
        (),
        description="Hub ids that are the same base: adapters trained on them are served as well.",
    )
    adapter_store: str = Field(
        description="A directory with one PEFT folder a task; or the same at s3://bucket/folder "
        "or gs://bucket/folder."
    )
    default_task: str | None = Field(
        None, description="The task that `POST /predict`, the inference guide's route, answers."
    )

    quantization: Literal["auto", "none", "int8", "nf4"] = Field(
        "auto",
        description="Of the base: auto is nf4 on a GPU, and on a CPU int8 if that is exact there "
        "(with VNNI), else none. What is not quantised computes in bf16 on a GPU, fp32 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto is a GPU if there is any."
    )

    bank_gib: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Memory for resident adapters on the device, a replica. Each takes just its "
        "own bytes of it, and on a CPU it is taken as they come.",
    )
    adapter_slots: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="Most adapters resident at a time; auto is as many as bank_gib holds."
    )
    max_host_gib: Annotated[float, Field(gt=0)] = Field(
        1.0, description="RAM for adapters that were loaded and wait for a slot, a replica."
    )
    disk_cache: str | None = Field(
        None,
        description="A folder of this user alone on each machine, for versions out of a store at "
        "s3:// or gs://; onebase-UID below the temporary folder unless said.",
    )
    max_disk_gib: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Most that the disk cache holds, a machine."
    )

    pinned_tasks: tuple[Name, ...] = Field(
        (),
        description="Tasks that are in slots before a replica takes traffic, and never leave them.",
    )

    max_batch_rows: Annotated[int, Field(ge=1)] = Field(64, description="Most rows in a forward.")
    max_batch_tokens: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto",
        description="Most tokens in a forward, with padding where layers see any; auto is 16384 on "
        "a GPU, 1024 on a CPU. Fewer go where a forward would take longer than about a second.",
    )

    num_replicas: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Model replicas, fixed; 1 if neither this nor max_replicas is given."
    )
    min_replicas: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Fewest model replicas when autoscaled; 1 unless said."
    )
    max_replicas: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most model replicas when autoscaled."
    )
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs a model replica; 1 with device=cuda, else 0, unless said."
    )
    num_cpus: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="CPUs a model replica reserves and computes with; unless said, it reserves "
        "one and computes with its share of its node's, less one for all that is no forward.",
    )

    on_lost_catalog: Literal["refuse", "serve"] = Field(
        "refuse",
        description="What an ingress does that for 5 s has reached neither the catalog nor the "
        "store: it answers 503, or goes on by what it knows and says so in its answers.",
    )

    max_request_rows: Annotated[int, Field(ge=1)] = Field(
        1024, description="Most texts a request, and most windows of all its texts."
    )
    max_request_tasks: Annotated[int, Field(ge=1)] = Field(
        64,
        description="Most tasks that one request may ask at once; times its texts they are at most "
        "max_request_rows.",
    )
    max_rows_on_the_way: Annotated[int, Field(ge=8)] = Field(
        8192,
        description="Most rows that wait or are computed, an ingress and a model replica: a text "
        "is one, a long one in windows several; in an ingress a request counts as four at least. "
        "What comes beyond is refused at once (429). A task may have as many as it leaves free, so "
        "alone half of them.",
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        4 * 2**20, description="Largest request body."
    )

    max_upload_bytes: Annotated[int, Field(ge=1024)] = Field(
        2**30,
        description="Largest upload of a version, which waits in the system's temporary folder "
        "while it comes, and most bytes fetched from a source.",
    )
    allowed_sources: tuple[Name, ...] = Field(
        (),
        description="Where versions may be fetched from, by the beginnings of their names: "
        "hf://org, s3://bucket/folder, gs://…, file:///folder. Nowhere unless said.",
    )

    @field_validator("base_model")
    @classmethod
    def _names_a_base(cls, value: str) -> str:
        BaseName.parse(value)
        return value

    @field_validator("adapter_store")
    @classmethod
    def _is_a_store(cls, value: str) -> str:
        folder = local_folder(value)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"adapter_store={value!r} is not a folder; make it, empty or not")
        try:
            check_url(value)
        except ValueError as error:
            raise ValueError(f"adapter_store={value!r} {error}") from None
        return value

    @field_validator("base_aliases")
    @classmethod
    def _are_hub_ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if hub_id(name) != name:
                raise ValueError(f"base_aliases: {name!r} is not a hub id (org/name)")
        return value

    @field_validator("allowed_sources")
    @classmethod
    def _are_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                Source.parse_prefix(name)
            except ValueError as error:
                raise ValueError(f"allowed_sources: {error}") from None
        return value

    @field_validator("base_aliases", "pinned_tasks", "allowed_sources", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """The command line has no lists: `base_aliases=a/b,c/d`."""
        return [n.strip() for n in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, data: Any, handler: Any) -> Any:
        try:
            args: Args = handler(data)
        except ValidationError as error:
            raise ConfigError("; ".join(_sentences(error))) from None
        if args.num_replicas is not None and (args.min_replicas, args.max_replicas) != (None, None):
            raise ConfigError("num_replicas and min_replicas/max_replicas exclude each other")
        if args.max_replicas is None and args.min_replicas is not None:
            raise ConfigError("min_replicas needs max_replicas beside it")
        if args.max_replicas is not None and (args.min_replicas or 1) > args.max_replicas:
            raise ConfigError("min_replicas is over max_replicas")
        least = 2 * max(args.max_request_rows, LEAST_ROWS * args.max_request_tasks)
        if args.max_rows_on_the_way < least:
            raise ConfigError(
                f"max_rows_on_the_way={args.max_rows_on_the_way} is less than the {least} that two "
                "requests of max_request_rows or max_request_tasks may have; raise it"
            )
        if args.adapter_slots != "auto" and len(args.pinned_tasks) >= args.adapter_slots:
            raise ConfigError(
                f"pinned_tasks names {len(args.pinned_tasks)} tasks, which leaves none of "
                f"adapter_slots={args.adapter_slots} to all others; raise adapter_slots"
            )
        return args

    @property
    def gpus(self) -> float:
        """GPUs that a model replica reserves."""
        if self.num_gpus is not None:
            return self.num_gpus
        return 1.0 if self.device == "cuda" else 0.0

    @property
    def max_slots(self) -> int | None:
        """Most adapters resident at a time, None for as many as the bank holds."""
        return None if self.adapter_slots == "auto" else self.adapter_slots

    @property
    def max_host_bytes(self) -> int:
        """RAM for adapters that wait for a slot, a replica."""
        return int(self.max_host_gib * GIB)

    def open_store(self) -> Store:
        """Open the adapter store, with its disk cache on this machine."""
        return open_store(
            self.adapter_store,
            cache=None if self.disk_cache is None else Path(self.disk_cache),
            max_cache_bytes=int(self.max_disk_gib * GIB),
        )

    def on(self, device: str) -> Args:
        """Return a copy for a device, in the place of `auto`."""
        return self.model_copy(update={"device": device})

    def absolute(self) -> Args:
        """Return a copy whose local paths do not depend on the working directory."""
        changes = {}
        if (folder := local_folder(self.adapter_store)) is not None:
            changes["adapter_store"] = str(folder.absolute())
        if self.disk_cache is not None:
            changes["disk_cache"] = str(Path(self.disk_cache).absolute())
        if Path(self.base_model).exists():
            changes["base_model"] = str(Path(self.base_model).absolute())
        return self.model_copy(update=changes)


def admin_token() -> str | None:
    """Return the token that changes need, from `ONEBASE_ADMIN_TOKEN`; None if it is not set.

    Raises:
        ConfigError: It is empty, or has what no header can carry.
    """
    token = os.environ.get("ONEBASE_ADMIN_TOKEN")
    # A variable that was to hold a secret and holds none must not open what it was to close.
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("ONEBASE_ADMIN_TOKEN has characters that a header cannot carry")
    if token == "":
        raise ConfigError("ONEBASE_ADMIN_TOKEN is empty; give it a long random value, or unset it")
    return token


def tokenize_without_pool() -> None:
    """Let the Rust tokenizers work in the thread that asks, not in as many as there are CPUs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read anew with every call


def _sentences(error: ValidationError) -> list[str]:
    """Say what is wrong with each key, once a key."""
    sentences: dict[str, str] = {}
    for detail in error.errors():
        key = str(detail["loc"][0]) if detail["loc"] else "args"
        if detail["type"] == "extra_forbidden":
            known = ", ".join(Args.model_fields)
            sentences[key] = f"unknown key {key!r}; the keys are {known}"
        elif detail["type"] == "missing":
            sentences[key] = f"{key} is required"
        else:
            if detail["type"] == "value_error":
                sentences[key] = str(detail["ctx"]["error"])
                continue
            told = (
                f"{key}={detail['input']!r} is wrong: {detail['msg'][0].lower()}{detail['msg'][1:]}"
            )
            sentences[key] = f"{sentences[key]}, or {detail['msg']}" if key in sentences else told
    return list(sentences.values())


def set_unless_said(name: str, value: str) -> None:
    """Give an environment variable, which Ray's processes inherit, a value if it has none."""
    os.environ.setdefault(name, value)
