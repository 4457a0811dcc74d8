"""The runner's own config, whose text is that of mmengine's."""

import copy

from mmengine.config import Config

from backbones.engine.runner import FormattedConfig


def test_the_text_is_mmengines_and_kept():
    config = Config(dict(model=dict(type='A', sizes=[1, 2]), work_dir='here'))
    formatted = FormattedConfig()
    formatted.__setstate__(config.__getstate__())
    # As mmengine's Runner does with its config.
    formatted = copy.deepcopy(formatted)
    assert formatted.pretty_text == config.pretty_text
    assert formatted.pretty_text is formatted.pretty_text
    assert 'pretty_text' not in formatted
