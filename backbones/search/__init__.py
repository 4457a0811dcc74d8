"""Supernet and joint search: the network of the family that fits a task, its data and a device.

Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed", section 4.
"""
