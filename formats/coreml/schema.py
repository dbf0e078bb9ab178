"""The protobuf messages of ML programs that loraduct reads and writes.

Field numbers and types are those of coremltools 9.0's ``Model.proto``, ``MIL.proto`` and
``FeatureTypes.proto``; a test compares this table with the descriptors coremltools installs. Only
what an ML program's package holds is here: any other field survives as an unknown field. Nothing
is imported from coremltools, whose import takes seconds and pulls torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# One line a message: number name type. [T] repeated, {T} map from text to T, name/g: of oneof g.
_MESSAGES = """
Model: 1 specificationVersion int32; 2 description ModelDescription; 10 isUpdatable bool; 502
  mlProgram/Type Program
ModelDescription: 1 input [FeatureDescription]; 10 output [FeatureDescription]; 13 state
  [FeatureDescription]; 11 predictedFeatureName string; 12 predictedProbabilitiesName string; 20
  functions [FunctionDescription]; 21 defaultFunctionName string; 100 metadata Metadata
FunctionDescription: 1 name string; 2 input [FeatureDescription]; 3 output [FeatureDescription]; 6
  state [FeatureDescription]; 4 predictedFeatureName string; 5 predictedProbabilitiesName string
Metadata: 1 shortDescription string; 2 versionString string; 3 author string; 4 license string;
  100 userDefined {string}
FeatureDescription: 1 name string; 2 shortDescription string; 3 type FeatureType
FeatureType: 5 multiArrayType/Type ArrayFeatureType; 8 stateType/Type StateFeatureType; 1000
  isOptional bool
StateFeatureType: 1 arrayType/Type ArrayFeatureType
ArrayFeatureType: 1 shape [int64]; 2 dataType ArrayDataType; 21 enumeratedShapes/ShapeFlexibility
  EnumeratedShapes; 31 shapeRange/ShapeFlexibility ShapeRange
EnumeratedShapes: 1 shapes [Shape]
Shape: 1 shape [int64]
ShapeRange: 1 sizeRanges [SizeRange]
SizeRange: 1 lowerBound uint64; 2 upperBound int64
Program: 1 version int64; 2 functions {Function}; 3 docString string; 4 attributes {Value}
Function: 1 inputs [NamedValueType]; 2 opset string; 3 block_specializations {Block}; 4 attributes
  {Value}
Block: 1 inputs [NamedValueType]; 2 outputs [string]; 3 operations [Operation]; 4 attributes
  {Value}
Argument: 1 arguments [Binding]
Binding: 1 name/binding string; 2 value/binding Value
Operation: 1 type string; 2 inputs {Argument}; 3 outputs [NamedValueType]; 4 blocks [Block]; 5
  attributes {Value}
NamedValueType: 1 name string; 2 type ValueType
ValueType: 1 tensorType/type TensorType; 2 listType/type ListType; 3 tupleType/type TupleType; 4
  dictionaryType/type DictionaryType; 5 stateType/type StateType
TensorType: 1 dataType DataType; 2 rank int64; 3 dimensions [Dimension]; 4 attributes {Value}
TupleType: 1 types [ValueType]
ListType: 1 type ValueType; 2 length Dimension
DictionaryType: 1 keyType ValueType; 2 valueType ValueType
StateType: 1 wrappedType ValueType
Dimension: 1 constant/dimension ConstantDimension; 2 unknown/dimension UnknownDimension
ConstantDimension: 1 size uint64
UnknownDimension: 1 variadic bool
Value: 1 docString string; 2 type ValueType; 3 immediateValue/value ImmediateValue; 5
  blobFileValue/value BlobFileValue
ImmediateValue: 1 tensor/value TensorValue; 2 tuple/value TupleValue; 3 list/value ListValue; 4
  dictionary/value DictionaryValue
BlobFileValue: 1 fileName string; 2 offset uint64
TensorValue: 1 floats/value RepeatedFloats; 2 ints/value RepeatedInts; 3 bools/value
  RepeatedBools; 4 strings/value RepeatedStrings; 5 longInts/value RepeatedLongInts; 6
  doubles/value RepeatedDoubles; 7 bytes/value RepeatedBytes
RepeatedFloats: 1 values [float]
RepeatedDoubles: 1 values [double]
RepeatedInts: 1 values [int32]
RepeatedLongInts: 1 values [int64]
RepeatedBools: 1 values [bool]
RepeatedStrings: 1 values [string]
RepeatedBytes: 1 values bytes
TupleValue: 1 values [Value]
ListValue: 1 values [Value]
DictionaryValue: 1 values [KeyValuePair]
KeyValuePair: 1 key Value; 2 value Value
"""

# MIL's DataType and, of features, ArrayDataType (0x10000 float, 0x20000 int, plus bits).
DATA_TYPES = {
    "BOOL": 1, "STRING": 2, "FLOAT16": 10, "FLOAT32": 11, "FLOAT64": 12, "BFLOAT16": 13,
    "INT8": 21, "INT16": 22, "INT32": 23, "INT64": 24, "INT4": 25,
    "UINT8": 31, "UINT16": 32, "UINT32": 33, "UINT64": 34, "UINT4": 35, "UINT2": 36, "UINT1": 37,
    "UINT6": 38, "UINT3": 39, "FLOAT8E4M3FN": 40, "FLOAT8E5M2": 41,
}  # fmt: skip
ARRAY_TYPES = {
    "FLOAT32": 65568,
    "FLOAT64": 65600,
    "INT32": 131104,
    "INT8": 131080,
    "FLOAT16": 65552,
}
DATA_TYPE_NAMES = {number: name for name, number in DATA_TYPES.items()}
ARRAY_TYPE_NAMES = {number: name for name, number in ARRAY_TYPES.items()}

_SCALARS = {
    "double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "bool": 8, "string": 9, "bytes": 12,
}  # fmt: skip
_ENUMS = ("DataType", "ArrayDataType")  # read and written as plain integers
_PACKAGE = "loraduct.mil"


def fields() -> dict[str, list[tuple[int, str, str, str | None]]]:
    """Message -> (number, name, type, oneof) of its fields; type keeps its [] or {}."""
    found: dict[str, list[tuple[int, str, str, str | None]]] = {}
    for line in _MESSAGES.strip().replace("\n  ", " ").splitlines():
        message, _, rest = line.partition(": ")
        rows = (item.split() for item in rest.split("; "))
        found[message] = [
            (int(n), name.partition("/")[0], kind, name.partition("/")[2] or None)
            for n, name, kind in rows
        ]
    return found


@cache
def messages() -> dict[str, Any]:
    """Message name -> class, in a pool of their own, so that coremltools can be loaded beside."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    table = fields()
    file = descriptor_pb2.FileDescriptorProto(
        name="loraduct/mil.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, rows in table.items():
        message = file.message_type.add(name=name)
        groups: dict[str, int] = {}
        for number, field, kind, group in rows:
            bare = kind.strip("[]{}")
            one = message.field.add(name=field, number=number, label=3 if kind[0] in "[{" else 1)
            if kind[0] == "{":
                _map_entry(message, one, bare)
            else:
                _set_type(one, bare)
            if group:
                if group not in groups:
                    groups[group] = len(groups)
                    message.oneof_decl.add(name=group)
                one.oneof_index = groups[group]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{n}"))
        for n in table
    }


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    elif kind in _ENUMS:
        field.type = _SCALARS["int32"]  # the same bytes on the wire
    else:
        field.type, field.type_name = 11, f".{_PACKAGE}.{kind}"


def _map_entry(message: Any, field: Any, kind: str) -> None:
    """A map is a repeated nested message of key and value (protobuf's language guide, "Maps")."""
    # protoc's name, which the pool checks: the field's in camel case
    name = "".join(w[0].upper() + w[1:] for w in field.name.split("_")) + "Entry"
    entry = message.nested_type.add(name=name)
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=_SCALARS["string"])
    _set_type(entry.field.add(name="value", number=2, label=1), kind)
    field.type, field.type_name = 11, f".{_PACKAGE}.{message.name}.{name}"


def new(message: str, **values: Any) -> Any:
    """A new message."""
    return messages()[message](**values)
