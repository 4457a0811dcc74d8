# Search for a detector up to this size: train this supernet first, then see tools/search.py.
_base_ = './retinanet_effv2_s1.py'

search = dict()
