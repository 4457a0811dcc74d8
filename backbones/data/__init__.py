"""Check the data that a config reads before a run: one checker for all tools."""

from .check import check_dataset
from .findings import Finding, Report

__all__ = ['Finding', 'Report', 'check_dataset']
