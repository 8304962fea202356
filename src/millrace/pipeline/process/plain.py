"""Plain Arrow types: the few that every reader of a shard understands, one for each meaning.

Dictionaries, run ends, views, 64-bit offsets and extension types are ways to lay out a value, not values. A shard
whose blocks can be read alone can't hold dictionaries, and a digest should not depend on which library laid a
string out; so a chain decodes them as they come in, and after each transform that could have made new ones.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

__all__ = ["plain_batch", "plain_schema", "plain_type"]


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that means the same and is laid out plainly."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    if pt.is_large_binary(kind) or pt.is_binary_view(kind):
        return pa.binary()
    if pt.is_fixed_size_list(kind):
        return pa.list_(_plain_item(kind.value_field), kind.list_size)
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_list_view(kind) or pt.is_large_list_view(kind):
        return pa.list_(_plain_item(kind.value_field))
    if pt.is_map(kind):
        return pa.map_(plain_type(kind.key_type), _plain_field(kind.item_field), keys_sorted=kind.keys_sorted)
    if pt.is_struct(kind):
        return pa.struct([_plain_field(kind.field(i)) for i in range(kind.num_fields)])
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return pa.field(field.name, plain_type(field.type), nullable=field.nullable)


def _plain_item(field: pa.Field) -> pa.Field:
    # Each library names a list's items after its own taste (``item``, ``element``, the column); it means nothing.
    return pa.field("item", plain_type(field.type), nullable=field.nullable)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with plain types and no metadata."""
    return pa.schema([_plain_field(field) for field in schema])


def plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with plain types and no metadata; columns that are plain already are shared.

    Raises:
        pa.ArrowInvalid: a column does not fit its plain type (over 2 GB of text in one batch).
    """
    schema = plain_schema(batch.schema)
    if schema.equals(batch.schema, check_metadata=True):
        return batch
    arrays = [_plain_array(array, field.type) for array, field in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _plain_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    while array.type != kind:
        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        elif pt.is_dictionary(array.type):
            array = array.dictionary_decode()
        elif pt.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        else:
            array = _plain_nested(array, kind)
            if array.type != kind:
                return array.cast(kind)
    return array


def _plain_nested(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Children first, because a cast does not look for dictionaries and extensions inside of lists."""
    mask = array.is_null() if array.null_count else None
    if pt.is_struct(array.type) and pt.is_struct(kind):
        # field() gives the children as they are: flatten() would spread the parent's nulls over non-null fields.
        children = [_plain_array(array.field(i), kind.field(i).type) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if pt.is_list(array.type) or pt.is_large_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        ends = pc.cumulative_sum(lengths.cast(pa.int64())).cast(pa.int32())
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
        items = _plain_array(array.flatten(), kind.value_type)
        return pa.ListArray.from_arrays(offsets, items, type=kind, mask=mask)
    return array
