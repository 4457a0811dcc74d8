# Search for a segmentor up to this size: train this supernet first, then see tools/search.py.
_base_ = './fpn_effv2_l.py'

search = dict()
