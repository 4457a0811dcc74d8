# The search for a detector no larger than this one: first train it, then see tools/search.py.
_base_ = './retinanet_effv2_s1.py'

search = dict()
