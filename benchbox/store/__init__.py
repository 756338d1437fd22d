"""The database: one writer (:class:`Store`), any number of readers. Knows SQL, never torch."""

from benchbox.store.database import public_url
from benchbox.store.reader import DatabaseSource, open_reader
from benchbox.store.store import Store

__all__ = ["DatabaseSource", "Store", "open_reader", "public_url"]
