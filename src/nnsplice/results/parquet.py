"""Rows as a Parquet file; the only file that imports pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nnsplice.errors import MissingPackage
from nnsplice.stores import whole

if TYPE_CHECKING:
    import pandas as pd


def write(path: str | os.PathLike[str], frames: Iterable[pd.DataFrame]) -> None:
    """Write frames with the same columns, each as a row group, atomically."""
    try:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]  (an extra)
        import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackage("Parquet is written by pyarrow", write='pip install "nnsplice[parquet]"') from error
    from pandas.api.types import is_numeric_dtype

    with whole(path) as temporary:
        writer: Any = None
        for frame in frames:
            # One type of a column in all frames: what is no number is a text, also where it is missing everywhere.
            texts = {name: "string" for name, kind in frame.dtypes.items() if not is_numeric_dtype(kind)}
            rows = pa.Table.from_pandas(frame.astype(texts), preserve_index=False)
            writer = pq.ParquetWriter(temporary, rows.schema) if writer is None else writer
            writer.write_table(rows)
        if writer is not None:
            writer.close()
