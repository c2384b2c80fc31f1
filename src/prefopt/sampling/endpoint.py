"""Completions from an OpenAI-compatible endpoint: a thin client over HTTP.

Every sample is a request of its own, since many servers ignore `n`. Requests that fail for a passing
reason are tried again, with jitter and within bounds, after as long as the server asks for.
"""

import asyncio
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2
import numpy as np
import stamina

from prefopt.errors import ConfigError, EndpointError
from prefopt.records import Content
from prefopt.sampling.completions import Completed, OnPrompt, Settings

__all__ = ["KEY_VARIABLE", "Endpoint"]

KEY_VARIABLE = "PREFOPT_API_KEY"
_FINISH: dict[str, Literal["stop", "length", "filtered"]] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "filtered",
}
# It says that it tries again, but not what failed; our error does, when trying has not helped.
logging.getLogger("stamina").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Endpoint:
    """A server and how to ask it.

    Attributes:
        url: Base, with its version: "http://localhost:8000/v1".
        model: The name the server knows it by.
        form: "chat" sends conversations (a string is one user turn), "text" has strings continued as they stand.
        key_variable: Environment variable with the API key; without it no key is sent.
        concurrency: Requests under way at once.
        timeout: Longest wait for one answer, from its request to its last byte, seconds.
        attempts: Tries for one completion.
        patience: Seconds after which a completion is not tried again; also the longest wait a server may ask for.

    Raises:
        ConfigError: the URL is none, or may hold a key; a number is not above 0.
    """

    url: str
    model: str
    form: Literal["chat", "text"] = "chat"
    key_variable: str = KEY_VARIABLE
    concurrency: int = 16
    timeout: float = 600.0
    attempts: int = 6
    patience: float = 900.0

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            url = httpx2.URL("")
        if "@" in self.url or "?" in self.url:
            raise ConfigError(
                "A key or password does not belong in an endpoint's URL: it would be printed and saved.",
                where="url",
                expected="http://HOST/v1 or https://..., without @ and ?",
                todo=f"Put the key into the environment variable {self.key_variable}.",
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(
                "This is no endpoint.", where="url", got=self.url, expected="http://HOST/v1 or https://..."
            )
        for name in ("concurrency", "attempts", "timeout", "patience"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} is not right.", where=name, got=str(getattr(self, name)), expected="more than 0"
                )

    def complete(
        self,
        prompts: Sequence[Content],
        completions: int,
        settings: Settings,
        on_prompt: OnPrompt = lambda *_: None,
    ) -> list[list[Completed]]:
        """`completions` samples of each prompt, in prompt order.

        Raises:
            ConfigError: a conversation for an endpoint that continues text, or a key that is none.
            EndpointError: the server refuses, answers in another form, or does not answer in time.
        """
        bodies = [self._body(prompt, settings) for prompt in prompts]
        try:
            return asyncio.run(self._all(bodies, completions, settings.seed, on_prompt))
        except BaseExceptionGroup as group:  # the first failure cancels the requests under way
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    def _body(self, prompt: Content, settings: Settings) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "temperature": settings.temperature}
        if self.form == "chat":
            turns = [("user", prompt)] if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]
            body["messages"] = [{"role": role, "content": content} for role, content in turns]
        elif isinstance(prompt, str):
            body["prompt"] = prompt
        else:
            raise ConfigError(
                "A conversation cannot be continued as text.", where="form", got="text", todo="Ask in the form chat."
            )
        body["max_tokens"] = settings.max_new_tokens
        if settings.top_p < 1:
            body["top_p"] = settings.top_p
        if settings.stop:
            body["stop"] = list(settings.stop)
        return body

    async def _all(
        self, bodies: list[dict[str, Any]], completions: int, seed: int, on_prompt: OnPrompt
    ) -> list[list[Completed]]:
        found: list[dict[int, Completed]] = [{} for _ in bodies]
        jobs = ((number, k) for number in range(len(bodies)) for k in range(completions))
        key = _key(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self.timeout, limits=limits) as client:
            asking = _Asking(self, client, key)

            async def work(mine: Iterator[tuple[int, int]]) -> None:
                for number, k in mine:
                    noise = int(np.random.SeedSequence([seed, number, k]).generate_state(1)[0]) >> 1
                    found[number][k] = await asking.one({**bodies[number], "seed": noise})
                    if len(found[number]) == completions:
                        on_prompt(number, [found[number][k] for k in range(completions)])

            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(work(jobs))
        return [[mine[k] for k in range(completions)] for mine in found]


class _Asking:
    """Requests to one endpoint, and what its answers have taught."""

    def __init__(self, endpoint: Endpoint, client: httpx2.AsyncClient, key: str | None) -> None:
        self.endpoint, self.client, self.key = endpoint, client, key
        path = "chat/completions" if endpoint.form == "chat" else "completions"
        self.url = f"{endpoint.url.rstrip('/')}/{path}"
        self.length_name = "max_tokens"

    async def one(self, body: dict[str, Any]) -> Completed:
        """One completion.

        It begins with `max_tokens`, which servers that want `max_completion_tokens` refuse loudly; the
        other way about, older servers would silently generate without a limit.
        """
        response = await self._post(body)
        if response.status_code == 400 and "max_completion_tokens" in response.text and self.endpoint.form == "chat":
            self.length_name = "max_completion_tokens"
            response = await self._post(body)
        if response.status_code != 200:
            raise self._refused(response)
        try:
            return self._read(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise EndpointError(
                "The endpoint's answer is not in the form of a completion.",
                where=self.url,
                got=self._shown(f"{problem}: {response.text}"),
                expected="an answer as OpenAI's API gives it",
                todo="Check the URL: it usually ends in /v1.",
            ) from error

    async def _post(self, body: dict[str, Any]) -> httpx2.Response:
        patience, length = self.endpoint.patience, body["max_tokens"]
        tries = stamina.retry_context(
            on=self._wait, attempts=self.endpoint.attempts, timeout=patience, wait_initial=0.5, wait_max=30.0
        )
        try:
            async for attempt in tries:
                with attempt:
                    named = {k: v for k, v in body.items() if k != "max_tokens"} | {self.length_name: length}
                    async with asyncio.timeout(self.endpoint.timeout):  # the client's own is for each read
                        response = await self.client.post(self.url, json=named)
                    if _passing(response.status_code):
                        response.raise_for_status()
        except httpx2.HTTPStatusError as error:
            raise self._refused(error.response) from error
        except (httpx2.RequestError, TimeoutError) as error:
            slow = isinstance(error, httpx2.TimeoutException | TimeoutError)
            todo = "Ask for less at once, or wait longer." if slow else "Is the server up? Is the URL right?"
            raise EndpointError(
                "The endpoint does not answer in time." if slow else "The endpoint cannot be reached.",
                where=self.url,
                got=self._shown(f"{type(error).__name__} {error}"),
                expected=f"an answer within {self.endpoint.timeout:g} s" if slow else None,
                todo=todo,
            ) from error
        return response

    def _wait(self, error: Exception) -> bool | float:
        """Whether to try again after `error`, or the seconds to wait first."""
        if isinstance(error, httpx2.HTTPStatusError):
            asked = retry_after(error.response.headers.get("Retry-After"))
            if asked is None:
                return True
            return False if asked > self.endpoint.patience else asked + random.uniform(0, 1)
        return isinstance(error, httpx2.TransportError | TimeoutError)

    def _read(self, answer: Any) -> Completed:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if self.endpoint.form == "chat" else choice["text"]
        finish = _FINISH.get(choice["finish_reason"])
        if finish is None:
            raise ValueError(f"finish_reason {choice['finish_reason']!r}")
        if text is None and finish != "stop":
            text = ""  # it ran out of tokens while it was reasoning, or was held back
        if not isinstance(text, str):
            raise TypeError("no text")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        return Completed(text, finish, tokens if isinstance(tokens, int) else None)

    def _refused(self, response: httpx2.Response) -> EndpointError:
        todo = "See what the server says."
        if response.status_code in (401, 403):
            todo = f"Put a valid key into the environment variable {self.endpoint.key_variable}."
        elif response.status_code == 404:
            todo = "Check the URL (it usually ends in /v1) and the model's name."
        elif _passing(response.status_code):
            todo = "Try again later, or ask for fewer completions at once."
        wait = response.headers.get("Retry-After")
        return EndpointError(
            "The endpoint refuses." if response.status_code < 500 else "The endpoint fails.",
            where=self.url,
            got=f"status {response.status_code}{f', Retry-After {wait}' if wait else ''}: {self._shown(response.text)}",
            todo=todo,
        )

    def _shown(self, text: str) -> str:
        """The beginning of what a server says, without the key that it may repeat."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join(text.split())[:300]


def _passing(status: int) -> bool:
    """Whether a status may be another one in a while."""
    return status in (408, 425, 429) or status >= 500


def _key(variable: str) -> str | None:
    """The API key in the environment."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != KEY_VARIABLE:
        raise ConfigError("The variable with the API key is not set.", where=f"environment variable {variable}")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "The API key holds characters that no key has.",
            where=f"environment variable {variable}",
            expected="printable ASCII",
        )
    return key or None


def retry_after(header: str | None) -> float | None:
    """Seconds a server asks to wait, given as a number or as a date; None if it does not say."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
