"""Requests to /v1/chat/completions and their replies: the part of OpenAI's schema that the server supports.

    {"model": "sq-llava-7b", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
        {"type": "text", "text": "What is it?"}]}]}

`self_question`, `self_questions` and `top_k` are extensions. So is the role `vusr`, for questions that the model asked
before. `chat_template_kwargs` with `ask` means the same as `self_question`: vLLM takes it too. Unknown fields, and
values that need an unsupported feature, are refused and never ignored. Values that change nothing are accepted.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException


# Maximum number of parts in all messages together. The server can do nothing else while it checks a request.
MAX_PARTS = 1000
# What each field would need. Such a field is accepted with the values that change nothing.
UNSUPPORTED = {
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), "Tools are"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "Log probabilities are"),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "repetition_penalty"), "Penalties are"),
    "logit_bias": "A logit bias is",
    "min_p": "min_p is",
    "modalities": "Output other than text is",
    "response_format": "A response format other than text is",
    "service_tier": "A service tier is",
    "store": "Storing completions is",
}


def _check_unicode(text: str) -> str:
    # JSON can contain half of a surrogate pair, which no tokenizer accepts and no reply can contain.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("not valid Unicode")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


IGNORED = Field(None, description="Ignored.")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, value: Any) -> Any:
        # Otherwise, each of a million unknown fields would get its own error.
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            raise ValueError(f"has {len(value)} fields, but only {len(cls.model_fields)} exist")
        return value


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    url: Text
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="Ignored: all images have the same resolution for the model."
    )


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "vusr"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = IGNORED
    # OpenAI's client sends these fields when it sends a reply back. They must be empty.
    refusal: None = None
    annotations: Annotated[list, Field(max_length=0)] | None = None
    audio: None = None
    tool_calls: Annotated[list, Field(max_length=0)] | None = None
    function_call: None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = IGNORED


class ResponseFormat(Strict):
    type: Literal["text"]


class TemplateSettings(Strict):
    ask: bool = False


NOTHING = Field(max_length=0)

StopString = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_check_unicode)]


class ChatCompletionRequest(Strict):
    model: Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS)]
    self_question: bool = Field(False, description="Ask a question instead of answering one.")
    self_questions: Annotated[int, Field(ge=0, le=16)] = Field(
        0, description="Number of questions that the model asks itself, and answers, before it answers."
    )
    chat_template_kwargs: TemplateSettings | None = Field(None, description="`ask`: the same as self_question.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Default: 1, or 1.2 with self_question. 0 is greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Literal[-1] | Annotated[int, Field(ge=1)] | None = Field(None, description="-1: no limit, as in vLLM.")
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = IGNORED
    safety_identifier: str | None = IGNORED
    prompt_cache_key: str | None = IGNORED
    metadata: dict[str, Any] | None = IGNORED
    parallel_tool_calls: bool | None = IGNORED
    # Only the values that change nothing; see UNSUPPORTED.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    min_p: Literal[0] | None = None
    logit_bias: Annotated[dict, NOTHING] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tools: Annotated[list, NOTHING] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list, NOTHING] | None = None
    function_call: Literal["none"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_parts(cls, value: Any) -> Any:
        messages = value.get("messages") if isinstance(value, dict) else None
        messages = messages if isinstance(messages, list) else []
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        num_parts = sum(len(content) for content in contents if isinstance(content, list))
        if num_parts > MAX_PARTS:
            raise ValueError(f"messages have {num_parts} parts, but at most {MAX_PARTS} are allowed")
        return value

    @property
    def asks(self) -> bool:
        """Whether the model asks, instead of answering."""
        settings = self.chat_template_kwargs
        return self.self_question or (settings is not None and settings.ask)

    @model_validator(mode="after")
    def _check_stream_options(self) -> "ChatCompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.self_questions and self.asks:
            raise ValueError("self_questions is for answers. Remove it, or self_question")
        return self


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Asked(BaseModel):
    question: str
    answer: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    first_answer: str | None = Field(None, description="With self_question: the model's answer before its question.")
    asked: list[Asked] | None = Field(None, description="With self_questions: the model's questions and its answers.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """An error that is sent to the client, in OpenAI's format."""

    def __init__(
        self,
        status_code: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status_code, message, headers)
        self.code = code
        self.param = param

    def body(self) -> dict:
        return error_body(self.status_code, self.detail, self.code, self.param)


def error_body(status_code: int, message: str, code: str | None = None, param: str | None = None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status_code, "server_error" if status_code >= 500 else "invalid_request_error")
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()
