"""A transform of one's own: a record batch in, a record batch out, nothing else looked at."""

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["tidy"]


def tidy(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Normalise Unicode, make runs of spaces one, and take blanks off both ends."""
    text = pc.utf8_normalize(batch.column("text"), form="NFC")
    text = pc.replace_substring_regex(text, pattern=r"[ \t]+", replacement=" ")
    text = pc.utf8_trim_whitespace(text)
    return batch.set_column(batch.schema.get_field_index("text"), "text", text)
