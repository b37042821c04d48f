"""Data sets by name: what they are, where they lie, how they are fetched, checked and prepared."""

from trimtab.tasks.data.data_set import DataFile, DataSet
from trimtab.tasks.data.folder import cache_folder, data_folder, read_data
from trimtab.tasks.data.prepare import prepared
from trimtab.tasks.data.table import DATA_SETS, find_data_set

__all__ = [
    "DATA_SETS",
    "DataFile",
    "DataSet",
    "cache_folder",
    "data_folder",
    "find_data_set",
    "prepared",
    "read_data",
]
