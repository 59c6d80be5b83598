"""A reward behind HTTP: one POST a response, repeated while the service is overloaded or away.

    -> {"prompt": ..., "response": ..., "answer": ..., "row": {...}, "prompt_tokens": 12, "response_tokens": 400,
        "finish_reason": "stop", "source": ...}                     a `RewardInput`
    <- 0.5   or   {"score": 0.5, any metrics}

Of a row, bytes are sent as base64, dates and times as ISO 8601, decimals as text, NaN and infinity as null.

Secrets are in the environment and never in the recipe, which a run writes into its folder, nor in messages: `{NAME}` in
the URL is the variable NAME, and VAPO_REWARD_HEADERS holds headers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from time import monotonic
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import aiohttp

from megatron_vapo.errors import RecipeError

if TYPE_CHECKING:
    from megatron_vapo.rewards import RewardInput

HEADERS = "VAPO_REWARD_HEADERS"
"""The environment variable with headers for services: a JSON object of text, {"Authorization": "Bearer ..."}."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_BUSY = (408, 425, 429)
"""Statuses, besides those from 500, after which the same request may succeed later."""


class ServiceError(Exception):
    """Raised for a service that refuses, stays away, or answers what is no score."""


@dataclass
class Service:
    """A service that scores responses, called as a reward.

    shown: its URL as the recipe writes it, for messages.
    timeout_s: no request is repeated after that time.
    """

    shown: str
    timeout_s: float
    url: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, shown: str, timeout_s: float) -> Self:
        """Return the service at a URL of a recipe, with what the environment adds.

        Raises:
            RecipeError: a variable is not set, the headers are none, or the URL holds a password.
        """
        if "@" in urlsplit(shown).netloc and "{" not in urlsplit(shown).netloc:
            raise RecipeError(
                f"a reward's URL holds a password: write {{NAME}} for it and set the environment variable "
                f"NAME, or {HEADERS}"
            )
        url = re.sub(r"\{(\w+)\}", lambda match: _variable(match[1], shown), shown)
        if not urlsplit(url).hostname:
            raise RecipeError(f"reward {shown}: a URL without a host")
        return cls(shown, timeout_s, url, _headers())

    @property
    def name(self) -> str:
        """The name in metrics: what the URL has after `#`, else the last part of its path, else `service`."""
        parts = urlsplit(self.shown)
        return parts.fragment or parts.path.rstrip("/").rpartition("/")[2] or "service"

    async def __call__(self, sample: RewardInput) -> Any:
        """Return what the service answers.

        Raises:
            ServiceError: with the last of its answers.
        """
        row = {name: _plain(value, name) for name, value in sample.row.items()}
        body = json.dumps(vars(sample) | {"row": row}, allow_nan=False)
        began, pause = monotonic(), _FIRST_PAUSE_S
        while True:
            problem, result = await self._ask(body)
            if not problem:
                return result
            if monotonic() - began + pause > self.timeout_s:
                raise ServiceError(f"{self.shown}: {problem} until its time was over")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # so that not all come back at once
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _ask(self, body: str) -> tuple[str, Any]:
        """Return a problem that may pass, or "" and the answer."""
        headers = {"Content-Type": "application/json"} | self.headers
        try:
            async with self._session().post(self.url, data=body, headers=headers, allow_redirects=False) as answer:
                text = await answer.text(errors="replace")
                status = answer.status
        except (aiohttp.ClientError, OSError) as error:
            return f"{type(error).__name__}", None  # its text may hold the whole URL
        if status in _BUSY or status >= 500:
            return f"HTTP {status}: {self._harmless(text)}", None
        if status != 200:
            raise ServiceError(f"{self.shown}: HTTP {status}: {self._harmless(text)}")
        try:
            return "", json.loads(text)
        except ValueError as error:
            raise ServiceError(f"{self.shown}: an answer that is no JSON: {self._harmless(text)}") from error

    def _session(self) -> aiohttp.ClientSession:
        """Return the pool of connections of the process, opened by its first call."""
        if "_opened" not in vars(self):
            # How many are under way at a time, and for how long, is bounded by who calls.
            timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
            self._opened = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self._opened

    def _harmless(self, text: str) -> str:
        """Return the beginning of an answer, without the secrets that a service may repeat."""
        secrets = [os.environ.get(name, "") for name in re.findall(r"\{(\w+)\}", self.shown)]
        for value in self.headers.values():
            secrets += [value, *value.split()]
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text[:200]


def _plain(value: object, column: str) -> Any:
    """Return a value of a row as JSON holds it (see the module)."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case date() | time():
            return value.isoformat()
        case Decimal():
            return str(value)
        case Mapping():
            return {str(key): _plain(one, column) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one, column) for one in value]
    kind = type(value).__name__
    raise ServiceError(f"the column {column} holds a {kind}, which JSON cannot: write it as text in the data")


def _variable(name: str, shown: str) -> str:
    if name not in os.environ:
        raise RecipeError(f"reward {shown}: the environment variable {name} is not set")
    return os.environ[name]


def _headers() -> dict[str, str]:
    try:
        headers = json.loads(os.environ.get(HEADERS, "{}"))
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise RecipeError(f'{HEADERS} must be a JSON object of text, such as {{"Authorization": "Bearer ..."}}')
    return headers
