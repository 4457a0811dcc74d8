"""Everything in a config's data that would spoil a run, found and listed before it starts."""

from .check_dataset import check_dataset
from .findings import Finding, Report

__all__ = ['Finding', 'Report', 'check_dataset']
