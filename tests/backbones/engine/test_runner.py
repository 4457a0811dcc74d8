"""The runner's own config, whose text is that of mmengine's."""

from mmengine.config import Config

from backbones.engine.runner import FormattedConfig


def test_the_text_follows_changes():
    config = Config(dict(model=dict(type='A', sizes=[1, 2]), work_dir='here'))
    formatted = FormattedConfig()
    formatted.__setstate__(config.__getstate__())
    assert formatted.pretty_text == formatted.pretty_text == config.pretty_text
    formatted.model.sizes.append(3)
    assert '3' in formatted.pretty_text and formatted.pretty_text == config.pretty_text
