"""Telling addresses and cameras from paths."""

import re

LIVE_SCHEMES = ('rtsp', 'rtsps', 'rtmp', 'rtmps', 'udp')
WEB_SCHEMES = ('http', 'https')


def find_scheme(path: str) -> str | None:
    """What stands before ``://``, in lower case; None for a path."""
    match = re.match(r'([a-zA-Z][a-zA-Z0-9+.-]*)://', path)
    return match[1].lower() if match else None


def is_web(path: str) -> bool:
    """Whether this is an http(s) address, behind which can be anything."""
    return find_scheme(path) in WEB_SCHEMES


def is_live(path: str) -> bool:
    """Whether this can only be a live source: an address of a stream, or ``webcam:N``."""
    return find_scheme(path) in LIVE_SCHEMES or re.fullmatch(r'webcam:\d+', path) is not None


def without_password(path: str) -> str:
    """An address as it may be shown and kept: with neither user nor password."""
    return re.sub(r'^([a-zA-Z][a-zA-Z0-9+.-]*://)[^/@]*@', r'\1', path)
