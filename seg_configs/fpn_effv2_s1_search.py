# The search for a segmentor no larger than this one: first train it, then see tools/search.py.
_base_ = './fpn_effv2_s1.py'

search = dict()
