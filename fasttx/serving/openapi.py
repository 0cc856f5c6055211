"""The service's description by OpenAPI 3.1, and a page that shows it without any other server."""

from __future__ import annotations

import html
import json
from typing import Any

from fasttx.serving.limits import Limits
from fasttx.version import __version__

_ERRORS = {
    400: "The body is neither UTF-8 nor JSON",
    404: "No model of this name",
    408: "The body took too long to arrive",
    413: "The body is too large",
    415: "Another content type than application/json",
    422: "A field is missing or exceeds a limit, which the message names",
    429: "Too many texts wait, or this one waited too long; Retry-After says for how long",
    500: "The model failed on this request",
    503: "The service is stopping",
}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Any, example: Any = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": schema}
    if example is not None:
        content["example"] = example
    return {"application/json": content}


def _responses(schema: str, *errors: int) -> dict[str, Any]:
    good = {"200": {"description": "OK", "content": _json(_ref(schema))}}
    bad = {str(e): {"description": _ERRORS[e], "content": _json(_ref("Error"))} for e in errors}
    return good | bad


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def document(limits: Limits, default: str) -> dict[str, Any]:
    text = {"type": "string", "maxLength": limits.characters}
    several = {"type": "array", "items": text, "maxItems": limits.texts}
    model = {"type": "string", "default": default}
    number, string, truth = {"type": "number"}, {"type": "string"}, {"type": "boolean"}
    count = {"type": "integer"}
    strict = {"additionalProperties": False}
    schemas = {
        "Texts": _object(["text"], text={"oneOf": [text, several]}, model=model) | strict,
        "Text": _object(["text"], text=text, model=model) | strict,
        "Prediction": _object(
            ["tokens", "truncated"],
            label=string | {"description": "of a single-label model: the likeliest label"},
            probability=number | {"description": "of that label"},
            labels={"type": "array", "items": string, "description": "of a multi-label model: those"
                    " with a probability of at least 0.5"},
            probabilities={"type": "object", "additionalProperties": number,
                           "description": "of every label, unless the model fits a number"},
            value=number | {"description": "of a regression: the number"},
            tokens=count | {"description": "that the model read"},
            truncated=truth | {"description": "a part of the text was not read"},
        ),
        "Predictions": _object(
            ["model", "predictions"], model=string,
            predictions={"type": "array", "items": _ref("Prediction")},
        ),
        "Word": _object(
            ["word", "known", "attribution"], word=string, known=truth, attribution=number
        ),
        "Explanation": _object(
            ["model", "label", "probability", "rival", "margin", "words"], model=string,
            label=string, probability={"type": ["number", "null"]},
            rival={"type": ["string", "null"]}, margin=number, baseline_margin=number,
            words={"type": "array", "items": _ref("Word")}, words_left_out=count,
        ),
        "Model": _object(["name", "labels"], name=string, labels={"type": "array", "items": string},
                         problem_type=string, max_len=count, truncation=string,
                         long_texts=string, precision=string, parameters=count),
        "Models": _object(["models", "default"], default=string,
                          models={"type": "array", "items": _ref("Model")}),
        "Status": _object(["status"], status=string),
        "Error": _object(["error"], error=_object(["status", "message"], status=count,
                                                  message=string)),
    }  # fmt: skip
    asking = (400, 404, 408, 413, 415, 422, 429, 500, 503)
    plain = {"200": {"description": "OK", "content": {"text/plain": {"schema": string}}}}
    example = {"text": ["a wonderful film", "I want my money back"]}
    paths = {
        "/predict": {"post": {
            "summary": "Label one text, or several",
            "requestBody": {"required": True, "content": _json(_ref("Texts"), example)},
            "responses": _responses("Predictions", *asking),
        }},
        "/explain": {"post": {
            "summary": "Label one text, and say what each of its words contributed",
            "requestBody": {"required": True,
                            "content": _json(_ref("Text"), {"text": "a wonderful film"})},
            "responses": _responses("Explanation", *asking),
        }},
        "/v1/models": {"get": {"summary": "The models of this service",
                               "responses": _responses("Models")}},
        "/healthz": {"get": {"summary": "Does the process live?",
                             "responses": _responses("Status")}},
        "/readyz": {"get": {"summary": "Does it take requests?",
                            "responses": _responses("Status", 503)}},
        "/metrics": {"get": {"summary": "Counters for Prometheus", "responses": plain}},
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "fasttx", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def page(described: dict[str, Any]) -> str:
    """HTML without scripts."""
    parts = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            example = json.dumps(body["example"]) if "example" in body else ""
            rows = "".join(
                f"<tr><td>{status}</td><td>{html.escape(answer['description'])}</td></tr>"
                for status, answer in operation["responses"].items()
            )
            shown = f"<pre>{html.escape(example)}</pre>" if example else ""
            parts.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{operation['summary']}</p>"
                f"{shown}<table>{rows}</table>"
            )
    style = (
        "body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:1rem/1.5 system-ui}"
        "pre{background:#8881;padding:.6rem}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
        "h2{font-size:1.1rem;margin-top:2rem}:root{color-scheme:light dark}"
    )
    title = f"fasttx {html.escape(described['info']['version'])}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{style}</style><h1>{title}</h1>"
        f"<p>As JSON: <a href=/openapi.json>/openapi.json</a></p>{''.join(parts)}</html>"
    )
