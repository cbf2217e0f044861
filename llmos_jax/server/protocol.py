"""What may be asked: the bodies of requests, as OpenAI and vLLM name their fields.

The types are the checks, and they are what /openapi.json tells of them. Fields that are
not here are ignored, as OpenAI does; null is the same as leaving a field out.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from llmos_jax.server.refusals import Refusal

MOST_CHOICES = 128
"""Answers to one prompt, at most (OpenAI's bound for `n`)."""
MOST_PROMPTS = 2048
"""Prompts or inputs of one request, at most (OpenAI's bound for embeddings)."""

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]
NonEmpty = Annotated[str, Meta(min_length=1)]
Stops = NonEmpty | Annotated[list[NonEmpty], Meta(max_length=4)]
Inputs = (
    str
    | Annotated[
        list[str | Id | Annotated[list[Id], Meta(min_length=1)]],
        Meta(min_length=1, max_length=1 << 20),
    ]
)
"""A text, ids, or a list of either; `prompts_of` tells which."""


class StreamOptions(Struct, kw_only=True):
    include_usage: bool | None = None


class JsonSchema(Struct, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = field(default=None, name="schema")
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's: one of these."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Annotated[list[NonEmpty], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generate(Struct, kw_only=True):
    """What completions and chats have in common."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Id], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None


class CompletionRequest(Generate, kw_only=True):
    prompt: Inputs
    best_of: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class ContentPart(Struct, kw_only=True):
    type: Literal[
        "text", "refusal", "image_url", "video_url", "input_audio", "audio_url", "file"
    ]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Struct, kw_only=True):
    name: str
    arguments: str


class MessageToolCall(Struct, kw_only=True):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Struct, kw_only=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    type: Literal["function"]
    function: Function


class FunctionName(Struct, kw_only=True):
    name: str


class NamedTool(Struct, kw_only=True):
    type: Literal["function"] = "function"
    function: FunctionName


Messages = Annotated[list[Message], Meta(min_length=1)]
Tools = Annotated[list[Tool], Meta(max_length=128)]


class ChatRequest(Generate, kw_only=True):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class EmbeddingRequest(Struct, kw_only=True):
    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None


class ClassifyRequest(Struct, kw_only=True):
    """vLLM's, and `top`."""

    input: Inputs
    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    """What is cut off; by default the end of a text."""
    use_activation: bool | None = None
    """False: logits in place of probabilities."""
    top: Count | None = None
    """Likeliest classes to name with each text."""
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None


class TokenizeRequest(Struct, kw_only=True):
    """A prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[Id]


Body = TypeVar("Body")
_WHERE = re.compile(r"`\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


def read(text: bytes, shape: type[Body]) -> Body:
    """Return a body of this shape; Refusal (400) names the field that is wrong."""
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.ValidationError as problem:
        said = str(problem)
        missing, where = _MISSING.search(said), _WHERE.search(said)
        param = missing.group(1) if missing else where.group(1) if where else ""
        raise Refusal(
            400, f"the body is not as it should be: {said}.", param=param or None
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise Refusal(400, f"the body is not JSON: {problem}.") from None


def prompts_of(inputs: Inputs, param: str) -> list[str | list[int]]:
    """Return each prompt: a text, or its ids.

    Raises:
        Refusal: texts, ids and lists of ids in one list, an empty text among ids, or
            more than MOST_PROMPTS.
    """
    if isinstance(inputs, str):
        return [inputs]
    if all(isinstance(one, int) for one in inputs):
        return [[one for one in inputs if isinstance(one, int)]]
    texts = [one for one in inputs if isinstance(one, str)]
    lists = [one for one in inputs if isinstance(one, list)]
    if len(inputs) not in (len(texts), len(lists)):
        raise Refusal(
            400,
            f"`{param}` mixes texts, ids and lists of ids; give a text, a list of "
            "texts, ids, or a list of lists of ids.",
            param=param,
        )
    if len(inputs) > MOST_PROMPTS:
        raise Refusal(
            400,
            f"`{param}` has {len(inputs)} entries; one request takes at most "
            f"{MOST_PROMPTS}. Send several requests.",
            param=param,
        )
    return [*texts, *lists]
