"""What the HTTP interface answers, for its description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Found(BaseModel):
    """An item that was found."""

    id: int = Field(description="for /items/{id} and for like=")
    name: str = Field(description="file name")
    path: str | None = Field(description="where the file is, if the server is for this machine alone")
    caption: str | None
    metadata: dict[str, Any]
    score: float = Field(description="similarity, higher is better")
    probability: float | None = Field(description="that it is what the text means, if the gallery was calibrated")
    likely: bool | None = Field(description="whether that reaches the gallery's cut")
    alike: int = Field(description="how many items look the same and are left out, if those were to be collapsed")
    duplicates: list[int] = Field(description="ids of the first of them")
    image: str = Field(description="where the picture is, relative to this server; ?side=320 for a small one")


class Answer(BaseModel):
    """What a search found."""

    results: list[Found] = Field(description="best first")
    cut: float | None = Field(description="results of at least this probability are likely")
    milliseconds: float = Field(description="between the request and the answer, in the server")


class ItemRecord(BaseModel):
    """An item of the gallery."""

    id: int
    name: str
    path: str | None
    caption: str | None
    metadata: dict[str, Any]
    size: int = Field(description="bytes")
    sha256: str
    image: str


class Items(BaseModel):
    """Some items, in order of id."""

    items: list[ItemRecord]
    total: int = Field(description="how many there are that fulfil the conditions")


class Added(BaseModel):
    """Ids of what was added, in order."""

    ids: list[int]


class Removed(BaseModel):
    """How many items were removed."""

    removed: int


class Health(BaseModel):
    """That the server answers, and for what."""

    status: str
    pictures: int
    model: str = Field(description="checksum of the model's weights")
    version: str


class Problem(BaseModel):
    """What is wrong, and how to mend it, in one line."""

    detail: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "bad input",
        401: "a password is needed",
        403: "not allowed here",
        404: "no such item",
        409: "the gallery is being changed by somebody else",
        413: "too large",
        422: "bad input",
        429: "too many requests",
        503: "too busy",
    }.items()
}
"""What routes may answer instead, for their descriptions."""
