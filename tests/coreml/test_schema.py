"""Our table of protobuf fields against the descriptors that coremltools installs."""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from loraduct.formats.coreml import schema

_KINDS = {
    1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string",
    12: "bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    """coremltools' messages by short name, without importing coremltools itself."""
    spec = find_spec("coremltools")
    folder = Path(spec.origin).parent / "proto"
    alias = types.ModuleType("their_proto")
    alias.__path__ = [str(folder)]
    sys.modules["their_proto"] = alias
    found = {}

    def collect(message):
        found[message.name] = message
        for inner in message.nested_types:
            collect(inner)

    try:
        for name in ("FeatureTypes", "MIL", "Model"):
            module = importlib.import_module(f"their_proto.{name}_pb2")
            for message in module.DESCRIPTOR.message_types_by_name.values():
                collect(message)
            found |= {f"enum {e.name}": e for e in module.DESCRIPTOR.enum_types_by_name.values()}
    finally:
        for name in [n for n in sys.modules if n.startswith("their_proto")]:
            del sys.modules[name]
    return found


def _kind(field):
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        value = entry.fields_by_name["value"]
        inner = value.message_type.name if value.message_type else _KINDS[value.type]
        return f"{{{inner}}}"
    name = entry.name if entry else field.enum_type.name if field.enum_type else _KINDS[field.type]
    return f"[{name}]" if field.is_repeated else name


@pytest.mark.parametrize("message", list(schema.fields()))
def test_fields_are_coremltools(theirs, message):
    for number, name, kind, group in schema.fields()[message]:
        field = theirs[message].fields_by_name[name]
        oneof = field.containing_oneof.name if field.containing_oneof else None
        assert (field.number, _kind(field), oneof) == (number, kind, group), (message, name)


def test_every_field_of_a_program_is_in_the_table(theirs):
    ours = schema.fields()
    start = list(ours).index("Program")
    for message in list(ours)[start:]:
        assert {f.name for f in theirs[message].fields} == {row[1] for row in ours[message]}


def test_data_types_are_coremltools(theirs):
    values = {v.name: v.number for v in theirs["enum DataType"].values}
    assert values == {"UNUSED_TYPE": 0} | schema.DATA_TYPES
    array = theirs["ArrayFeatureType"].enum_types_by_name["ArrayDataType"]
    theirs_array = {v.name.replace("DOUBLE", "FLOAT64"): v.number for v in array.values}
    assert theirs_array == {"INVALID_ARRAY_DATA_TYPE": 0} | schema.ARRAY_TYPES


def test_unknown_fields_survive():
    made = schema.new("Model", specificationVersion=9)
    # field 2000 (a text classifier), which the table leaves out: length-delimited, two bytes
    raw = made.SerializeToString() + bytes([0x82, 0x7D, 0x02, 0x08, 0x01])
    assert schema.messages()["Model"].FromString(raw).SerializeToString() == raw
