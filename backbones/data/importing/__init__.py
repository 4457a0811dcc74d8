"""Labeled folders of other layouts, brought into COCO's or ADE20K's."""

from .formats import FORMATS, choose_format
from .records import Source, open_source
from .write import write_dataset

__all__ = ['FORMATS', 'Source', 'choose_format', 'open_source', 'write_dataset']
