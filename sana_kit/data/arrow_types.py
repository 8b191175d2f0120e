"""Arrow's spellings of text, bytes and lists: string, large_string, string_view, dictionary-encoded, and so on.

pandas 3 and polars write large_string where others write string; a table must not depend on its writer.
"""

from __future__ import annotations

import pyarrow as pa


def _decoded(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary-encoded column, else the type itself."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, in any spelling."""
    kind = _decoded(kind)
    view = getattr(pa.types, "is_string_view", lambda _: False)  # pyarrow 16 and newer
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds byte strings, in any spelling."""
    kind = _decoded(kind)
    view = getattr(pa.types, "is_binary_view", lambda _: False)
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return plain or view(kind)


def item_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of a list's items, in any spelling of a list; None for other columns."""
    kind = _decoded(kind)
    names = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    for name in names:
        if getattr(pa.types, name, lambda _: False)(kind):
            return kind.value_type
    return None


def holds_captions(kind: pa.DataType) -> bool:
    """Whether a column can be captions: text, lists of text, or nothing but nulls."""
    inner = item_type(kind)
    return holds_captions(inner) if inner is not None else is_text(kind) or pa.types.is_null(kind)


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column can be encoded images: bytes, or a struct with a field 'bytes'."""
    if pa.types.is_struct(kind):
        return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
    return is_bytes(kind)


def told(kind: pa.DataType) -> str:
    """What a column holds, as a message says it."""
    inner = item_type(kind)
    if inner is not None and pa.types.is_struct(inner):
        names = ", ".join(inner.field(k).name for k in range(inner.num_fields))
        return f"conversations or other records ({names})"
    return str(kind)
