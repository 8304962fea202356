"""The *process* stage: records in, plain record batches out, record by record and always the same."""

from millrace.pipeline.process.chain import Chain, count_barriers
from millrace.pipeline.process.keys import KeyBatch
from millrace.pipeline.process.rows import Deadline, ProcessContext, ProcessCounts
from millrace.pipeline.process.survey import (
    RangedReader,
    decode_losers,
    encode_losers,
    encode_survey,
    merge_losers,
    resolve,
    survey_partition,
)

__all__ = [
    "Chain",
    "Deadline",
    "KeyBatch",
    "ProcessContext",
    "ProcessCounts",
    "RangedReader",
    "count_barriers",
    "decode_losers",
    "encode_losers",
    "encode_survey",
    "merge_losers",
    "resolve",
    "survey_partition",
]
