"""The web application: /v1/chat/completions, /v1/models, /health, /metrics, and a page at / that says how to use it.

    >>> app = create_app(load("runs/demo/model"), "demo", Limits(), max_batch_size=16)

`sq-llava serve` runs it with uvicorn. Tests run it without a port, with `fastapi.testclient.TestClient`.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sq_llava.inference.assistant import Assistant
from sq_llava.serving.chat import ChatService, Limits, timeout_event
from sq_llava.serving.engine import Engine
from sq_llava.serving.front_page import PAGE_POLICY, page
from sq_llava.serving.metrics import Metrics
from sq_llava.serving.schema import (
    UNSUPPORTED,
    ApiError,
    ChatCompletion,
    ChatCompletionRequest,
    ErrorResponse,
    error_body,
)
from sq_llava.serving.settings import Access


CHAT_PATH = "/v1/chat/completions"
HEALTH_PATH = "/health"
# Programs that watch a server have no key, and neither has somebody who looks at the page.
OPEN_PATHS = ("/", HEALTH_PATH)
# After a refusal, a client may keep sending for this long. After a timeout, it has this long to read the error.
SECONDS_FOR_LAST_WORDS = 2.0
IN_VLLM = "docs/serving.md, 'Beyond this server', says what vLLM offers."


def create_app(
    assistant: Assistant,
    model_name: str,
    limits: Limits,
    max_batch_size: int,
    api_key: str | None = None,
    access: Access | None = None,
) -> FastAPI:
    """
    Args:
        model_name (`str`): Name of the model for clients.
        limits (`Limits`): Limits on requests.
        max_batch_size (`int`): Maximum number of texts that are generated at the same time.
        api_key (`str`, *optional*): Key that clients must send to all paths except / and /health, as
            `Authorization: Bearer KEY`.
        access (`Access`, *optional*): Which names of the server and which origins are accepted, and which paths are
            closed. Default: all names, no other origin, and no path.

    Raises:
        ValueError: if the API key is empty, the model cannot be batched, or its generation_config.json has an
            unsupported setting.
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("api_key is empty: give a key, or None for a server that is open to everybody.")
    access = access or Access()
    engine = Engine(assistant, max_batch_size)
    metrics = Metrics(engine)
    chat_service = ChatService(assistant, engine, model_name, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield
        chat_service.preparing.shutdown(wait=False, cancel_futures=True)

    # FastAPI's documentation pages are off: they load scripts from other servers.
    openapi_url = None if access.disable_fastapi_docs else "/openapi.json"
    app = FastAPI(title="SQ-LLaVA", lifespan=lifespan, openapi_url=openapi_url, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=limits, max_requests=max_batch_size + limits.max_waiting, metrics=metrics)
    app.add_middleware(ApiKey, api_key=api_key)
    if access.cors:
        # Outside of ApiKey: a browser asks for leave without the key. OpenAI's client sends headers of its own.
        app.add_middleware(
            CORSMiddleware, allow_origins=access.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=access.allowed_hosts or ["*"], www_redirect=False)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected_error)
    _add_routes(app, chat_service, None if access.disable_metrics else metrics)
    paths = [route.path for route in app.routes if "GET" in route.methods and "{" not in route.path]
    name = model_name if api_key is None else None

    @app.get("/", include_in_schema=False)
    async def show_page(request: Request) -> HTMLResponse:
        return HTMLResponse(page(name, str(request.base_url), paths), headers={"Content-Security-Policy": PAGE_POLICY})

    return app


def _add_routes(app: FastAPI, chat_service: ChatService, metrics: Metrics | None) -> None:
    model = {
        "id": chat_service.model_name,
        "object": "model",
        "created": chat_service.created,
        "owned_by": "sq-llava",
        "max_model_len": chat_service.context_length,
    }
    errors = {status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 504)}
    answers = {200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}, **errors}

    @app.post(CHAT_PATH, responses=answers)
    async def create_chat_completion(chat: ChatCompletionRequest, request: Request) -> Response:
        ready = await _unless_gone(request, chat_service.prepare(chat))
        if chat.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(chat_service.stream(ready), media_type="text/event-stream", headers=headers)
        return JSONResponse(await _unless_gone(request, chat_service.complete(ready)))

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", responses={404: {"model": ErrorResponse}})
    async def retrieve_model(name: str) -> dict:
        if name != chat_service.model_name:
            raise ApiError(404, f"The model {name!r} does not exist.", "model_not_found", "model")
        return model

    @app.head(HEALTH_PATH, include_in_schema=False)
    @app.get(HEALTH_PATH, responses={503: {"model": ErrorResponse}})
    async def health() -> dict:
        if not chat_service.engine.thread.is_alive():
            raise ApiError(503, "The generation thread has stopped. Restart the server.")
        return {"status": "ok"}

    if metrics is not None:

        @app.get("/metrics")
        async def prometheus_metrics() -> Response:
            return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _unless_gone(request: Request, work: Awaitable):
    """Returns the result of `work`. If the client disconnects first, `work` is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "The client has closed the connection.")  # nobody reads it
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ApiKey:
    """If there is an API key, refuses requests without it, except to the open paths."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app = app
        self.expected = None if api_key is None else hashlib.sha256(api_key.strip().encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.expected is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            # Digests have one length, so the time of the comparison says nothing about the key.
            is_equal = hmac.compare_digest(hashlib.sha256(key.strip().encode("latin-1")).digest(), self.expected)
            if not (is_equal and scheme.lower() == "bearer"):
                message = "The API key is missing or wrong. Send it in the header Authorization: Bearer KEY."
                headers = {"WWW-Authenticate": "Bearer"}
                response = JSONResponse(error_body(401, message, "invalid_api_key"), 401, headers)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Gate:
    """
    Enforces the limits on chat completions: their number, the size of the body, and the time from the first byte of
    the request to the last byte of the reply.
    """

    def __init__(self, app: ASGIApp, limits: Limits, max_requests: int, metrics: Metrics):
        self.app = app
        self.limits = limits
        self.max_requests = max_requests
        self.metrics = metrics
        self.num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != CHAT_PATH:
            await self.app(scope, receive, send)
            return
        if self.num_requests >= self.max_requests:
            self.metrics.requests.labels(429).inc()
            await _drain(receive)
            message = f"{self.num_requests} requests are in progress, the most this server accepts. Try again later."
            response = JSONResponse(error_body(429, message, "queue_full"), 429, {"Retry-After": "1"})
            await response(scope, receive, send)
            return
        self.num_requests += 1
        self.metrics.under_way.inc()
        began = time.monotonic()
        reply = _Reply(send)
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                await self.app(scope, self._counting(receive), reply.send)
        except TimeoutError:
            await self._say_timeout(scope, receive, reply)
        except Exception:
            reply.status = 500  # Starlette sends it after this middleware
            raise
        finally:
            self.num_requests -= 1
            self.metrics.under_way.dec()
            self.metrics.requests.labels(reply.status or 499).inc()
            self.metrics.seconds.observe(time.monotonic() - began)

    def _counting(self, receive: Receive) -> Receive:
        most, num_bytes = self.limits.max_body_bytes, 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                if message.get("more_body", False):
                    await _drain(receive)
                raise ApiError(413, f"The request has more than {most:,} bytes.", "request_too_large")
            return message

        return counted

    async def _say_timeout(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        seconds = self.limits.request_seconds
        try:
            async with asyncio.timeout(SECONDS_FOR_LAST_WORDS):
                if reply.status is None:
                    # Otherwise, OpenAI's client would retry and wait for the same time again.
                    headers = {"x-should-retry": "false"}
                    body = error_body(504, f"The request took more than {seconds:g} seconds.", "timeout")
                    await JSONResponse(body, 504, headers)(scope, receive, reply.send)
                else:
                    await reply.send({"type": "http.response.body", "body": timeout_event(seconds)})
        except TimeoutError:
            return  # uvicorn closes the connection


async def _drain(receive: Receive) -> None:
    """Reads the rest of a body, for a limited time. Many clients read no reply before they have sent everything."""
    try:
        async with asyncio.timeout(SECONDS_FOR_LAST_WORDS):
            message = await receive()
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await receive()
    except TimeoutError:
        return


class _Reply:
    """Forwards the messages of a reply, and remembers its status."""

    def __init__(self, send: Send):
        self.send_on = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send_on(message)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    body = error.body() if isinstance(error, ApiError) else error_body(error.status_code, error.detail)
    return JSONResponse(body, error.status_code, error.headers)


async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    # In a union, each type reports its own errors. The deepest ones belong to the type that the client meant.
    # Of these, an error about a value says more than one about its type.
    found = max(error.errors(), key=lambda entry: (len(entry["loc"]), not entry["type"].endswith("_type")))
    if found["type"] == "json_invalid":
        message = f"The body is not valid JSON: {found['ctx']['error']}."
        return JSONResponse(error_body(400, message, "invalid_json"), 400)
    # Leave out Pydantic's names for the types of a union, and field names that are huge or not valid Unicode.
    steps = [step for step in found["loc"][1:] if isinstance(step, int) or step[:100].isidentifier()]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")[:200]
    if steps and (feature := UNSUPPORTED.get(steps[0])):
        message = f"{place}: {feature} not supported. {IN_VLLM}"
        return JSONResponse(error_body(400, message, "unsupported", place), 400)
    if found["type"] == "extra_forbidden":
        message = f"{place}: this server does not know the field. {IN_VLLM}"
    elif place:
        message = f"{place}: {found['msg']}."
    else:
        message = f"{found['msg']}. Send a JSON object as application/json."
    return JSONResponse(error_body(400, message, "invalid_request", place or None), 400)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "The server failed on this request."), 500)
