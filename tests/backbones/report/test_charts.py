"""Charts are safe to put into a page."""

from backbones.report.charts import line_chart


def test_names_are_escaped():
    svg = line_chart('<b>', {'<i>': [(0, 1), (1, float('nan'))]}, ('x', '<u>')).svg
    assert '&lt;b&gt;' in svg and not {'<b>', '<i>', '<u>'} & set(svg.split('"'))
    assert 'nan' not in svg
