"""Storage: folders and object stores (`s3://`, `gs://`) with the same operations.

store       the operations, and the store of a path or address
local       a folder
cloud       object stores, through obstore; the only file that imports it
addresses   addresses of object stores
files       single files: written atomically, read whole or in ranges
"""

from nnsplice.stores.addresses import is_address
from nnsplice.stores.files import Opened, opened, whole
from nnsplice.stores.store import HeldLock, Store, store_of

__all__ = ["HeldLock", "Opened", "Store", "is_address", "opened", "store_of", "whole"]
