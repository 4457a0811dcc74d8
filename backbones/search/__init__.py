"""Supernet and joint search for the network of the family that fits a task, data and a device.

Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed", section 4.
"""
