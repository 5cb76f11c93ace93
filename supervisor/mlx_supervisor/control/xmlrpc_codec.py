"""Reads XML-RPC requests, with limits and without document types, and writes responses that every client can read."""

import math
import re
import xmlrpc.client
from collections.abc import Mapping, Sequence
from typing import Any
from xml.parsers import expat

DEPTH_LIMIT = 32
"""Nested XML elements in a request; a plain call needs 8, a multicall 16."""
ELEMENT_LIMIT = 10_000
_ILLEGAL_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class CallError(Exception):
    """The request is not XML-RPC, or exceeds a limit."""


def load_call(body: bytes) -> tuple[str, tuple[Any, ...]]:
    """Method name and arguments of a request. Raises CallError."""
    unmarshaller = xmlrpc.client.Unmarshaller()
    try:
        _parser_into(unmarshaller).Parse(body, True)
        arguments = unmarshaller.close()
        method = unmarshaller.getmethodname()
    except CallError:
        raise
    except Exception as error:  # the unmarshaller raises exceptions of any type on invalid text
        raise CallError(f"not an XML-RPC call: {type(error).__name__}: {error}") from None
    if not isinstance(method, str):
        raise CallError("no methodName")
    return method, tuple(arguments)


def _parser_into(unmarshaller: xmlrpc.client.Unmarshaller) -> "expat.XMLParserType":
    depth = elements = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements
        depth += 1
        elements += 1
        if depth > DEPTH_LIMIT or elements > ELEMENT_LIMIT:
            raise CallError(f"more than {DEPTH_LIMIT} nested or {ELEMENT_LIMIT} elements")
        unmarshaller.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        unmarshaller.end(tag)

    def refuse(*_: object) -> None:
        raise CallError("document types and entities are not allowed")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = unmarshaller.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    unmarshaller.xml("", None)  # it is given text, so no encoding to decode
    return parser


def dump_result(value: object) -> bytes:
    """The answer to a call."""
    return xmlrpc.client.dumps((to_wire(value),), methodresponse=True).encode()


def dump_fault(code: int, text: str) -> bytes:
    """A fault as the answer to a call."""
    return xmlrpc.client.dumps(xmlrpc.client.Fault(int(code), clean(text)), methodresponse=True).encode()


def clean(text: str) -> str:
    """The text without terminal sequences and without characters that XML 1.0 forbids."""
    return _ILLEGAL_IN_XML.sub("", _TERMINAL_SEQUENCE.sub("", text))


def clip_int(value: float) -> int:
    """The nearest integer in XML-RPC's 32 bits; 0 for NaN."""
    if math.isnan(value):
        return 0
    return int(max(xmlrpc.client.MININT, min(value, xmlrpc.client.MAXINT)))


def to_wire(value: object) -> Any:
    """The value in XML-RPC's types: without nil, integers over 32 bits as doubles, NaN and infinity as text."""
    if isinstance(value, str):
        return clean(str(value))  # a plain str: the marshaller knows no subclasses
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        fits = xmlrpc.client.MININT <= value <= xmlrpc.client.MAXINT
        return int(value) if fits else float(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {clean(str(key)): to_wire(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence):
        return [to_wire(item) for item in value]
    return clean(str(value))
